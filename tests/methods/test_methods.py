"""Which parameters train.  Figures for ViT-S and TinyViT are sums over their published shapes."""

import pytest
import timm
import torch
from torch import nn

import toolkit
from toolkit.errors import InputError
from toolkit.methods import METHODS, head_name

VIT_S, HEAD_100 = 21_665_664, 384 * 100 + 100


def vit_small():
    with torch.device("meta"):
        return timm.create_model("vit_small_patch16_224", num_classes=100)


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        ("full", VIT_S + HEAD_100),
        ("linear", HEAD_100),
        # patch embedding 384; per block two norms, qkv, proj, fc1, fc2; the last norm
        ("bitfit", HEAD_100 + 384 + 12 * (2 * 384 + 1152 + 384 + 1536 + 384) + 384),
        # per block: qkv (384 to 1152), proj (384 to 384), fc1 (384 to 1536), fc2 (1536 to 384), rank 8
        ("lora", HEAD_100 + 12 * 8 * ((384 + 1152) + (384 + 384) + 2 * (384 + 1536))),
    ],
)
def test_trainable_parameters_of_vit_small(method, trainable):
    summary = toolkit.summarize(toolkit.adapt(vit_small(), method))
    assert summary.trainable == trainable
    assert summary.adapter_bytes == 4 * trainable
    lora = trainable - HEAD_100 if method == "lora" else 0
    assert summary.total == VIT_S + HEAD_100 + lora


def test_bitfit_goes_by_type_and_leaves_position_tables_alone():
    with torch.device("meta"):
        model = timm.create_model("tiny_vit_21m_224", num_classes=47)
    toolkit.adapt(model, "bitfit")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("attention_biases" in name for name in trained)
    head = {name for name in trained if name.startswith("head.fc.")}
    assert all(name.endswith(".bias") for name in trained - head)
    # The substring rule gives 96,143: with those tables (16,464) and the weight of the head's norm (576).
    assert toolkit.summarize(model).trainable == 96_143 - 16_464 - 576


def test_lora_targets_are_anchored():
    model = toolkit.adapt(vit_small(), "lora")
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"blocks.{i}.{layer}" for i in range(12) for layer in layers}


def test_lora_starts_as_the_identity(demo_model, batch):
    plain, adapted = demo_model("linear").eval(), demo_model("lora").eval()
    assert torch.equal(plain(batch[0]), adapted(batch[0]))


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if "classification" in m.tasks])
def test_exactly_the_trainable_parameters_get_gradients(demo_model, batch, method):
    model = demo_model(method)
    model(batch[0]).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_unknown_method_and_option():
    with pytest.raises(InputError, match=r"unknown method 'lorra'.*Did you mean 'lora'"):
        toolkit.adapt(vit_small(), "lorra")
    with pytest.raises(InputError, match="Did you mean 'rank'"):
        toolkit.adapt(vit_small(), "lora", rnk=4)
    with pytest.raises(InputError, match="option of method 'full'"):
        toolkit.adapt(vit_small(), "full", rank=4)


def test_model_without_a_head():
    with pytest.raises(InputError, match="get_classifier"):
        toolkit.adapt(nn.Sequential(nn.Linear(2, 2)), "linear")
    with torch.device("meta"):
        headless = timm.create_model("vit_small_patch16_224", num_classes=0)
    with pytest.raises(InputError, match="no classifier"):
        head_name(headless)


def test_what_auto_means_for_batch_norms():
    assert {name for name, method in METHODS.items() if method.batch_norm == "updated"} == {"full", "galore"}


def test_tables_list_full_fine_tuning_last():
    names = [*METHODS]
    assert names[0] == "linear" and names[-1] == "full"
