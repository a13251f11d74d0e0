"""Methods on convolutional networks: what is adapted; that it trains, merges and loads; what is refused.

A small network of timm's own blocks holds every kind of convolution.  `long`: the networks of the edge paper
(Slamanig et al. 2025, arXiv 2507.23536) with random weights.
"""

import functools
import math
import re

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from timm.models.resnet import BasicBlock
from torch import nn

import toolkit
from toolkit.budget import Planner, TensorMemory
from toolkit.errors import InputError
from toolkit.methods import (
    METHODS,
    Hooks,
    check_batch_norms,
    merge,
    set_train_mode,
)
from toolkit.methods.adalora import RankAllocation
from toolkit.methods.targets import Targets, narrow_layers, targets_of

ADAPTERS = ("lora", "dora", "adalora", "ia3", "lokr")
LOW_RANK = ("lora", "dora", "adalora")
CONVOLUTIONAL = [name for name, m in METHODS.items() if name != "qlora" and not m.frozen_backbone]
NETWORKS = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100")
PADDED = "tf_mobilenetv3_small_100"  # whose convolutions pad in a way of their own


class Small(nn.Module):
    """3x3, 1x1, depthwise, squeeze-excite and downsample convolutions; images (B, 3, 32, 32)."""

    def __init__(self, **stem):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, **stem)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, se_layer=functools.partial(SqueezeExcite, rd_ratio=0.5)),
            InvertedResidual(16, 16, stride=2),
            BasicBlock(16, 16),
        )
        self.blocks.append(BasicBlock(16, 24, stride=2, downsample=nn.Sequential(nn.Conv2d(16, 24, 1, 2))))
        self.head = nn.Linear(24, 10)

    def get_classifier(self):
        return self.head

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def build(network="small"):
    """As if pretrained: with running statistics that say something, and no norm that begins at 0."""
    toolkit.seed_everything(0)
    if network == "small":
        model = Small()
    else:
        options = {"zero_init_last": False} if network.startswith("resnet") else {}
        model = timm.create_model(network, num_classes=10, **options)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # an average
    with torch.no_grad():
        model.train()(images_of(network, 16))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def images_of(network, number=4):
    side = 32 if network == "small" else 64
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


def adapted(network, method, dtype=torch.float32, **options):
    """Narrow layers, as those of squeeze-excite, take the ranks that they can."""
    if "clip_rank" in METHODS[method].options.names():
        options = {"rank": 8, "clip_rank": True} | options
    return toolkit.adapt(build(network).to(dtype), method, **options)


def train(model, images, steps=4):
    """Some steps; returns the names of the parameters that had a gradient in the first two of them."""
    set_train_mode(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    labels = torch.arange(len(images)) % 10
    hooks = RankAllocation(model) if hasattr(getattr(model, "base_model", None), "rankallocator") else Hooks()
    hooks.begin(steps)
    moved = set()
    for step in range(1, steps + 1):
        loss = F.cross_entropy(model(images), labels)
        (loss + (hooks.penalty() or 0)).backward()
        if step <= 2:
            moved |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        hooks.after_step(step)
        optimizer.zero_grad()
    model.eval()
    return moved


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def networks(*methods):
    for network in ("small", *NETWORKS, PADDED):
        for method in methods:
            if network == PADDED and method not in ("lora", "ia3"):  # which alone know that way
                continue
            yield pytest.param(network, method, marks=[] if network == "small" else [pytest.mark.long])


@pytest.mark.parametrize("network, method", networks(*CONVOLUTIONAL))
def test_what_trains_and_nothing_else_changes(network, method):
    model = adapted(network, method)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = train(model, images_of(network))
    assert moved == trained
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name, _ in model.named_buffers()}
    assert changed - statistics <= trained
    # ranks that AdaLoRA took away end at 0, where they began
    assert all("lora_E" in name for name in trained - changed)
    assert bool(changed & statistics) == (METHODS[method].batch_norm == "updated")


# peft says these of AdaLoRA adapters that it saves and loads rightly, the second of layers without ranks.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")
@pytest.mark.parametrize("network, method", networks(*ADAPTERS))
def test_adapters_begin_as_nothing_and_are_merged_and_loaded_exactly(network, method, tmp_path):
    # The clipped ranks of AdaLoRA are more than plain peft can load.
    options = {"rank": 4, "clip_rank": False} if method == "adalora" else {}
    # In double precision, as some 50 layers make 1e-5 of float32's rounding.
    plain, images = build(network).double(), images_of(network).double()
    model = adapted(network, method, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        assert torch.equal(model(images), plain(images))
    train(model, images)
    with torch.no_grad():
        expected = model(images)
        assert relative(plain(images), expected) > 1e-3
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(build(network).double(), tmp_path).eval()
        assert relative(loaded(images), expected) < 1e-5
        for name, value in loaded.state_dict().items():  # depthwise weights and head too
            if "modules_to_save" in name:
                assert torch.equal(value, model.state_dict()[name])
        merged = merge(model)
        assert relative(merged(images), expected) < 1e-6
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_the_usual_targets_are_all_convolutions_but_the_stem():
    with torch.device("meta"):
        resnet, mobilenet = timm.create_model("resnet18"), timm.create_model("mobilenetv3_small_100")
    convolutions = [n for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)]
    assert targets_of(resnet, "lora") == Targets(tuple(convolutions[1:]), ("fc",))
    assert convolutions[0] == "conv1" and "layer2.0.downsample.0" in convolutions

    groups = {n: m.groups for n, m in mobilenet.named_modules() if isinstance(m, nn.Conv2d)}
    depthwise = tuple(n for n in groups if groups[n] > 1)
    others = tuple(n for n in groups if groups[n] == 1 and n != "conv_stem")
    assert "blocks.0.0.se.conv_reduce" in others and len(depthwise) == 11
    for method in LOW_RANK:
        assert targets_of(mobilenet, method, depthwise="train") == Targets(others, ("classifier", *depthwise))
        assert targets_of(mobilenet, method, depthwise="freeze") == Targets(others, ("classifier",))
    for method in ("ia3", "lokr"):
        assert set(targets_of(mobilenet, method).adapted) == {*others, *depthwise}


@pytest.mark.parametrize("depthwise", ["train", "freeze"])
def test_depthwise_convolutions_train_or_stay(depthwise):
    model = adapted("small", "lora", depthwise=depthwise)
    whole = {n for n in toolkit.summarize(model).names if "conv_dw" in n}
    assert len(whole) == (2 if depthwise == "train" else 0)


def test_the_size_of_adapters_on_resnet18():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=10)
    # per 3x3 layer: 4 of 64 to 64; then of each width one that doubles it and three more; downsampling 1x1
    pairs = [(64, 64, 9)] * 4
    for width in (128, 256, 512):
        pairs += [(width // 2, width, 9), (width // 2, width, 1)] + [(width, width, 9)] * 3
    head = 512 * 10 + 10
    expected = head + sum(4 * (a * k + b) for a, b, k in pairs)
    assert toolkit.summarize(toolkit.adapt(model, "lora", rank=4)).trainable == expected


def test_a_vision_transformer_keeps_its_linear_layers():
    """Its convolutions, as the grouped ones of TinyViT, are none of an adapter's business."""
    with torch.device("meta"):
        model = timm.create_model("tiny_vit_5m_224", num_classes=10)
    targets = targets_of(model, "lora", depthwise="train")
    assert targets.own == ("head.fc",)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in targets.adapted)


def test_chosen_targets():
    convolutions = {n for n, m in Small().named_modules() if isinstance(m, nn.Conv2d)}
    for pattern in (r"blocks\.[01]\..*conv_pw.*", r".*\.conv1", "blocks.3.*", ".*"):
        expected = {n for n in convolutions if re.fullmatch(pattern, n)}
        assert set(targets_of(Small(), "lokr", pattern).adapted) == expected != set()
    # what it matches of groups trains itself
    some = targets_of(Small(), "lora", ".*conv_.*", depthwise="train")
    assert not any("conv_dw" in n for n in some.adapted) and "blocks.0.conv_dw" in some.own


def state_of(model):
    return [(n, type(m), m.training) for n, m in model.named_modules()], [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]


REFUSED = [
    ("lora", {"targets": "conv("}, r"'conv\(' is not a regular expression"),
    ("lora", {"targets": "conv2"}, r"no module's whole name .* 2 layers end like it: .*\(\?:conv2"),
    ("lora", {"targets": "nothing"}, r"0 layers end like it: names look like stem, blocks\.0\.conv"),
    ("ia3", {"targets": r".*\.bn1"}, r"neither a linear layer .*only BatchNorm.*blocks\.0\.bn1"),
    ("lokr", {"targets": "head"}, "outside the head"),
    (
        "lora",
        {"targets": ".*", "depthwise": "freeze"},
        r"conv_dw, .* 16 groups.*ia3 or lokr, or depthwise",
    ),
    ("lora", {"targets": ".*conv_dw"}, "are convolutions with groups; choose ia3 or lokr"),
    (
        "lora",
        {"rank": 13},
        r"13 is above the 8 that .*reduce \(16 -> 8, 1x1\) .* at most 8, or clip_rank=T",
    ),
    ("adalora", {"rank": 6}, r"6 \(starts with 9\) is above the 8 that .* at most 5, or clip_rank=True"),
    ("adalora", {"rank": 500, "clip_rank": True}, "has none to move"),
    ("qlora", {}, r"linear layers only, and blocks\.0\.conv_pw is a convolution; choose lora or"),
    ("lora", {"depthwise": "tran"}, "unknown depthwise 'tran'. Did you mean 'train'"),
    ("linear", {"batch_norm": "frosen"}, "unknown batch_norm 'frosen'. Did you mean 'frozen'"),
    ("ia3", {"rank": 4}, "option of method 'ia3' 'rank'"),
]


@pytest.mark.parametrize("method, options, message", REFUSED)
def test_what_is_refused_is_refused_before_anything_changes(method, options, message):
    model = Small()
    before = state_of(model)
    with pytest.raises(InputError, match=message):
        toolkit.adapt(model, method, **options)
    assert state_of(model) == before


def test_a_name_that_is_also_the_end_of_others():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(InputError) as error:
        targets_of(model, "lora", "conv1")
    assert "end of 8 others (layer1.0.conv1" in str(error.value)
    one, several = re.findall(r"'([^']*conv1\$?)' for", str(error.value))
    assert targets_of(model, "lora", one).adapted == ("conv1",)
    assert len(targets_of(model, "lora", several).adapted) == 9


class WithArithmetic(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer, able",
    [
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2), {"adalora", "ia3", "lokr"}),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), {"ia3"}),
        (WithArithmetic(8, 8, 3, padding=1), set()),
    ],
)
@pytest.mark.parametrize("method", ADAPTERS)
def test_convolutions_that_peft_would_compute_wrongly(layer, able, method):
    model = Small()
    model.blocks.append(nn.Sequential(nn.Conv2d(24, 8, 1), layer, nn.Conv2d(8, 24, 1)))
    if method not in able:
        with pytest.raises(InputError, match=rf"blocks\.4\.1 .*{' or '.join(sorted(able))}"):
            targets_of(model, method)
        return
    options = {"rank": 4} if method in LOW_RANK else {}
    model = toolkit.adapt(model, method, targets=r"blocks\.4\.1", **options)
    train(model, images_of("small"))
    with torch.no_grad():
        expected = model(images_of("small"))
        assert relative(merge(model)(images_of("small")), expected) < 1e-5


def test_a_model_with_nothing_to_adapt():
    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def get_classifier(self):
            return self.head

    with pytest.raises(InputError, match="neither linear layers in blocks nor convolutions"):
        toolkit.adapt(Only(), "lora")


layers = st.one_of(
    st.builds(nn.Linear, st.integers(1, 12), st.integers(1, 12)),
    st.builds(nn.Conv2d, st.integers(1, 6), st.integers(1, 12), st.sampled_from([1, 3, (1, 3)])),
)


@settings(max_examples=50)
@given(layers, st.integers(1, 14))
def test_a_rank_is_too_high_where_it_is_above_that_of_the_weights(layer, rank):
    """Random weights have the highest rank that their shape allows."""
    most = int(torch.linalg.matrix_rank(torch.randn_like(layer.weight).flatten(1)))
    model, targets = nn.Sequential(layer), Targets(("0",), ())
    assert narrow_layers(model, targets, rank, clip=True) == ({"0": most} if rank > most else {})
    if rank > most:
        with pytest.raises(InputError, match=f"choose at most {most}, or clip_rank=True"):
            narrow_layers(model, targets, rank, clip=False)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_narrow_layers_take_what_they_allow_at_the_same_scale(method):
    rank, alpha = 14, 20
    model = toolkit.adapt(Small(), method, rank=rank, alpha=alpha, clip_rank=True)
    begins = 21 if method == "adalora" else rank
    found = set()
    for layer in model.modules():
        if not hasattr(layer, "lora_A"):
            continue
        base, r = layer.base_layer, layer.r["default"]
        most = min(base.out_channels, base.in_channels * math.prod(base.kernel_size))
        assert r == min(begins, most)
        a = layer.lora_A["default"]
        assert len(a if method == "adalora" else a.weight) == r
        scale = layer.scaling["default"] / (r if method == "adalora" else 1)
        assert scale == pytest.approx(alpha / begins)
        found.add(r == most)
    assert found == {True, False}


@pytest.mark.parametrize("options", [{"rank": 2}, {"rank": 6, "clip_rank": True}])
def test_adalora_moves_ranks_between_convolutions(options):
    model = Small()
    usual = targets_of(model, "adalora").adapted
    if "clip_rank" not in options:  # without the narrow ones
        options = options | {"targets": r".*(conv_pwl?|conv[12])"}
        usual = [n for n in usual if re.fullmatch(options["targets"], n)]
    allowed = narrow_layers(model, Targets(tuple(usual), ()), options["rank"], clip=True)
    model = toolkit.adapt(model, "adalora", **options)
    train(model, images_of("small"), steps=10)
    ranks = RankAllocation(model).ranks
    assert len(ranks) == len(usual)
    assert sum(ranks.values()) == sum(allowed.get(name, options["rank"]) for name in usual)
    values = {n: p for n, p in model.named_parameters() if "lora_E" in n}
    assert sum(int(p.count_nonzero()) for p in values.values()) == sum(ranks.values())


def test_the_penalty_of_convolutions_is_nought_for_orthogonal_factors():
    model = toolkit.adapt(Small(), "adalora", rank=2, targets=r"blocks\.[23]\.conv.*")
    allocation = RankAllocation(model)
    assert float(allocation.penalty().detach()) > 0.1
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                assert p.ndim == 2
                nn.init.orthogonal_(p)
    assert float(allocation.penalty().detach()) < 1e-5


@pytest.mark.parametrize("method", ["linear", "norm", "lora", "ia3", "full"])
@pytest.mark.parametrize("batch_norm", ["frozen", "updated"])
def test_statistics_of_batch_norms_move_if_they_are_to(method, batch_norm, tmp_path):
    model = adapted("small", method, batch_norm=batch_norm)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train(model, images_of("small"), steps=2)
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == (set(before) if batch_norm == "updated" else set())
    # and they are part of what is saved
    other = adapted("small", method, batch_norm=batch_norm).eval()
    toolkit.load_adapted(other, toolkit.save_adapted(model, tmp_path / "adapted.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(images_of("small")), model(images_of("small")))


def test_lokr_takes_nothing_from_the_random_numbers_of_a_run():
    """Nor does its path depend on values, so that it can be planned."""
    model = adapted("small", "lokr")
    set_train_mode(model)
    before = torch.get_rng_state()
    model(images_of("small")).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    batch = (images_of("small"), torch.zeros(4, dtype=torch.long))
    assert toolkit.plan(model, "1GB", batch, strategy="none").peak_bytes > 0


def test_norm_trains_weights_and_biases_of_batch_norms():
    model = adapted("small", "norm")
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    expected = {f"{n}.{p}" for n in norms for p in ("weight", "bias")} | {"head.weight", "head.bias"}
    assert set(toolkit.summarize(model).names) == expected and len(norms) == 10


def test_one_image_whose_batch_norms_have_one_value():
    model = adapted("small", "full")  # 32 pixels become 4 in the last blocks
    check_batch_norms(model, [64, 1], (3, 32, 32))
    with pytest.raises(InputError, match=r"^blocks\.3\.bn1 .*8 x 8 pixels.*\(64 does\).*batch_norm='frozen'"):
        check_batch_norms(model, [1, 64], (3, 8, 8))
    set_train_mode(model)
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # that is what it is for
        model(torch.randn(1, 3, 8, 8))
    check_batch_norms(model, [2, 64], (3, 8, 8))
    model(torch.randn(2, 3, 8, 8))
    check_batch_norms(adapted("small", "lora"), [1], (3, 8, 8))
    with pytest.raises(InputError, match="single value"):
        check_batch_norms(adapted("small", "lora", batch_norm="updated"), [1], (3, 8, 8))


def test_the_check_leaves_the_model_as_it_was():
    model = adapted("small", "full").eval()
    before, state = state_of(model), {n: v.clone() for n, v in model.state_dict().items()}
    check_batch_norms(model, [1], (3, 32, 32))
    assert state_of(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("network, method", networks(*CONVOLUTIONAL))
def test_planned_keeps_its_budget(network, method):
    """Half-way between the least that any plan takes and what the step takes as it is."""
    model = adapted(network, method)
    set_train_mode(model)
    pixels = 32 if network == "small" else 64
    batch = torch.randn(8, 3, pixels, pixels), torch.arange(8)
    chosen = METHODS[method]
    optimizer = chosen.make_optimizer(model, chosen.options(), lr=1e-3, weight_decay=0.05)
    planner = Planner(model, batch, optimizer=optimizer)
    stock_bytes = toolkit.plan(model, "4GB", batch, strategy="none", optimizer=optimizer).peak_bytes
    budget = (planner.smallest_bytes() + stock_bytes) // 2
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*model.parameters(), *model.buffers(), *batch])
    with toolkit.auto_checkpoint(model, budget, batch, optimizer=optimizer) as handle:
        for _ in range(2):
            with memory:
                F.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert memory.peak_bytes <= handle.plan.peak_bytes <= budget
