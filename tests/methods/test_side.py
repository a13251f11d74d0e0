"""Side methods start from the linear probe, train all that they add, and keep nothing of the backbone."""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import toolkit
from toolkit.backbones import data_config
from toolkit.budget import Checkpointing, TensorMemory, find_blocks, tensors_of
from toolkit.budget.own_checkpoints import own_checkpoints_off
from toolkit.budget.plan import Planner
from toolkit.errors import InputError
from toolkit.methods import adapt, set_train_mode
from toolkit.methods.losa import Mixer
from toolkit.methods.weights import load_adapted, save_adapted

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "budget")]
from test_plan import HUGE, assert_same_step, measured_peak  # noqa: E402

METHODS = ("losa", "lst", "dtl")


def timm_model(name, **sizes):
    model = timm.create_model(name, num_classes=5, **sizes)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    return model


def build(name):
    """A backbone with random weights from seed 0."""
    toolkit.seed_everything(0)
    if name == "swin":
        sizes = {"embed_dim": 24, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}
        return timm_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **sizes)
    if name == "resnet18":
        return timm_model("resnet18", zero_init_last=False)
    return toolkit.build_backbone(name, 5, pretrained=False)


FAST = ("demo_vit", "demo_cnn")
ALL = [
    *FAST,
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            "swin",
            "resnet18",
            "small:vit_small",
            "small:tiny_vit",
            "small:vim_small",
            "small:mambavision_t",
        )
    ),
]


def side(name, method, **options):
    model = adapt(build(name), method, **options)
    set_train_mode(model)
    return model


def batch_for(model, size=2):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, *data_config(model)["input_size"], generator=generator)
    return images, torch.arange(size) % 5


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(model, images, labels, optimizer):
    """One training step; returns the gradients."""
    F.cross_entropy(model(images), labels).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALL)
def test_training_starts_from_the_linear_probe_and_reaches_every_parameter(name, method):
    model = side(name, method)
    images, labels = batch_for(model)
    probe = adapt(build(name), "linear").eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(images), probe(images))
    set_train_mode(model)
    frozen = {name: p.clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3)
    first, second = (step(model, images, labels, optimizer) for _ in range(2))
    assert first.keys() == second.keys() == trained(model).keys()
    assert not any(key.startswith("backbone.") for key in first)
    silent = [key for key in first if not first[key].any() and not second[key].any()]
    assert not silent
    assert all(torch.equal(p, frozen[key]) for key, p in model.backbone.named_parameters())
    with torch.no_grad():
        assert not torch.equal(model.eval()(images), probe(images))


class Made(TorchDispatchMode):
    """Holds all tensors that are made while it is entered."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors += [leaf for leaf in tree_iter(out) if isinstance(leaf, torch.Tensor)]
        return out


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


def saved_tensors(model, images):
    """What autograd saves in a forward pass; and logits."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images)
    return saved, logits


def leaves_of(tensor):
    """The parameters that the graph of `tensor` leads to."""
    found, stack, seen = [], [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [other for other, _ in node.next_functions]
    return found


@pytest.mark.parametrize("method", ["losa", "lst"])
@pytest.mark.parametrize("name", ALL)
def test_nothing_of_the_backbone_is_in_the_graph(name, method):
    """But the taps themselves, where a trained projection reads them."""
    model = side(name, method)
    images, _ = batch_for(model)
    made, compute, taps = Made(), model.features, []

    def features(images):
        with made:
            found = compute(images)
        taps.extend(found)
        return found

    model.features = features
    saved, logits = saved_tensors(model, images)
    inside = storages([*made.tensors, *tensors_of(model.backbone)])
    if method == "lst" or len(set(model.taps.widths)) > 1:
        inside -= storages(taps)
    assert saved and made.tensors and not inside & storages(saved)
    assert {id(leaf) for leaf in leaves_of(logits)} == {id(p) for p in trained(model).values()}
    logits.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())


def test_dtl_keeps_nothing_of_the_blocks_before_feedback():
    model = side("demo_vit", "dtl", feedback=2)
    images, _ = batch_for(model)
    made = {}
    for name, block in find_blocks(model.backbone).items():
        made[name] = Made()

        def run(*args, forward=block.forward, mode=made[name]):
            with mode:
                return forward(*args)

        block.forward = run
    saved, logits = saved_tensors(model, images)
    kept = {name: len(storages(mode.tensors) & storages(saved)) for name, mode in made.items()}
    # What a block returns is read by the path; the last one, whose input has a gradient, is run through.
    assert kept["blocks.0"] <= 1 and kept["blocks.1"] <= 1 and kept["blocks.2"] == 0
    assert kept["blocks.3"] > 5
    assert not {id(p) for p in model.backbone.parameters()} & {id(leaf) for leaf in leaves_of(logits)}


def test_dtl_computes_what_its_formula_says():
    model = side("demo_vit", "dtl", rank=4, feedback=3).eval()
    reference = copy.deepcopy(model)
    for update in (*model.side, *reference.side):
        nn.init.normal_(update[1].weight, std=0.2, generator=torch.Generator().manual_seed(1))
    images, _ = batch_for(model)
    backbone, h = reference.backbone, 0
    x = backbone.patch_embed(images)
    x = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(x)))
    for i, block in enumerate(backbone.blocks):
        h = h + reference.side[i](x)
        x = block(x) + (h * torch.sigmoid(100 * h) if i >= 1 else 0)
    expected = reference.head.forward_head(backbone.norm(x))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_stays_in_evaluation_mode():
    for method in METHODS:
        model = side("demo_cnn", method)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        images, labels = batch_for(model, 8)
        assert model.training and not any(module.training for module in model.backbone.modules())
        assert model.head.training and model.side.training
        step(model, images, labels, torch.optim.AdamW(trained(model).values()))
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        assert model.get_classifier() is model.head.classifier


@pytest.mark.parametrize("method", METHODS)
def test_saved_weights_are_the_small_part_and_bring_the_model_back(method, tmp_path):
    model = side("demo_vit", method)
    images, labels = batch_for(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    for _ in range(2):
        step(model, images, labels, optimizer)
    path = save_adapted(model, tmp_path / "adapted.safetensors")
    assert path.stat().st_size < 0.2 * sum(p.numel() * 4 for p in model.parameters())
    other = side("demo_vit", method)
    load_adapted(other, path)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize("method", ["losa", "lst"])
def test_features_and_what_reads_them_are_the_model(method):
    model = side("demo_cnn", method, taps=3)
    images, _ = batch_for(model)
    features = model.features(images)
    assert len(features) == 4 and not any(f.requires_grad or f.is_inference() for f in features)
    assert all(f.shape[:2] == (2, 16) for f in features)
    assert torch.equal(model.from_features(features), model(images))


def test_taps_are_let_go_when_they_have_been_read():
    model = side("demo_vit", "losa")
    compute, references, alive = model.features, [], []

    def features(images):
        found = compute(images)
        references.extend(weakref.ref(f.untyped_storage()) for f in found)
        return found

    model.features = features
    for mixer in model.side.mixers:
        mixer.register_forward_hook(lambda *_: alive.append(sum(r() is not None for r in references[:-1])))
    logits = model(batch_for(model)[0])
    gc.collect()
    # Each mixer's own tap is still an argument of its call.
    assert alive == [4, 3, 2, 1] and logits.requires_grad


def mixed(b, y, w1, b1, w2, v1, c1, v2):
    """y + g(b + y) of arXiv 2402.02887 as `losa` reads it, by other operators."""

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    channels = F.gelu(norm(b + y) @ w1.t() + b1) @ w2.t()
    tokens = (F.gelu(norm(b + y + channels).transpose(1, 2) @ v1.t() + c1) @ v2.t()).transpose(1, 2)
    return y + channels + tokens


def test_the_mixer_computes_what_its_formula_says():
    torch.manual_seed(0)
    mixer = Mixer(5, 5, 3, 2).double()
    b, y = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    for layer in (mixer.channels_out, mixer.tokens_out):
        nn.init.normal_(layer.weight)
    parts = (mixer.channels_in, mixer.channels_out, mixer.tokens_in, mixer.tokens_out)
    parameters = [p for part in parts for p in part.parameters()]
    found, expected = mixer(b, y), mixed(b, y, *parameters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), [b, y, *parameters]),
        torch.autograd.grad(expected.square().sum(), [b, y, *parameters]),
    )


def test_a_mixer_keeps_one_tensor_of_full_size():
    model = side("demo_vit", "losa", rank=8)
    saved, _ = saved_tensors(model, batch_for(model, 4)[0])
    own = storages(tensors_of(model))
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    full = 4 * 17 * 96 * 4
    head = 4 * 17 * 96 * 4 + 2 * 4 * 5 * 4  # what is pooled is a view of all tokens
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    assert 4 * full <= total <= 4 * full + head


def test_autocast_computes_mixers_in_its_type():
    model = side("demo_vit", "losa").eval()
    for mixer in model.side.mixers:
        for layer in (mixer.channels_out, mixer.tokens_out):
            nn.init.normal_(layer.weight, std=0.02)
    images, labels = batch_for(model, 8)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        saved, logits = saved_tensors(model, images)
        F.cross_entropy(logits, labels).backward()
    torch.testing.assert_close(logits.float(), exact, rtol=0.1, atol=0.1)
    assert sum(t.dtype is torch.bfloat16 and t.shape == (8, 17, 96) for t in saved) == 4
    assert all(p.grad.dtype is torch.float32 for p in trained(model).values())


@pytest.mark.parametrize(
    "method", ["losa", *(pytest.param(m, marks=pytest.mark.long) for m in ("lst", "dtl"))]
)
def test_planned_training_takes_what_was_predicted(method):
    def model():
        return side("small:vit_small", method)

    batch = batch_for(model(), 4)
    planner = Planner(model(), batch, lean=False)
    unplanned = planner.chain(4, False).solve(HUGE).peak_bytes
    with own_checkpoints_off():  # of LoSA's mixers: a plan decides what is computed again
        assert unplanned == measured_peak(model(), batch)
    smallest = planner.smallest_bytes()
    for budget in {smallest, (smallest + unplanned) // 2}:
        made = planner.plan(budget)
        with own_checkpoints_off():
            assert measured_peak(model(), batch, made) <= made.peak_bytes <= budget
            assert_same_step(model, batch, made)


@pytest.mark.long
def test_maps_are_planned_too():
    """Early taps die in the forward pass, and what a mixer returns when the next has read it."""
    batch = batch_for(build("demo_cnn"), 4)
    predicted = Planner(side("demo_cnn", "losa"), batch, lean=False).chain(4, False).solve(HUGE).peak_bytes
    assert predicted == measured_peak(side("demo_cnn", "losa"), batch)


@pytest.mark.parametrize("method", METHODS)
def test_other_checkpointing_changes_no_gradient(method):
    images, labels = batch_for(build("demo_vit"))
    grads = {}
    for strategy in ("none", "static", "threshold"):
        model = side("demo_vit", method)
        memory = TensorMemory(torch.device("cpu"))
        with Checkpointing(model, strategy, memory=memory, budget_bytes=1):
            grads[strategy] = step(model, images, labels, torch.optim.AdamW(trained(model).values()))
    for strategy in ("static", "threshold"):
        assert all(torch.equal(grads["none"][key], value) for key, value in grads[strategy].items())


@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_of_four_bits_trains_too(method):
    pytest.importorskip("bitsandbytes")
    model = side("demo_vit", method, four_bit=True)
    packed = [p for p in model.backbone.parameters() if hasattr(p, "quant_state")]
    assert len(packed) == 4 * 4
    images, labels = batch_for(model)
    saved, logits = saved_tensors(model, images)
    if method != "dtl":
        assert not storages(saved) & storages(packed)
    F.cross_entropy(logits, labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())


def test_bad_options_are_named():
    cases = {
        "rank must lie between 1 and 4096, got 0": ("losa", {"rank": 0}),
        "reduction 7 does not divide the 96 channels": ("lst", {"reduction": 7}),
        "feedback is 5, and the path of VisionTransformer has 4 blocks": ("dtl", {"feedback": 5}),
        "taps must lie between 0 and 10000, got -1": ("lst", {"taps": -1}),
        "taps is 5, and VisionTransformer has 4 blocks": ("lst", {"taps": 5}),
    }
    for message, (method, options) in cases.items():
        with pytest.raises(InputError) as error:
            adapt(build("demo_vit"), method, **options)
        assert message in str(error.value)
    with pytest.raises(InputError, match=r"four_bit packs linear layers, and .* have none"):
        adapt(build("demo_cnn"), "losa", four_bit=True)


def test_dtl_is_on_the_last_stage_of_a_hierarchy():
    assert side("swin", "dtl").names == ["layers.3.blocks.0", "layers.3.blocks.1"]
    assert side("demo_cnn", "dtl").names == ["blocks.3.0"]  # which changes the width


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_never_allocated_is_planned_like_a_real_one(method):
    real = side("small:vit_small", method)
    with torch.device("meta"):
        meta = side("small:vit_small", method)
        batch = batch_for(real)[0].to("meta"), torch.empty(2, dtype=torch.long)
    assert all(p.is_meta for p in meta.parameters())
    peaks = [
        toolkit.plan(model, HUGE, one, strategy="none").peak_bytes
        for model, one in ((real, batch_for(real)), (meta, batch))
    ]
    assert peaks[0] == peaks[1] > 0


@pytest.mark.long
def test_a_vit_small_keeps_a_fraction_for_backward():
    """The batch is 8 images in fp32; low-rank updates of all linear layers keep about 449 MiB."""
    import side as benchmark

    kept = {}
    for method in ("losa", "lst"):
        model = benchmark.built("vit_small", method)
        kept[method] = benchmark.kept_bytes(model, benchmark.batch_for(model, 8)[0]) / 2**20
    assert 27 < kept["losa"] < 40 and kept["lst"] < 119


@pytest.mark.long
def test_a_billion_parameters_train_in_little_more_than_inference_takes():
    """vit_giant_patch14_224, one image: nothing is allocated."""
    import side as benchmark

    found = benchmark.at_scale(batch_size=1)
    assert found.parameters > 1e9 and found.inference_peak_bytes > 4e9
    assert found.training_peak_bytes < 1.1 * found.inference_peak_bytes
