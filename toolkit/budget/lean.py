"""LoRA layers whose forward and backward pass take no more memory than the arithmetic needs.

peft computes base(x) + B(A(dropout(x))) · s with stock operators: three temporaries of the output's size
in forward, two in backward, the input kept once more by A, and under autocast cast and kept once per layer
that reads it.  Here one autograd function does it, on the same parameters: the products of the low-rank
path are added in place, and A's input, in the type that computes, is all that backward gets.  What peft
saves, merges and loads is untouched.

Exact: the same sum, so equal to peft but for the order of rounding.  Needs nothing of peft: a layer is
recognised by the attributes that peft's LoRA layers have.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn


class LeanForms:
    """Replaces the forward of every plain LoRA layer on a frozen `nn.Linear` in `model` until `remove()`.

    DoRA and other variants, merged, disabled, several active adapters, adapters with a bias or of another
    type than the base weight (without autocast): peft's own forward runs.
    """

    def __init__(self, model: nn.Module):
        self.layers = [module for module in model.modules() if _is_lora_linear(module)]
        for layer in self.layers:
            layer.forward = functools.partial(_forward, layer, layer.forward)

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        self.layers = []


def _is_lora_linear(module: nn.Module) -> bool:
    parts = ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters")
    return all(hasattr(module, part) for part in parts) and type(module.base_layer) is nn.Linear


def _adapter(layer: nn.Module) -> str | None:
    """The one adapter that the lean form can compute; None if peft has to."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged:
        return None
    (name,) = active
    a, b = layer.lora_A[name], layer.lora_B[name]
    plain = type(a) is nn.Linear and type(b) is nn.Linear and a.bias is None and b.bias is None
    if not plain or name in getattr(layer, "lora_variant", ()) or layer.base_layer.weight.requires_grad:
        return None
    return name


def _forward(layer: nn.Module, stock, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """x (..., in) -> (..., out)."""
    name = None if args or kwargs else _adapter(layer)
    base = layer.base_layer
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    if name is None or (x.dtype != dtype and not torch.is_autocast_enabled(device)):
        return stock(x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if a.dtype != base.weight.dtype and not torch.is_autocast_enabled(device):
        return stock(x, *args, **kwargs)
    dropped = layer.lora_dropout[name](x)
    low_rank_input = None if dropped is x else dropped.to(dtype)
    return _LeanLora.apply(x.to(dtype), low_rank_input, base.weight, base.bias, a, b, layer.scaling[name])


class _LeanLora(torch.autograd.Function):
    """y = x·Wᵀ + bias + s·(z·Aᵀ)·Bᵀ with z = x, or x after dropout (LoRA, arXiv 2106.09685, eq. 3).

    x, z (..., in), W (out, in), A (r, in), B (out, r), computed in x's type.
    """

    @staticmethod
    def forward(ctx, x, z, weight, bias, a, b, scaling):
        with torch.autocast(x.device.type, enabled=False):
            dtype = x.dtype
            y = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
            z = x if z is None else z
            ctx.shared = z is x
            low = z.reshape(-1, z.shape[-1]) @ a.to(dtype).t()  # (rows, r)
            y.view(-1, y.shape[-1]).addmm_(low, b.to(dtype).t(), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(z, low, weight, bias, a, b)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, low, weight, bias, a, b = ctx.saved_tensors
        dtype = grad.dtype
        rows = grad.reshape(-1, grad.shape[-1])
        grad_low = (rows @ b.to(dtype)).mul_(ctx.scaling)  # (rows, r)
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            grad_x = rows @ weight.to(dtype)
            if ctx.shared:
                grad_x.addmm_(grad_low, a.to(dtype))
            grad_x = grad_x.view(z.shape)
        if ctx.needs_input_grad[1]:
            grad_z = (grad_low @ a.to(dtype)).view(z.shape)
        grad_a = (grad_low.t() @ z.reshape(-1, z.shape[-1])).to(a.dtype) if ctx.needs_input_grad[4] else None
        grad_b = (rows.t() @ low).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[5] else None
        grad_bias = rows.sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return grad_x, grad_z, None, grad_bias, grad_a, grad_b, None
