"""The lean form of LoRA is peft's LoRA: the same function, parameters and files, in less memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.budget import TensorMemory
from toolkit.budget.lean import LeanForms
from toolkit.budget.step import autocast
from toolkit.methods.lean import LeanLora

pytestmark = pytest.mark.numerical

CPU = torch.device("cpu")


def adapted_model(method="lora", dtype=torch.float32, **options):
    """demo_vit with adapters no part of which is zero, so that every part has a gradient."""
    toolkit.seed_everything(0)
    model = toolkit.build_backbone("demo_vit", 10, False).to(dtype)
    model = toolkit.adapt(model, method, alpha=12, **options).to(dtype)
    fill_adapters(model)
    return model.train()


def fill_adapters(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_E" in name:
                parameter.normal_(0, 0.05)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def peft_model(**options):
    from peft import LoraConfig, get_peft_model

    toolkit.seed_everything(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **options}
    model = get_peft_model(TwoLinears(), LoraConfig(**settings))
    fill_adapters(model)
    return model.train()


def step(model, x, y=None, lean=True, precision="fp32"):
    """Output and gradients of one step, the input's too; peak bytes."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x])
    forms = LeanForms(model) if lean else None
    toolkit.seed_everything(1)
    try:
        with memory:
            with autocast(CPU, precision):
                out = model(x)
                loss = out.square().sum() if y is None else F.cross_entropy(out, y)
            loss.backward()
    finally:
        if forms is not None:
            assert forms.layers
            forms.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **found}, memory.peak_bytes


def worst_error(lean, stock, scales=None):
    """Largest difference relative to the largest entry of its tensor, or to its scale in `scales`."""
    assert lean.keys() == stock.keys() and len(stock) > 2
    scales = {name: tensor.abs().max() for name, tensor in stock.items()} | (scales or {})
    return max(float((lean[name] - stock[name]).abs().max() / scales[name]) for name in stock)


def scales_of_ranks(model, gradients):
    """Sizes of the terms that add up to the gradients of AdaLoRA's `ranknum`.

    AdaLoRA divides its update by `ranknum`, so this gradient is the sum of E * dE / ranknum over the ranks.
    The terms cancel to a ten-thousandth of their size, and rounding follows the terms.
    """
    scales = {}
    parameters = dict(model.named_parameters())
    for name in gradients:
        if "ranknum" in name:
            diagonal = name.replace("ranknum", "lora_E")
            terms = parameters[diagonal].detach() * gradients[diagonal]
            scales[name] = terms.abs().sum() / parameters[name].detach()
    return scales


def cosine(a, b):
    return F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


ROWS = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
KINDS = [("lora", 0.0), ("lora", 0.3), ("dora", 0.0), ("adalora", 0.0), ("adalora", 0.3), ("qlora", 0.0),
         ("qlora", 0.3)]  # fmt: skip


@pytest.mark.parametrize("method, dropout", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lean_gradients_are_those_of_peft(batch, method, dropout, dtype):
    if method == "qlora" and dtype == torch.float64:
        pytest.skip("bitsandbytes unpacks to float32 at most")
    x, y = batch[0][:4].to(dtype), batch[1][:4]
    model = adapted_model(method, dtype, dropout=dropout)
    lean, stock = (step(model, x, y, form)[0] for form in (True, False))
    for part in ("lora_A", "lora_B", *{"dora": ["magnitude"], "adalora": ["lora_E"]}.get(method, [])):
        assert sum(part in name for name in lean) == 16
    roundings = 64  # about 13 on processors with AVX-512 and without
    error = worst_error(lean, stock, scales_of_ranks(model, stock))
    assert error < roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12), (2, 1, 3, 12), (1, 12), (12,)])
def test_lean_takes_inputs_of_any_number_of_dimensions(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = peft_model().double()
    assert worst_error(step(model, x)[0], step(model, x, lean=False)[0]) < 1e-12


def test_lean_takes_an_empty_batch_and_inputs_that_are_not_contiguous():
    model = peft_model().double()
    empty = step(model, torch.zeros(0, 12, dtype=torch.float64))[0]
    assert empty["out"].shape == (0, 5) and all(not g.any() for n, g in empty.items() if n != "out")
    x = torch.randn(12, 2, 7, dtype=torch.float64).permute(2, 1, 0)
    assert worst_error(step(model, x)[0], step(model, x, lean=False)[0]) < 1e-12


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropped, rescaled", [(True, False), (False, False), (False, True)])
def test_gradcheck_of_the_lean_function(bias, dropped, rescaled):
    """Finite differences agree with the formulas, for each argument that can have a gradient."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    weight = make(4, 5).detach()
    z, b = make(2, 3, 5) if dropped else None, make(4) if bias else None

    scale = make(4) if rescaled else None

    def function(x, z, b, low_a, low_b, scale):
        return LeanLora.apply(x, z, weight, b, low_a, low_b, scale, 1.5, lambda stored: stored)

    assert torch.autograd.gradcheck(function, (make(2, 3, 5), z, b, make(2, 5), make(4, 2), scale))


def test_a_trained_bias_gets_its_gradient():
    model = peft_model(bias="all").double()
    lean, stock = (step(model, ROWS.double(), lean=form)[0] for form in (True, False))
    (name,) = (name for name in lean if name.endswith("first.base_layer.bias"))
    assert lean[name].any() and worst_error(lean, stock) < 1e-12


def test_only_requested_gradients_are_computed():
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "first.lora_A" in name or "second.lora_B" in name:
            parameter.requires_grad_(False)
    lean, stock = (step(model, ROWS, lean=form)[0] for form in (True, False))
    assert len(lean) == 4 and worst_error(lean, stock) < 1e-6


def test_saved_and_merged_weights_are_those_of_peft(batch):
    model = adapted_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forms = LeanForms(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], v) for n, v in before.items())
    model.load_state_dict(before)
    forms.remove()
    lean, stock = (peft_model().eval() for _ in range(2))
    LeanForms(lean)
    x = ROWS.clone()
    y = lean(x)
    merged, expected = lean.merge_and_unload(), stock.merge_and_unload()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in merged.state_dict().items())
    torch.testing.assert_close(merged(x), y)


def test_remove_restores_the_forward_of_peft():
    model = peft_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    kinds = {type(module) for module in model.modules()}
    forms = LeanForms(model)
    assert len(forms.layers) == 2 and {type(wrapping.module) for wrapping in forms.layers}.isdisjoint(kinds)
    forms.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    forms.remove()


def test_applying_lean_forms_twice_changes_nothing():
    model = peft_model().double()
    stock = step(model, ROWS.double(), lean=False)[0]
    outer = LeanForms(model)
    assert worst_error(step(model, ROWS.double())[0], stock) < 1e-12  # enters and removes its own
    outer.remove()
    assert not any("forward" in vars(module) for module in model.modules())
    assert worst_error(step(model, ROWS.double(), lean=False)[0], stock) == 0


def uses_lean(model, x):
    return any("LeanLora" in name for name in graph_of(model(x).grad_fn))


def graph_of(node, seen=None):
    seen = {} if seen is None else seen
    if node is not None and node not in seen:
        seen[node] = type(node).__name__
        for following, _ in node.next_functions:
            graph_of(following, seen)
    return seen.values()


def second_adapter(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    fill_adapters(model)


def trained_base(model):
    for layer in LeanForms(TwoLinears()).layers or model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.requires_grad_()


FALLBACKS = {
    "dora with dropout": ({"use_dora": True, "lora_dropout": 0.5}, None),
    "bias in the adapter": ({"lora_bias": True, "target_modules": ["first"]}, None),
    "two adapters": ({}, second_adapter),
    "merged": ({}, lambda model: model.merge_adapter()),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "base is trained": ({}, trained_base),
    "other type": ({}, lambda model: [m.double() for n, m in model.named_modules() if n[-7:-1] == ".lora_"]),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_layers_that_no_lean_form_covers_run_as_in_peft(case):
    options, change = FALLBACKS[case]
    model = peft_model(**options)
    if change is not None:
        change(model)
    x = ROWS.clone().requires_grad_()
    toolkit.seed_everything(1)
    expected = model(x).detach()
    forms = LeanForms(model)
    assert not uses_lean(model, x)
    toolkit.seed_everything(1)
    assert torch.equal(model(x), expected)
    forms.remove()
    assert uses_lean_when_plain()


def uses_lean_when_plain():
    model = peft_model()
    LeanForms(model)
    return uses_lean(model, ROWS)


def test_temporarily_disabled_adapters_are_respected():
    model = peft_model()
    plain = TwoLinears()
    weights = {name.replace("base_layer.", ""): v for name, v in model.get_base_model().state_dict().items()}
    plain.load_state_dict({name: value for name, value in weights.items() if "lora" not in name})
    LeanForms(model)
    with model.disable_adapter():
        assert torch.equal(model(ROWS), plain(ROWS))
    assert uses_lean(model, ROWS) and not torch.allclose(model(ROWS), plain(ROWS))


def test_outputs_without_gradients_and_in_evaluation_are_those_of_peft():
    model = peft_model(lora_dropout=0.5).eval()
    stock = model(ROWS)
    LeanForms(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ROWS), stock, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model(ROWS), stock, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method, dropout", KINDS)
def test_under_autocast_gradients_are_close_and_the_peak_is_lower(batch, method, dropout):
    """bf16 has 8 bits: the sum in another order is another number, in the same direction."""
    model = adapted_model(method, dropout=dropout)
    (lean, lean_peak), (stock, stock_peak) = (step(model, *batch, form, "bf16") for form in (True, False))
    assert lean.keys() == stock.keys()
    assert all(lean[name].dtype == stock[name].dtype for name in stock)
    cosines = {n: cosine(lean[n], stock[n]) for n in stock}
    assert min(cosines.values()) > 0.999, cosines
    assert lean_peak < stock_peak


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "qlora"])
def test_the_peak_is_lower_without_autocast_too(batch, method):
    model = adapted_model(method)
    assert step(model, *batch)[1] < step(model, *batch, lean=False)[1]


def test_float16_weights_compute_in_their_own_type():
    model = peft_model().to(torch.bfloat16)
    lean, stock = (step(model, ROWS.bfloat16(), lean=form)[0] for form in (True, False))
    assert all(lean[name].dtype == torch.bfloat16 for name in lean)
    assert worst_error(lean, stock) < 0.05


@pytest.mark.parametrize("how", ["retained", "accumulated"])
def test_two_backward_passes_give_twice_the_gradient(how):
    model = peft_model().double()
    once = step(model, ROWS.double())[0]
    forms = LeanForms(model)
    model.zero_grad()
    loss = model(ROWS.double()).square().sum()
    loss.backward(retain_graph=how == "retained")
    (loss if how == "retained" else model(ROWS.double()).square().sum()).backward()
    forms.remove()
    twice = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.allclose(grad, once[name], rtol=1e-12) for name, grad in twice.items())


def test_public_functions_know_low_rank_layers_without_another_import():
    """In a process of its own, with peft alone."""
    code = """
import peft, torch
from torch import nn
from toolkit import auto_checkpoint, plan

model = peft.get_peft_model(
    nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4))),
    peft.LoraConfig(r=4, target_modules=r"\\d.0"),
)
batch = torch.randn(256, 64)
lean, stock = (plan(model, "1GB", batch, lean=lean).peak_bytes for lean in (True, False))
assert lean != stock
with auto_checkpoint(model, "1GB", batch):
    assert "LeanLora" in model(batch).grad_fn.next_functions[0][0].name()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
