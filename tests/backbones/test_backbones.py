import pytest
import torch

import toolkit
from toolkit.backbones import BACKBONES, data_config, demo, small_instance
from toolkit.backbones.checkpoints import read_weights
from toolkit.budget import find_blocks
from toolkit.errors import InputError


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


def test_missing_hub_weights_are_an_input_error():
    with pytest.raises(InputError, match=r"weights of 'vit_small'.*HF_HUB_OFFLINE.*pretrained=False"):
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
def test_unknown_sizes_of_a_model_are_refused(name):
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
def test_a_file_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a file of weights"):
        read_weights(path, None)
    torch.save({0: torch.zeros(1)}, path)
    with pytest.raises(InputError, match="holds no weights"):
        read_weights(path, None)
