"""Lean low-rank convolutions are peft's: the same function in less memory."""

import copy
import warnings

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_step import CPU, assert_close, fill, net, step
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

import toolkit
from toolkit.budget import LeanForms, TensorMemory
from toolkit.budget.plan import Planner, plan
from toolkit.methods.lean import LeanLoraConv, norm_of_sum

pytestmark = pytest.mark.numerical

HUGE = 1 << 50


TUNERS = ["lora", "dora", "adalora"]


def adapted(layer, tuner="lora", rank=2, **options):
    """`layer` with an adapter no part of which is zero, and an activation in place behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    if tuner == "adalora":
        config = peft.AdaLoraConfig(
            target_modules=["0"], init_r=rank, target_r=1, total_step=9, tinit=1, tfinal=1, **options
        )
    else:
        config = peft.LoraConfig(target_modules=["0"], r=rank, use_dora=tuner == "dora", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks above a layer's width
        model = peft.get_peft_model(model, config)
    fill(model)
    return model.train()


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=30)
@given(
    tuner=st.sampled_from(TUNERS),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 3),
    kernel=pairs,
    stride=pairs,
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    bias_trains=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    channels_last=st.booleans(),
    needs_input=st.booleans(),
    single=st.booleans(),
    size=st.tuples(st.integers(1, 3), st.integers(3, 7), st.integers(3, 7)),
)
def test_an_adapted_convolution_is_that_of_peft(
    tuner, channels, rank, kernel, stride, padding, bias, bias_trains, dropout, channels_last, needs_input,
    single, size,
):  # fmt: skip
    dtype, tolerance = (torch.float32, 2e-5) if single else (torch.float64, 1e-11)
    layer = nn.Conv2d(*channels, kernel, stride, padding, bias=bias)
    model = adapted(layer, tuner, rank, lora_dropout=dropout).to(dtype)
    if bias:
        layer.bias.requires_grad_(bias_trains)
    x = torch.randn(size[0], channels[0], *size[1:], dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    lean, stock = (step(model, x, form, needs_input=needs_input)[0] for form in (True, False))
    assert_close(lean, stock, tolerance)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_only_requested_gradients_are_computed(part, kernel):
    model = adapted(nn.Conv2d(3, 4, kernel))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    for needs_input in (True, False):
        lean, stock = (
            step(model, torch.ones(2, 3, 5, 5), form, needs_input=needs_input)[0] for form in (True, False)
        )
        assert len(lean) == 2 + needs_input
        assert_close(lean, stock, 1e-5)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
def test_gradcheck_of_the_adapted_convolution(rescaled, dropped):
    """Finite differences agree with the formulas, for each argument that can have a gradient."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    weight, where = make(4, 2, 3, 2).detach(), ((2, 1), (1, 0), (1, 2), 1)
    scale, z = make(1, 4, 1, 1) if rescaled else None, make(2, 2, 5, 4) if dropped and not rescaled else None

    def function(x, z, bias, a, b, scale):
        return LeanLoraConv.apply(x, z, weight, bias, a, b, scale, 1.5, where)

    arguments = make(2, 2, 5, 4), z, make(4), make(3, 2, 3, 2), make(4, 3, 1, 1), scale
    assert torch.autograd.gradcheck(function, arguments)


def adapted_net(tuner="lora"):
    common = {"target_modules": ["0", "5"], "modules_to_save": ["9"]}
    config = {
        "lora": lambda: peft.LoraConfig(r=2, **common),
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **common),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=2, target_r=1, total_step=9, tinit=1, tfinal=1, **common
        ),
    }[tuner]()
    model = peft.get_peft_model(net(), config)
    fill(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_network_keeps_less_with_the_same_gradients(tuner):
    model, x = adapted_net(tuner), torch.randn(4, 3, 8, 8)
    (lean, kept_bytes), (stock, stock_kept_bytes) = (step(model, x, form) for form in (True, False))
    assert_close(lean, stock, 1e-5)
    assert kept_bytes < 0.7 * stock_kept_bytes


@pytest.mark.parametrize("tuner", TUNERS)
def test_under_autocast_gradients_are_close_and_less_is_kept(tuner):
    """bf16 has 8 bits: the sum in another order is another number, in the same direction."""
    model, x = adapted_net(tuner), torch.randn(4, 3, 8, 8)
    (lean, kept_bytes), (stock, stock_kept_bytes) = (step(model, x, form, "bf16") for form in (True, False))
    assert lean.keys() == stock.keys()
    assert all(lean[name].dtype == stock[name].dtype for name in stock)
    cosines = {
        n: F.cosine_similarity(lean[n].flatten().float(), stock[n].flatten().float(), 0).item() for n in stock
    }
    assert min(cosines.values()) > 0.998, cosines
    assert kept_bytes < 0.7 * stock_kept_bytes


def test_norm_of_a_sum():
    w, a, b = torch.randn(5, 4, 3, 2), torch.randn(3, 4, 3, 2), torch.randn(5, 3, 1, 1)
    summed = w + 0.7 * torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    torch.testing.assert_close(norm_of_sum(w, a, b, 0.7).flatten(), summed.flatten(1).norm(dim=1))
    gone = norm_of_sum(a, a, torch.eye(3)[:, :, None, None], -1.0)  # nothing is left but rounding
    assert gone.isfinite().all() and gone.max() < 1e-2


def test_evaluation_merging_and_files_are_those_of_peft():
    lean, stock, x = adapted_net().eval(), adapted_net().eval(), torch.randn(2, 3, 8, 8)
    forms = LeanForms(lean)
    assert lean.state_dict().keys() == stock.state_dict().keys()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(lean(x), stock(x), rtol=1e-5, atol=1e-6)
    with lean.disable_adapter(), stock.disable_adapter():
        assert torch.equal(lean(x), stock(x))
    assert not torch.allclose(lean(x), net().eval()(x))
    merged, expected = lean.merge_and_unload(), stock.merge_and_unload()
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in merged.state_dict().items())
    forms.remove()


def test_remove_restores_every_forward_and_hooks_run():
    model, x = adapted_net(), torch.randn(2, 3, 8, 8)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    seen = []
    handles = [
        m.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
        for m in model.modules()
        if isinstance(m, nn.BatchNorm2d | peft.tuners.lora.Conv2d)
    ]
    forms = LeanForms(model)
    model(x)
    assert sorted(seen) == ["BatchNorm2d", "BatchNormAct2d", "BatchNormAct2d", "Conv2d", "Conv2d"]
    forms.remove()
    for handle in handles:
        handle.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def trained_base(model):
    model.base_model.model[0].base_layer.weight.requires_grad_()


FALLBACKS = {
    "dora with dropout": (nn.Conv2d(4, 4, 3), {"tuner": "dora", "lora_dropout": 0.5}, None),
    "bias in the adapter": (nn.Conv2d(4, 4, 3), {"lora_bias": True}, None),
    "padding by reflection": (
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        {"tuner": "adalora"},
        None,
    ),
    "padding of its own": (Conv2dSame(4, 4, 3), {}, None),
    "dilation that the adapter lacks": (nn.Conv2d(4, 4, 3, dilation=2), {}, None),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), {}, None),
    "merged": (nn.Conv2d(4, 4, 3), {}, lambda model: model.merge_adapter()),
    "disabled": (nn.Conv2d(4, 4, 3), {}, lambda model: model.base_model.disable_adapter_layers()),
    "base is trained": (nn.Conv2d(4, 4, 3), {}, trained_base),
    "one image without a batch": (nn.Conv2d(4, 4, 3), {"image": (4, 7, 7)}, None),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_layers_that_no_lean_form_covers_run_as_in_peft(case):
    layer, options, change = FALLBACKS[case]
    options = dict(options)
    x = torch.randn(options.pop("image", (2, 4, 7, 7)))
    model = adapted(copy.deepcopy(layer), **options)
    if change is not None:
        change(model)
    try:
        stock = step(model, x, False)[0]
    except RuntimeError as error:  # peft's adapter does not fit the layer
        assert "must match the size" in str(error)
        with pytest.raises(RuntimeError, match="must match the size"):
            step(model, x, True)
        return
    assert_close(step(model, x, True)[0], stock, 0)
    forms = LeanForms(model)
    assert "LeanLora" not in names_of_graph(model(x.requires_grad_()).grad_fn)
    forms.remove()


def names_of_graph(node):
    if node is None:
        return ""
    return " ".join([node.name(), *(names_of_graph(following) for following, _ in node.next_functions)])


def test_the_lean_form_is_what_runs_where_it_is_covered():
    for tuner in TUNERS:
        model = adapted(nn.Conv2d(4, 4, 3), tuner)
        LeanForms(model)
        assert "LeanLora" in names_of_graph(model(torch.randn(1, 4, 5, 5)).grad_fn)


class Block(nn.Module):
    """An inverted residual block (arXiv 1801.04381)."""

    def __init__(self, width, inner):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), BatchNormAct2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2 = BatchNormAct2d(inner, act_layer=nn.Hardswish)
        self.project, self.bn3 = (
            nn.Conv2d(inner, width, 1, bias=False),
            BatchNormAct2d(width, apply_act=False),
        )

    def forward(self, x):
        y = self.bn2(self.depthwise(self.bn1(self.expand(x))))
        return x + self.bn3(self.project(y))


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(8, 24) for _ in range(2)))
        self.classifier = nn.Linear(8, 10)

    def get_classifier(self):
        return self.classifier

    def forward(self, x):
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def cnn(method, name=None):
    toolkit.seed_everything(0)
    model = MobileNet() if name is None else timm.create_model(name, num_classes=10)
    model = toolkit.adapt(model, method, **({"rank": 1} if method in TUNERS else {}))
    fill(model)
    toolkit.methods.set_train_mode(model)
    return model


def images(size):
    return torch.randn(4, 3, size, size), torch.randint(0, 10, (4,))


def training_step(model, batch, budget):
    """(peak bytes of the second training step under a budget, the gradients of the first, the plan)."""
    x, y = batch
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x, y])
    with toolkit.auto_checkpoint(model, budget, batch, optimizer=optimizer) as handle:
        for number in range(2):
            memory.reset_peak()
            with memory:
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
                loss.backward()
            if not number:  # copies that are no tensors, which would be counted
                found = {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}
                found["loss"] = loss.detach().numpy().copy()
            with memory:
                del outputs, loss
                optimizer.step()
                optimizer.zero_grad()
    assert handle.departures == handle.replans == 0
    gradients = {name: torch.from_numpy(array) for name, array in found.items()}
    return memory.peak_bytes, gradients, handle.plan


METHODS = [*TUNERS, "linear", "bitfit", "norm"]


def check_plans(method, batch, name=None):
    planner = Planner(cnn(method, name), batch)
    peak, gradients, made = training_step(cnn(method, name), batch, HUGE)
    assert peak == made.peak_bytes == planner.plan(HUGE).peak_bytes
    assert made.peak_bytes <= plan(cnn(method, name), HUGE, batch, lean=False).peak_bytes
    smallest_bytes = planner.smallest_bytes()
    peak, again, made = training_step(cnn(method, name), batch, smallest_bytes)
    assert peak == made.peak_bytes <= smallest_bytes
    return gradients, again, made


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_plan_of_a_cnn_predicts_its_peak_and_changes_no_gradient(method):
    gradients, again, made = check_plans(method, images(16))
    assert_close(again, gradients, 1e-5 if any(option.slices > 1 for option in made.options) else 0)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [None, "resnet10t", "mobilenetv3_small_050"])
def test_a_plan_of_any_cnn_predicts_its_peak(name, method):
    check_plans(method, images(64 if name else 16), name)
