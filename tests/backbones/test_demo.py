"""The demo backbones: published weights, heads, damaged files, and the Swin transformer's windows."""

import hashlib

import pytest
import torch
from torch import nn

import toolkit
from toolkit.backbones import data_config, demo
from toolkit.budget import find_blocks
from toolkit.errors import InputError
from toolkit.files import DATA

CLASSES = dict.fromkeys(demo.SHA256, 7) | demo.SOURCE_CLASSES


@pytest.mark.parametrize("name", demo.SHA256)
def test_demo_weights_are_the_published_ones_and_small(name):
    content = (DATA / f"{name}.safetensors").read_bytes()
    assert len(content) < 6_000_000
    assert hashlib.sha256(content).hexdigest() == demo.SHA256[name]


def states_of_two_seeds(name, **options):
    for seed in (0, 1):
        torch.manual_seed(seed)
        yield toolkit.build_backbone(name, CLASSES[name], **options).state_dict()


@pytest.mark.parametrize(("name", "head"), [("demo_vit", "head"), ("demo_cnn", "classifier")])
def test_demo_backbones_are_pretrained_except_for_their_heads(name, head):
    one, other = states_of_two_seeds(name)
    assert {key for key in one if not torch.equal(one[key], other[key])} == {f"{head}.weight"}
    assert len(one[f"{head}.weight"]) == 7


@pytest.mark.parametrize("name", demo.SOURCE_CLASSES)
def test_source_models_have_trained_heads(name):
    one, other = states_of_two_seeds(name)
    assert all(torch.equal(one[key], other[key]) for key in one)
    # Fine-tuned from demo_cnn with statistics and all: close to it, and no tensor the same.
    before = toolkit.build_backbone("demo_cnn", CLASSES[name]).state_dict()
    assert not any(torch.equal(one[key], before[key]) for key in one if not key.endswith("_tracked"))
    stem = torch.stack([state["conv_stem.weight"].flatten() for state in (one, before)])
    assert torch.corrcoef(stem)[0, 1] > 0.9


@pytest.mark.parametrize("name", demo.SOURCE_CLASSES)
def test_source_models_refuse_other_classes(name):
    with pytest.raises(InputError, match=rf"{name}.* {CLASSES[name]} classes.* has 7.*'demo_cnn'"):
        toolkit.build_backbone(name, 7)
    assert toolkit.build_backbone(name, 7, pretrained=False).get_classifier().out_features == 7


@pytest.mark.parametrize("name", demo.SHA256)
def test_pretrained_false_loads_nothing(name):
    one, other = states_of_two_seeds(name, pretrained=False)
    drawn = [key for key in one if key.endswith((".fc1.weight", "conv_pw.weight"))]
    assert drawn and not any(torch.equal(one[key], other[key]) for key in drawn)


def test_demo_cnn_has_blocks_of_one_kind_and_a_last_map_of_several_pixels():
    model = toolkit.build_backbone("demo_cnn", 7, pretrained=False)
    assert [type(block).__name__ for block in find_blocks(model).values()] == ["InvertedResidual"] * 6
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert data_config(model)["input_size"] == (3, 32, 32)
    assert model.forward_features(torch.zeros(2, 3, 32, 32)).shape == (2, 320, 4, 4)
    assert any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
@pytest.mark.parametrize("name", ["demo_vit", "demo_cnn", "demo_cnn_digits"])
def test_damaged_weights_are_refused(tmp_path, monkeypatch, name, damage):
    path = tmp_path / f"{name}.safetensors"
    content = bytearray((DATA / path.name).read_bytes())
    content[100_000] ^= 1
    if damage != "missing":
        path.write_bytes(content if damage == "flipped" else content[:1000])
    monkeypatch.setattr(demo, "DATA", tmp_path)
    fault = "there is no checkpoint" if damage == "missing" else "not the file that was published"
    with pytest.raises(InputError, match=f"{fault}.*git checkout data/{name}") as caught:
        toolkit.build_backbone(name, 10)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["demo_vit", "demo_cnn"])
def test_save_and_load_round_trip(tmp_path, name):
    model = toolkit.build_backbone(name, 3, pretrained=False)
    path = tmp_path / "w.safetensors"
    sha256 = demo.save_demo_weights(model, path)
    other = toolkit.build_backbone(name, 5, pretrained=False)
    demo.load_demo_weights(other, path, sha256)
    states = model.state_dict(), other.state_dict()
    head = {key for key in states[0] if states[0][key].shape != states[1][key].shape}
    assert len(head) == 2
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0].keys() - head)
    with pytest.raises(InputError, match=r"does not fit .*2 missing"):  # it holds no head
        demo.load_demo_weights(other, path, sha256, head=True)


def test_save_and_load_with_the_head(tmp_path):
    model = toolkit.build_backbone("demo_cnn", 3, pretrained=False).to(memory_format=torch.channels_last)
    sha256 = demo.save_demo_weights(model, tmp_path / "w.safetensors", head=True)
    other = toolkit.build_backbone("demo_cnn", 3, pretrained=False)
    demo.load_demo_weights(other, tmp_path / "w.safetensors", sha256, head=True)
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


# --- demo_swin ------------------------------------------------------------------------------------


def swin():
    toolkit.seed_everything(0)
    return toolkit.build_backbone("demo_swin", 7, pretrained=False)


def test_demo_swin_has_shifted_windows():
    model = swin()
    assert data_config(model)["input_size"] == (3, 32, 32)
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.4e6
    assert len(find_blocks(model)) == 8
    shifts = [block.shift_size for stage in model.layers for block in stage.blocks]
    assert (0, 0) in shifts and (2, 2) in shifts


def test_demo_swin_uses_its_weights_at_64_pixels_too():
    model = swin()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    windows = [stage.blocks[0].attn.window_size for stage in model.layers]
    model.set_input_size((64, 64), window_size=windows)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    maps = model.forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 32, 32), (48, 16, 16), (96, 8, 8), (192, 4, 4)]
    assert all(any(block.shift_size) for stage in model.layers for block in stage.blocks[1:])


def test_demo_swins_branches_and_head_have_an_effect_from_the_start():
    """With timm's usual initialisation a branch is a hundredth of its input, and nothing learns."""
    model = swin()
    added = []
    for block in find_blocks(model).values():
        block.register_forward_hook(lambda _m, args, out: added.append((out - args[0]).std() / args[0].std()))
    logits = model(torch.randn(2, 3, 32, 32))
    assert min(added) > 0.2
    assert logits.std() > 0.1


def test_every_parameter_of_demo_swin_learns():
    model = swin()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
