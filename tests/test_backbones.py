import hashlib

import pytest
import torch

import toolkit
from toolkit.backbones import data_config, demo
from toolkit.errors import InputError


def test_demo_weights_are_the_published_ones_and_small():
    assert demo.WEIGHTS.stat().st_size < 10_000_000
    assert hashlib.sha256(demo.WEIGHTS.read_bytes()).hexdigest() == demo.SHA256


def test_demo_vit_is_pretrained_but_for_its_head():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(toolkit.build_backbone("demo_vit", 7).state_dict())
    different = {name for name in models[0] if not torch.equal(models[0][name], models[1][name])}
    assert different == {"head.weight"}
    assert models[0]["head.weight"].shape == (7, 96)


def test_pretrained_false_loads_nothing():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(toolkit.build_backbone("demo_vit", 7, pretrained=False).state_dict())
    assert not torch.equal(models[0]["blocks.0.attn.qkv.weight"], models[1]["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_damaged_weights_are_refused(tmp_path, monkeypatch, damage):
    path = tmp_path / "demo_vit.safetensors"
    content = bytearray(demo.WEIGHTS.read_bytes())
    content[100_000] ^= 1
    if damage != "missing":
        path.write_bytes(content if damage == "flipped" else content[:1000])
    monkeypatch.setattr(demo, "WEIGHTS", path)
    with pytest.raises(InputError, match="missing" if damage == "missing" else "damaged") as caught:
        toolkit.build_backbone("demo_vit", 10)
    assert str(path) in str(caught.value)


def test_save_and_load_round_trip(tmp_path):
    model = toolkit.build_backbone("demo_vit", 3, pretrained=False)
    sha256 = demo.save_demo_weights(model, tmp_path / "w.safetensors")
    other = toolkit.build_backbone("demo_vit", 5, pretrained=False)
    demo.load_demo_weights(other, tmp_path / "w.safetensors", sha256)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, other.blocks[2].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["vit_small", "tiny_vit", "resnet18"])
def test_timm_backbones_get_a_head_of_the_right_size(name):
    with torch.device("meta"):
        model = toolkit.build_backbone(name, 47, pretrained=False)
    assert model.get_classifier().out_features == 47
    assert data_config(model)["input_size"] == (3, 224, 224)


def test_data_config_sees_through_peft(demo_model):
    assert data_config(demo_model("lora")) == data_config(demo_model("full"))
    assert data_config(demo_model("lora"))["input_size"] == (3, 32, 32)


def test_unknown_backbone_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown backbone 'vit_smal'.*Did you mean 'vit_small'"):
        toolkit.build_backbone("vit_smal", 10)
    with pytest.raises(InputError, match="Did you mean 'resnet18'"):
        toolkit.build_backbone("resnt18", 10)


def test_hub_weights_that_cannot_be_had_say_so():
    with pytest.raises(InputError, match=r"weights of 'vit_small'.*pretrained=False"):
        toolkit.build_backbone("vit_small", 10, pretrained=True)
