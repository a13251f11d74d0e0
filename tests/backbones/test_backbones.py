import hashlib

import pytest
import torch
from torch import nn

import toolkit
from toolkit.backbones import BACKBONES, data_config, demo, small_instance
from toolkit.backbones.checkpoints import read_weights
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
def test_demo_backbones_are_pretrained_but_for_their_heads(name, head):
    one, other = states_of_two_seeds(name)
    assert {key for key in one if not torch.equal(one[key], other[key])} == {f"{head}.weight"}
    assert len(one[f"{head}.weight"]) == 7


@pytest.mark.parametrize("name", demo.SOURCE_CLASSES)
def test_source_models_bring_their_heads(name):
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
    state = "missing" if damage == "missing" else "damaged"
    with pytest.raises(InputError, match=f"{name} are {state}.*git checkout data/{name}") as caught:
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
    with pytest.raises(InputError, match="does not fit w: missing"):  # it holds no head
        demo.load_demo_weights(other, path, sha256, head=True)


def test_save_and_load_with_the_head(tmp_path):
    model = toolkit.build_backbone("demo_cnn", 3, pretrained=False).to(memory_format=torch.channels_last)
    sha256 = demo.save_demo_weights(model, tmp_path / "w.safetensors", head=True)
    other = toolkit.build_backbone("demo_cnn", 3, pretrained=False)
    demo.load_demo_weights(other, tmp_path / "w.safetensors", sha256, head=True)
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with pytest.raises(InputError, match=r"unexpected.*classifier"):  # it holds one
        demo.load_demo_weights(other, tmp_path / "w.safetensors", sha256)


@pytest.mark.parametrize("name", ["vit_small", "tiny_vit", "vim_small", "mambavision_t", "resnet18"])
def test_backbones_get_a_head_of_the_right_size(name):
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
    with pytest.raises(InputError, match=r"Did you mean 'vim_small'.*Valid: .*mambavision_t"):
        toolkit.build_backbone("vim_smal", 10)


def test_hub_weights_that_cannot_be_had_say_so():
    with pytest.raises(InputError, match=r"weights of 'vit_small'.*pretrained=False"):
        toolkit.build_backbone("vit_small", 10, pretrained=True)


KINDS = {
    "vit_small": {"Block"},
    "tiny_vit": {"MBConv", "TinyVitBlock"},
    "vim_small": {"VimBlock"},
    "mambavision_t": {"ConvBlock", "MixerBlock"},
}


@pytest.mark.parametrize("name", KINDS)
def test_small_instances_have_all_kinds_of_blocks(name):
    torch.manual_seed(0)
    model = small_instance(name, 7)
    assert name in BACKBONES
    assert sum(p.numel() for p in model.parameters()) < 700_000
    blocks = find_blocks(model)
    assert {type(block).__name__ for block in blocks.values()} == KINDS[name]
    size = data_config(model)["input_size"]
    assert size in [(3, 32, 32), (3, 64, 64)]
    images = torch.randn(2, *size)
    shapes = []
    for block in blocks.values():
        block.register_forward_hook(lambda _, inputs, output: shapes.append((inputs[0].shape, output.shape)))
    assert model(images).shape == (2, 7)
    # One tensor in, one of as many samples out: what plans of checkpointing and slicing ask of a block.
    assert all(before[0] == after[0] == 2 for before, after in shapes)


def test_small_mambavision_mixes_both_ways_in_both_stages():
    mixers = [
        {type(block.mixer).__name__ for block in level.blocks}
        for level in small_instance("mambavision_t", 7).levels[2:]
    ]
    assert mixers == [{"MambaMixer", "Attention"}] * 2


def test_small_instance_of_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="Did you mean 'vim_small'"):
        small_instance("vim_smal", 10)


def test_sizes_reach_the_model():
    vit = toolkit.build_backbone(
        "vit_small", 5, pretrained=False, depth=2, embed_dim=48, num_heads=3, img_size=32
    )
    assert len(vit.blocks) == 2 and vit.embed_dim == 48
    assert data_config(vit)["input_size"] == (3, 32, 32)
    vim = toolkit.build_backbone("vim_small", 5, pretrained=False, depth=2, embed_dim=48)
    assert len(vim.layers) == 2 and vim.num_features == 48


@pytest.mark.parametrize("name", ["vit_small", "tiny_vit", "vim_small", "mambavision_t", *demo.SHA256])
def test_sizes_that_a_model_has_not_are_refused(name):
    with pytest.raises(InputError, match=f"{name}.*dept"):
        toolkit.build_backbone(name, 5, pretrained=False, dept=2)


@pytest.mark.parametrize("name", ["vit_small", "vim_small"])
def test_pretrained_weights_have_their_own_sizes(name):
    with pytest.raises(InputError, match=r"pretrained=False or leave out \['depth'\]"):
        toolkit.build_backbone(name, 5, depth=2)


def test_a_small_instance_has_its_own_sizes_and_no_weights():
    with pytest.raises(InputError, match="pretrained=False"):
        toolkit.build_backbone("small:vit_small", 10)
    with pytest.raises(InputError, match=r"has its own sizes.*depth"):
        toolkit.build_backbone("small:vit_small", 10, pretrained=False, depth=1)
    with pytest.raises(InputError, match="Did you mean 'vim_small'"):
        toolkit.build_backbone("small:vim_smal", 10, pretrained=False)


@pytest.mark.parametrize("content", [b"abc", b""])
def test_a_file_that_holds_no_weights(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a file of weights"):
        read_weights(path, None)
    torch.save({0: torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(path, None)
