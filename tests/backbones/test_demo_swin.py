"""The demo Swin transformer: windows of both kinds, and one set of tables for 32 and 64 pixels."""

import torch

import toolkit
from toolkit.backbones import data_config
from toolkit.budget import find_blocks


def build():
    toolkit.seed_everything(0)
    return toolkit.build_backbone("demo_swin", 7, pretrained=False)


def test_sizes():
    model = build()
    assert data_config(model)["input_size"] == (3, 32, 32)
    assert 1.2e6 < sum(p.numel() for p in model.parameters()) < 1.4e6
    assert len(find_blocks(model)) == 8
    shifts = [block.shift_size for stage in model.layers for block in stage.blocks]
    assert (0, 0) in shifts and (2, 2) in shifts


def test_64_pixels_use_the_weights_of_32():
    model = build()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    windows = [stage.blocks[0].attn.window_size for stage in model.layers]
    model.set_input_size((64, 64), window_size=windows)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    maps = model.forward_intermediates(torch.zeros(1, 3, 64, 64), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 32, 32), (48, 16, 16), (96, 8, 8), (192, 4, 4)]
    assert all(any(block.shift_size) for stage in model.layers for block in stage.blocks[1:])


def test_its_branches_have_an_effect_from_the_start_and_its_head_too():
    """With timm's usual initialisation they add a hundredth to what they are added to, and nothing learns."""
    model = build()
    added = []
    for block in find_blocks(model).values():
        block.register_forward_hook(lambda _m, args, out: added.append((out - args[0]).std() / args[0].std()))
    logits = model(torch.randn(2, 3, 32, 32))
    assert min(added) > 0.2
    assert logits.std() > 0.1


def test_every_parameter_learns():
    model = build()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
