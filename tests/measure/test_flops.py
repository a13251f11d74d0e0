"""FLOPs against formulas worked out by hand, two per multiply-add."""

import copy
import dataclasses

import bitsandbytes as bnb
import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d
from transformers.modeling_outputs import SequenceClassifierOutput

import toolkit
from toolkit.backbones.selective_scan import selective_scan, selective_scan_flops
from toolkit.errors import InputError
from toolkit.measure import FlopCounter, flops

torch.manual_seed(0)


class Trained(nn.Module):
    """`layer` behind a trained scale, so that it owes its input a gradient as inner layers do."""

    def __init__(self, layer):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(1)), layer

    def forward(self, x):
        return self.layer(x * self.scale)


class Attention(nn.Module):
    """Scaled dot-product attention of three inputs stacked in one tensor (3, B, H, N, D)."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, qkv):
        return F.scaled_dot_product_attention(*qkv, **self.options)


def frozen(layer):
    return layer.requires_grad_(False)


def lora(layer, rank):
    """Frozen `layer` with peft's LoRA."""
    model = nn.Sequential()
    model.add_module("layer", layer)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["layer"]))


def four_bit(layer):
    quantised = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
    quantised.load_state_dict(layer.state_dict())
    return frozen(quantised.to("cpu"))


# Name: layer, input shape, multiply-adds of the forward pass, and of the backward pass.
CASES = {
    "linear": (nn.Linear(20, 30), (8, 20), 8 * 20 * 30, 2 * 8 * 20 * 30),
    "linear without bias": (nn.Linear(20, 30, bias=False), (8, 20), 4800, 9600),
    "linear on tokens": (nn.Linear(20, 30), (2, 7, 20), 14 * 600, 28 * 600),
    "linear on one vector": (nn.Linear(20, 30), (20,), 600, 1200),
    "frozen linear": (frozen(nn.Linear(20, 30)), (8, 20), 4800, 4800),
    "linear, bias trained": (nn.Linear(20, 30), (8, 20), 4800, 4800),
    "conv 3x3": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), 2 * 64 * 6 * 4 * 9, 4 * 64 * 6 * 4 * 9),
    "conv 1x1": (nn.Conv2d(4, 6, 1), (2, 4, 8, 8), 2 * 64 * 24, 4 * 64 * 24),
    "conv, stride 2": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 16 * 216, 4 * 16 * 216),
    "conv, dilated": (nn.Conv2d(4, 6, 3, dilation=2), (1, 4, 8, 8), 16 * 216, 32 * 216),
    "conv, no padding": (nn.Conv2d(4, 6, (3, 1)), (1, 4, 8, 8), 48 * 72, 96 * 72),
    "conv, 2 groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 8, 8), 2 * 64 * 108, 4 * 64 * 108),
    "conv, 4 groups, stride 2": (
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), (3, 8, 8, 8), 3 * 16 * 288, 6 * 16 * 288,
    ),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 8, 8), 2 * 64 * 54, 4 * 64 * 54),
    "depthwise, twice as wide": (nn.Conv2d(6, 12, 5, padding=2, groups=6), (1, 6, 8, 8), 64 * 300, 128 * 300),
    "frozen depthwise": (
        frozen(nn.Conv2d(6, 6, 3, padding=1, groups=6)), (2, 6, 8, 8), 2 * 64 * 54, 2 * 64 * 54,
    ),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 8, 8), 2 * 64 * 216, 4 * 64 * 216),
    "transposed conv, 2 groups": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (1, 4, 8, 8), 64 * 108, 128 * 108,
    ),
    "conv 1d, depthwise": (nn.Conv1d(6, 6, 4, groups=6), (2, 6, 19), 2 * 16 * 24, 4 * 16 * 24),
    "conv 3d": (nn.Conv3d(2, 3, 2), (1, 2, 5, 5, 5), 64 * 48, 128 * 48),
    "attention": (Attention(), (3, 2, 4, 10, 8), 2 * 4 * 10 * 10 * 16, 4 * 4 * 10 * 10 * 16),
    "attention, causal": (Attention(is_causal=True), (3, 1, 2, 12, 8), 2 * 144 * 16, 4 * 144 * 16),
    "attention, masked": (
        Attention(attn_mask=torch.ones(10, 10).tril().bool()), (3, 2, 4, 10, 8), 8 * 1600, 16 * 1600,
    ),
    "LoRA of a linear": (
        # Backward: the input gradient through the frozen layer and A, B's input gradient, and both weights.
        lora(nn.Linear(20, 30), 2), (8, 20), 8 * (600 + 40 + 60), 8 * (600 + 40 + 60 + 40 + 60),
    ),
    "LoRA of a conv": (
        lora(nn.Conv2d(4, 6, 3, padding=1), 2), (2, 4, 8, 8),
        128 * (216 + 72 + 12), 128 * (216 + 72 + 12 + 72 + 12),
    ),
    "4-bit linear": (four_bit(nn.Linear(128, 64, bias=False)), (8, 128), 8 * 128 * 64, 8 * 128 * 64),
    "4-bit linear with LoRA": (
        lora(four_bit(nn.Linear(128, 64, bias=False)), 4), (8, 128),
        8 * (8192 + 512 + 256), 8 * (8192 + 512 + 256 + 512 + 256),
    ),
    "self-attention layer": (
        nn.MultiheadAttention(16, 4, batch_first=True), (2, 10, 16),
        20 * 16 * 48 + 2 * 100 * 32 + 20 * 16 * 16, 2 * (20 * 16 * 48 + 2 * 100 * 32 + 20 * 16 * 16),
    ),
    "activations, dropout, pooling": (
        nn.Sequential(nn.GELU(), nn.Dropout(0.1), nn.AvgPool2d(2), nn.Softmax(1)), (1, 4, 8, 8), 0, 0,
    ),
}  # fmt: skip
CASES["linear, bias trained"][0].weight.requires_grad_(False)


class SelfAttention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("name", CASES)
def test_layers_by_hand(name):
    layer, shape, forward, backward = CASES[name]
    layer = SelfAttention(layer) if isinstance(layer, nn.MultiheadAttention) else layer
    model = Trained(layer).train()
    count = flops(model, torch.randn(shape))
    assert (count.forward, count.backward, count.recompute) == (2 * forward, 2 * backward, 0)
    assert count.macs == forward and count.total == 2 * (forward + backward)


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_has_the_same_flops(name):
    layer, shape, forward, backward = CASES[name]
    layer = SelfAttention(layer) if isinstance(layer, nn.MultiheadAttention) else layer
    model = Trained(copy.deepcopy(layer)).train()
    with FlopCounter() as counter:
        model(torch.randn(shape)).sum().backward()
    assert (counter.flops.forward, counter.flops.backward) == (2 * forward, 2 * backward)


def test_the_first_layer_has_no_input_gradient():
    count = flops(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)), torch.randn(1, 3, 10, 10))
    assert count.backward == 2 * 64 * (8 * 27 + 2 * 64)


def test_layers_below_the_first_trained_one_have_no_backward_flops():
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5))
    net[:3].requires_grad_(False)
    count = flops(net, torch.randn(4, 10))
    assert count.forward == 2 * 4 * 250 and count.backward == 2 * 4 * 50
    assert flops(net.requires_grad_(False), torch.randn(4, 10)).backward == 0


def test_attention_costs_the_same_in_every_kernel():
    qkv = torch.randn(3, 2, 4, 10, 8, requires_grad=True)
    counts = []
    for backend in (torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        with torch.nn.attention.sdpa_kernel(backend), FlopCounter() as counter:
            F.scaled_dot_product_attention(*qkv).sum().backward()
        counts.append((counter.flops.forward, counter.flops.backward))
    assert counts[0] == counts[1]


NORM_CASES = {
    "batch norm": (nn.BatchNorm2d(6), 8, 7),
    "batch norm, no affine": (nn.BatchNorm2d(6, affine=False), 6, 7),
    "batch norm, frozen": (frozen(nn.BatchNorm2d(6)).eval(), 2, 1),
    "batch norm, running statistics, trained": (nn.BatchNorm2d(6).eval(), 2, 4),
    "layer norm": (nn.LayerNorm(8), 8, 11),
    "layer norm, frozen": (frozen(nn.LayerNorm(8)), 8, 8),
    "group norm": (nn.GroupNorm(2, 6), 8, 11),
}


@pytest.mark.parametrize("name", NORM_CASES)
def test_norms_by_hand(name):
    norm, forward, backward = NORM_CASES[name]
    count = flops(Trained(norm), torch.randn(2, 6, 8, 8))
    assert (count.forward, count.backward) == (forward * 768, backward * 768)
    assert count.macs == 0, "NetScore's multiply-adds are those of products"


@pytest.mark.parametrize(
    ("name", "published_gflop"),
    [("resnet18", 10.72), ("mobilenetv2_100", 1.87), ("mobilenetv3_large_100", 1.36)],
)
def test_full_fine_tuning_step_of_the_edge_networks(name, published_gflop):
    """The figures of a groups-aware recount of arXiv 2507.23536's models; batch 1, 224 px."""
    model = timm.create_model(name).train()
    count = flops(model, torch.randn(1, 3, 224, 224))
    assert count.total / 1e9 == pytest.approx(published_gflop, rel=0.01)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(c.groups > 1 for c in convolutions) == ("mobilenet" in name)


def test_multiply_adds_of_a_vit():
    """ViT-S/16: 12 blocks of 12·N·D² + 2·N²·D, the patch embedding and the head."""
    n, d = 197, 384
    expected = 12 * (12 * n * d * d + 2 * n * n * d) + 196 * d * 768 + d * 1000
    assert flops(timm.create_model("vit_small_patch16_224"), torch.randn(1, 3, 224, 224)).macs == expected


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant=False):
        super().__init__()
        self.first, self.body, self.reentrant = nn.Linear(16, 16), body, reentrant

    def forward(self, x):
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_counted_separately(reentrant):
    """torch's own checkpoint stops before the last product, whose output backward does not need; the
    reentrant one repeats everything."""
    body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    count = flops(Checkpointed(body, reentrant), torch.randn(4, 16))
    forward = 2 * 4 * (256 + 512 + 512)
    assert count.forward == forward and count.backward == 2 * forward - 2 * 4 * 256
    assert count.recompute == 2 * 4 * 512 * (2 if reentrant else 1)


class Square(torch.autograd.Function):
    """x @ x, whose backward needs x only: its forward runs without gradients, in recomputation too."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad @ x.T + x.T @ grad


def test_recomputation_inside_an_autograd_function_is_recomputation():
    class Body(nn.Module):
        def forward(self, x):
            return Square.apply(Square.apply(x)).relu()

    net = Checkpointed(Body())
    count = flops(net, torch.randn(16, 16))
    assert count.recompute == 2 * 2 * 16**3, "both products are needed again: the ReLU keeps its output"
    assert count.backward == 2 * (4 * 16**3 + 16**3)


def test_checkpointed_backbones_recompute_less_than_a_forward_pass(demo_model, batch):
    from toolkit.budget import Checkpointing, device_memory

    model = demo_model("lora")
    plain = flops(model, batch)
    memory = device_memory(torch.device("cpu"))
    with Checkpointing(model, "static", memory=memory, budget_bytes=1):
        static = flops(model, batch)
    assert plain.recompute == 0 < static.recompute < plain.forward
    assert (static.forward, static.backward) == (plain.forward, plain.backward)


def test_counting_leaves_no_trace(demo_model, batch):
    model = timm.create_model("tiny_vit_5m_224", num_classes=10).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    torch.manual_seed(3)
    flops(model.train(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    flops(model.eval(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)), "the random state is as it was"
    assert all(a is b and a.grad is None for a, b in zip(parameters, model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 224, 224)).isfinite().all(), "no fake tensor was left in a cache"


def test_batches_may_be_tensors_pairs_and_dicts():
    net = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    expected = flops(net, x)
    assert flops(net, (x, torch.zeros(3))) == flops(net, {"input": x}) == expected
    assert toolkit.flops(net, [x, torch.zeros(3)]) == expected

    class Product(nn.Module):
        def forward(self, a, b):
            return a @ b

    assert flops(Product(), ((x, torch.randn(4, 5)), torch.zeros(3))).forward == 2 * 3 * 4 * 5


@dataclasses.dataclass
class Fields:
    first: torch.Tensor
    rest: dict
    count: int = 3


PACKINGS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, (b,)],
    "dict": lambda a, b: {"a": a, "index": a.argmax(), "b": b},
    "dataclass": lambda a, b: Fields(a, {"b": [b]}),
    "ModelOutput": lambda a, b: SequenceClassifierOutput(logits=a, hidden_states=(b,)),
    "with a loss": lambda a, b: SequenceClassifierOutput(loss=a.sum(), logits=a, hidden_states=(b,)),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_backward_starts_at_every_output(name):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(20, 30), nn.Linear(20, 7)

        def forward(self, x):
            return PACKINGS[name](self.one(x), self.other(x))

    count = flops(Trained(TwoHeads()), torch.randn(8, 20))
    assert (count.forward, count.backward) == (2 * 8 * 20 * 37, 4 * 8 * 20 * 37)


def test_outputs_without_real_numbers_are_an_error_that_names_their_type():
    class Classes(nn.Linear):
        def forward(self, x):
            return {"class": super().forward(x).argmax(1)}

    with pytest.raises(InputError, match="returns dict, which holds no tensor of real numbers"):
        flops(Classes(4, 4), torch.randn(2, 4))


@torch.library.custom_op("tests::gram", mutates_args=())
def gram(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


@gram.register_fake
def _(x):
    return x @ x.mT


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset, self.conv = nn.Conv2d(4, 18, 3, padding=1), DeformConv2d(4, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x))


class Paired(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


class Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# Name: model, input shape, uncounted operators and their calls.
UNCOUNTED = {
    "custom operator": (Applied(lambda x: gram(gram(x.detach()))), (5, 5), {"tests.gram": 2}),
    "deformable convolution": (
        Deformable(), (2, 4, 8, 8),
        {"torchvision.deform_conv2d": 1, "torchvision._deform_conv2d_backward": 1},
    ),
    "Fourier transform": (Applied(torch.fft.rfft), (4, 8), {"aten._fft_r2c": 1, "aten._fft_c2c": 1}),
    "inverse": (Applied(lambda x: torch.inverse(x.detach())), (4, 4), {"aten.linalg_inv_ex": 1}),
    "bilinear": (Paired(nn.Bilinear(8, 8, 4)), (3, 8), {"aten._trilinear": 4}),
    "8-bit product": (
        Applied(lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8)).float()), (32, 32),
        {"aten._int_mm": 1},
    ),
    "elementwise": (
        nn.Sequential(nn.Softmax(1), nn.RMSNorm(8), nn.Upsample(16, mode="bilinear"), nn.Flatten(0, 2),
                      nn.GRUCell(16, 4)),
        (1, 1, 8, 8), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOUNTED)
def test_products_without_a_formula_are_named(name):
    model, shape, expected = UNCOUNTED[name]
    count = flops(Trained(model), torch.randn(shape))
    assert count.uncounted == expected
    assert all(operator in str(count) for operator in expected)


@pytest.mark.parametrize("name", CASES | NORM_CASES)
def test_layers_with_a_formula_leave_nothing_uncounted(name):
    layer, shape, *_ = CASES.get(name, (NORM_CASES.get(name, [None])[0], (2, 6, 8, 8)))
    layer = SelfAttention(layer) if isinstance(layer, nn.MultiheadAttention) else layer
    assert flops(Trained(layer), torch.randn(shape)).uncounted == {}


def test_a_path_that_depends_on_values_is_an_error_that_names_the_alternative():
    class Picky(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(InputError, match="Picky cannot run on fake tensors"):
        flops(Picky(4, 4), torch.randn(2, 4))


def test_given_formulas_replace_built_in_ones():
    with FlopCounter({"aten.addmm": lambda *arguments, out_val: 7}) as counter:
        nn.Linear(3, 3)(torch.randn(2, 3))
    assert counter.flops.by_operator == {"forward": {"aten.addmm": 7}}


def test_inference_mode_is_counted_too():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    with torch.inference_mode(), FlopCounter() as counter:
        net(torch.randn(2, 3, 8, 8))
    assert counter.flops.forward == 2 * 2 * (36 * 8 * 27 + 2880)


@pytest.mark.parametrize("layer", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_fused_attention_in_evaluation_is_decomposed(layer):
    net = layer(16, 4, batch_first=True).eval()
    x = torch.randn(2, 10, 16)
    inputs = (x, x, x) if layer is nn.MultiheadAttention else (x,)
    with torch.inference_mode(), FlopCounter() as counter:
        net(*inputs)
    assert counter.flops.macs == flops(net, (inputs, None)).macs > 2 * 100 * 32
    assert torch.backends.mha.get_fastpath_enabled()


class Number:
    """A float that counts the arithmetic done with it."""

    done = 0

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        Number.done += 1
        return Number(self.value + other.value)

    def __mul__(self, other):
        Number.done += 1
        return Number(self.value * other.value)

    def exp(self):
        return Number(1.0)


@settings(max_examples=20)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_selective_scan_by_counting_every_operation(batch, channels, length, states):
    """The recurrence and its gradients written out; sums begin with an addition to zero."""

    def numbers(*shape):
        return Number(0.5) if not shape else [numbers(*shape[1:]) for _ in range(shape[0])]

    Number.done = forward = backward = 0
    for _ in range(batch):
        for _ in range(channels):
            a, d, h = numbers(states), Number(1.0), numbers(states)
            da, dd, dh = numbers(states), Number(0.0), numbers(states)
            for _ in range(length):
                u, dt, b, c, y, g = (
                    Number(1.0),
                    Number(1.0),
                    numbers(states),
                    numbers(states),
                    Number(0.0),
                    Number(1.0),
                )
                before = Number.done
                dtu = dt * u
                keep = []
                for n in range(states):
                    keep.append((dt * a[n]).exp())
                    h[n] = keep[n] * h[n] + dtu * b[n]
                    y = y + c[n] * h[n]
                y = y + d * u
                forward += Number.done - before
                before = Number.done
                db, dc, ddtu, ddt = numbers(states), numbers(states), Number(0.0), Number(0.0)
                for n in range(states):
                    dc[n] = dc[n] + g * h[n]
                    dh[n] = dh[n] + g * c[n]
                    dkeep = dh[n] * h[n]
                    inner = dkeep * keep[n]
                    ddt = ddt + inner * a[n]
                    da[n] = da[n] + inner * dt
                    db[n] = db[n] + dh[n] * dtu
                    ddtu = ddtu + dh[n] * b[n]
                    dh[n] = dh[n] * keep[n]
                ddt = ddt + ddtu * u
                du = ddtu * dt + g * d
                dd = dd + g * u
                backward += Number.done - before
                assert du
    assert selective_scan_flops(batch, channels, length, states) == (forward, backward)


def test_scan_operators_are_counted_by_their_shapes():
    """Work that a kernel repeats internally does not count."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.zeros(6, 4))

        def forward(self, x):
            states = x[:, :4]
            return selective_scan(x, x, self.a, states, states).relu()

    layer = Layer()
    forward, backward = selective_scan_flops(2, 6, 9, 4)
    assert (forward, backward) == (108 * 27, 108 * 67)
    count = flops(Trained(layer), torch.randn(2, 6, 9))
    assert (count.forward, count.backward, count.recompute) == (forward, backward, 0)

    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    count = flops(Trained(Repeated()), torch.randn(2, 6, 9))
    assert (count.forward, count.backward, count.recompute) == (forward, backward, forward)
