"""One step of a model with or without lean forms, for the tests of both kinds of layers."""

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from toolkit.budget import LeanForms, TensorMemory
from toolkit.budget.step import autocast

CPU = torch.device("cpu")


def fill(model):
    """Nothing is zero or one, so that each part has a gradient of its own."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "lora_B" in name or "lora_E" in name or name.endswith("running_mean"):
                tensor.normal_(0, 0.3)
            if "magnitude" in name or name.endswith("running_var"):
                tensor.mul_(1 + 0.3 * torch.rand_like(tensor))


def step(model, x, lean, precision="fp32", needs_input=True):
    """Output and gradients; bytes that forward leaves behind."""
    model.zero_grad()
    x = x.clone().requires_grad_(needs_input)
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x])
    before = memory.allocated_bytes
    forms = LeanForms(model) if lean else None
    torch.manual_seed(1)
    try:
        with memory, autocast(CPU, precision):
            out = model(x)
            kept_bytes = memory.allocated_bytes - before
        out.square().sum().backward()
    finally:
        if forms is not None:
            forms.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **({"x": x.grad} if needs_input else {}), **found}, kept_bytes


def assert_close(lean, stock, tolerance):
    assert lean.keys() == stock.keys() and len(stock) > 1
    for name, value in stock.items():
        assert lean[name].dtype == value.dtype and lean[name].shape == value.shape, name
        scale = value.abs().max().clamp(min=1e-30)
        assert float((lean[name] - value).abs().max() / scale) <= tolerance, name


def net(seed=0):
    """Adapted, depthwise and frozen layers, activations in place, a residual: ConvNet of 8 x 8 pixels."""
    torch.manual_seed(seed)
    norms = [BatchNormAct2d(12), nn.BatchNorm2d(12), BatchNormAct2d(6, apply_act=False)]
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), norms[0],
        nn.Conv2d(12, 12, 3, stride=2, padding=1, groups=12), norms[1], nn.ReLU6(inplace=True),
        nn.Conv2d(12, 6, 1, bias=False), norms[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    fill(model)
    return model
