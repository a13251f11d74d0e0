"""What side networks read of a backbone: which blocks, in which layout, at which positions."""

import pytest
import timm
import torch
from torch import nn

import toolkit
from toolkit.backbones import data_config
from toolkit.errors import InputError
from toolkit.methods.taps import CHANNELS_FIRST, CHANNELS_LAST, TOKENS, Form, Survey, forms_of, taps_of

pytestmark = pytest.mark.numerical


def small(name, **sizes):
    """A timm model for images of 64 px."""
    model = timm.create_model(name, num_classes=5, **sizes)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    return model.eval()


def swin():
    sizes = {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}
    return small("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **sizes)


def own(name):
    return toolkit.build_backbone(name, 5, pretrained=False).eval()


BACKBONES = {
    "demo_vit": (lambda: own("demo_vit"), TOKENS, TOKENS),
    "demo_cnn": (lambda: own("demo_cnn"), CHANNELS_FIRST, CHANNELS_FIRST),
    "small:tiny_vit": (lambda: own("small:tiny_vit"), CHANNELS_LAST, CHANNELS_FIRST),
    "small:vim_small": (lambda: own("small:vim_small"), TOKENS, TOKENS),
    "small:mambavision_t": (lambda: own("small:mambavision_t"), TOKENS, CHANNELS_FIRST),
    "swin": (swin, CHANNELS_LAST, CHANNELS_LAST),
    "resnet18": (lambda: small("resnet18"), CHANNELS_FIRST, CHANNELS_FIRST),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_taps_are_the_blocks_outputs_at_the_final_positions(name):
    build, block_layout, final_layout = BACKBONES[name]
    model = build()
    outputs = {}
    for block, module in toolkit.budget.find_blocks(model).items():
        module.register_forward_hook(lambda m, args, output, block=block: outputs.update({block: output}))
    survey = Survey.of(model)
    taps = taps_of(model, survey)
    forms, final = forms_of(model, survey)
    assert (forms[-1].layout, final.layout) == (block_layout, final_layout)
    outputs.clear()
    images = torch.randn(2, *data_config(model)["input_size"])
    with torch.no_grad():
        *features, last = taps.collect(model, images)
        expected = model.forward_features(images)
        assert torch.equal(model.forward_head(taps.for_head(last)), model(images))
    assert [tap.name for tap in taps.taps] == [*outputs]
    assert taps.widths == (*(f.shape[2] for f in features), last.shape[2])
    assert torch.equal(taps.for_head(last), expected)
    assert taps.for_head(last).stride() == expected.stride()
    for tap, form, feature in zip(taps.taps, forms, features):
        assert feature.shape == (2, taps.positions, form.width)
        # Averages over cells of equal size have the mean of all.
        mean = form.tokens_of(outputs[tap.name]).mean(1)
        torch.testing.assert_close(feature.mean(1), mean, rtol=1e-4, atol=1e-5)


def test_positions_stay_where_they_are():
    """An early map, twice as high and wide as the last: each position is the mean of its four."""
    model = own("demo_cnn")
    taps = taps_of(model, Survey.of(model))
    early = {tap.name: tap for tap in taps.taps}["blocks.1.0"]
    x = torch.zeros(1, 32, 8, 8)
    x[0, 7, 2:4, 6:8] = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    brought = taps._brought_to_final(early, x)
    assert brought[0, 1 * 4 + 3, 7] == 3 and brought.count_nonzero() == 1


def test_taps_are_spread_evenly_and_include_the_last():
    model = own("small:tiny_vit")
    survey = Survey.of(model)
    names = [seen.name for seen in survey.blocks]
    assert [t.name for t in taps_of(model, survey, 4).taps] == names[1::2]
    assert [t.name for t in taps_of(model, survey, 1).taps] == names[-1:]
    assert [t.name for t in taps_of(model, survey, 8).taps] == names
    with pytest.raises(InputError, match=r"taps is 9, .* 8 blocks .* choose 0 \(all\) to 8"):
        taps_of(model, survey, 9)


def test_a_survey_leaves_the_model_as_it_was():
    model = own("demo_vit").train()
    Survey.of(model)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert type(model.cls_token) is nn.Parameter and model.cls_token.device.type == "cpu"


class Net(nn.Module):
    """A chain of blocks for images of 8 px, with the methods of a timm model."""

    def __init__(self, *blocks, head=8):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8)}
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(head, 2)

    def forward_features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward_head(self, x):
        return self.head(x.flatten(2).mean(2))

    def get_classifier(self):
        return self.head


class Block(nn.Module):
    def __init__(self, function, width=3):
        super().__init__()
        self.layer = nn.Conv2d(width, 8, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x) if x.dim() == 4 else x)


def survey_of(*functions):
    model = Net(*(Block(f, 3 if i == 0 else 8) for i, f in enumerate(functions)))
    return model, Survey.of(model)


def test_a_map_as_wide_as_high_as_deep_is_told_on_taller_images():
    model, survey = survey_of(lambda x: x, lambda x: x)
    assert survey.layout(survey.final) is None  # 8 channels, 8 rows, 8 columns
    forms, final = forms_of(model, survey)
    assert final == forms[0] == Form(CHANNELS_FIRST, (8, 8), 8)


def test_layouts_that_cannot_be_told_are_errors():
    def square(x):
        return nn.functional.adaptive_avg_pool2d(x, (8, 8))

    model, survey = survey_of(square, square)
    with pytest.raises(InputError, match=r"layout of the final features of Net.* is ambiguous"):
        taps_of(model, survey)


def test_shapes_that_do_not_chain_are_errors():
    model, survey = survey_of(lambda x: x[..., ::4, ::4], lambda x: x.repeat(1, 1, 4, 4)[..., :6, :6])
    with pytest.raises(InputError, match=r"do not chain: blocks.0 returns positions \(2, 2\).*\(6, 6\)"):
        taps_of(model, survey)
    sizes = {"stem_dim": 8, "embed_dim": 16, "depths": (1, 1, 2, 2), "num_heads": (2, 4)}
    sizes |= {"window_sizes": (2, 2), "d_state": 4}
    windows = toolkit.build_backbone("mambavision_t", 5, pretrained=False, **sizes)
    windows.pretrained_cfg = {**windows.pretrained_cfg, "input_size": (3, 64, 64)}
    with pytest.raises(InputError, match="computes on windows, 8 for 2 images"):
        taps_of(windows, Survey.of(windows))


def test_features_changed_in_place_cannot_be_tapped():
    model = Net(Block(lambda x: x), Block(lambda x: x, 8))
    model.blocks[1].forward = lambda x: x.mul_(2)
    with pytest.raises(InputError, match=r"output of blocks.0 changes in place"):
        Survey.of(model)


def test_a_block_that_runs_twice_is_ambiguous():
    class Twice(Net):
        def forward_features(self, x):
            return self.blocks[1](super().forward_features(x))

    with pytest.raises(InputError, match=r"blocks.1 runs twice"):
        Survey.of(Twice(Block(lambda x: x), Block(lambda x: x, 8)))


def test_features_of_several_branches_cannot_be_refined():
    class Branches(Net):  # as CrossViT's
        def forward_features(self, x):
            return [super().forward_features(x)] * 2

    with pytest.raises(InputError, match=r"features of Branches are a list, .* choose method 'linear'"):
        Survey.of(Branches(Block(lambda x: x), Block(lambda x: x, 8)))


def test_a_backbone_without_taps():
    class Plain(Net):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Conv2d(3, 8, 1))

    with pytest.raises(InputError, match=r"Plain is a backbone without taps: .* choose method 'linear'"):
        Survey.of(Plain())
    with pytest.raises(InputError, match=r"Linear has no forward_features\(\)"):
        Survey.of(nn.Linear(2, 2))


def test_images_of_another_size_are_named():
    model = own("demo_cnn")
    taps = taps_of(model, Survey.of(model))
    with pytest.raises(InputError, match=r"features of \(64, 320\) .* made for \(16, 320\)"):
        taps.collect(model, torch.zeros(1, 3, 64, 64))
