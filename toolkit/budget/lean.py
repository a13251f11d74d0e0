"""Low-rank layers whose forward and backward pass take no more memory than the arithmetic needs.

peft computes base(x) + B(A(dropout(x))) · s with stock operators: three temporaries of the output's size
in forward, two in backward, the input kept once more by A, and under autocast cast and kept once per layer
that reads it.  DoRA and AdaLoRA keep more still.  Here one autograd function does all three, on the same
parameters: the products of the low-rank path are added in place, and A's input, in the type that computes,
is all that backward gets.  A base weight of four bits is unpacked when it is needed, and again in backward.
What peft saves, merges and loads is untouched.

Exact: the same sum, so equal to peft but for the order of rounding.  Needs nothing of peft: a layer is
recognised by the attributes that peft's layers have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.budget.lean_conv import LeanLoraConv, conv_forward, geometry, is_norm, norm_forward, norm_of_sum


class LeanForms:
    """Replaces the forward of layers in `model` by forms that keep less for backward, until `remove()`.

    LoRA, DoRA (without dropout) and AdaLoRA on a frozen linear layer, LoRA and DoRA on a frozen convolution;
    other frozen convolutions, and frozen batch norms that use their running statistics.  Other variants,
    merged, disabled, several active adapters, adapters with a bias or of another type than the base weight
    (without autocast): peft's own forward runs.
    """

    def __init__(self, model: nn.Module):
        self.layers = []
        for module in model.modules():
            form = _form_of(module)
            if form is not None:
                module.forward = functools.partial(form, module, module.forward)
                self.layers.append(module)

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        self.layers = []


@dataclass(frozen=True)
class _Update:
    """What an adapter adds to its base: s·B·A, A (r, in), B (out, r); then rows are scaled.

    Of a convolution: A (r, in, height, width), B (out, r, 1, 1).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None  # (out,), or (1, out, 1, 1), of DoRA


def _form_of(module: nn.Module) -> Callable | None:
    """The lean forward of a module: a function of the module, its own forward and its arguments."""
    parts = ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters")
    if all(hasattr(module, part) for part in parts):
        base = module.base_layer
        place = geometry(base)
        single = place is not None and base.groups == 1
        return _forward if type(base) is nn.Linear or is_packed(base) or single else None
    if geometry(module) is not None:
        return conv_forward
    return norm_forward if is_norm(module) else None


def is_packed(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is of four bits (bitsandbytes)."""
    return isinstance(layer, nn.Linear) and hasattr(getattr(layer.weight, "quant_state", None), "quant_type")


def _active_adapter(layer: nn.Module) -> str | None:
    """The one adapter that the lean form can compute; None if peft has to."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or layer.base_layer.weight.requires_grad:
        return None
    return active[0]


def _update_of(layer: nn.Module, name: str) -> _Update | None:
    """The adapter as an `_Update`; None if it is none."""
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    base = layer.base_layer
    if hasattr(layer, "lora_E"):  # AdaLoRA: P·diag(E)·Q (arXiv 2303.10512, eq. 3)
        a = a * (layer.lora_E[name] * (scaling / (layer.ranknum[name] + 1e-5)))
        if geometry(base) is not None:
            a, b = a.view(-1, *base.weight.shape[1:]), b[:, :, None, None]
        return _Update(a, b, 1.0)
    kind = nn.Conv2d if geometry(base) is not None else nn.Linear
    if not (type(a) is kind and type(b) is kind and a.bias is None and b.bias is None):
        return None
    if geometry(a) != geometry(base):
        return None
    variant = getattr(layer, "lora_variant", {})
    if name not in variant:
        return _Update(a.weight, b.weight, scaling)
    alone = isinstance(layer.lora_dropout[name], nn.Identity) or not layer.training
    if type(variant[name]).__name__ in ("DoraLinearVariant", "DoraConv2dVariant") and alone:
        return _Update(a.weight, b.weight, scaling, layer.lora_magnitude_vector[name].weight)
    return None


def unpacked_weight(layer: nn.Module) -> torch.Tensor:
    """Weight (out, in) of a layer of four bits, in the type that it had before."""
    return _unpacked(layer.weight.quant_state, layer.weight)


def _unpacking(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives the weight (out, in) of a base layer from what it stores."""
    return functools.partial(_unpacked, layer.weight.quant_state) if is_packed(layer) else _as_it_is


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _unpacked(state, weight: torch.Tensor) -> torch.Tensor:
    scales = state.absmax
    if state.nested:
        outer = state.state2
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales, outer.absmax, outer.code, outer.blocksize, torch.float32
        )
        scales = scales + state.offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight, scales, state.blocksize, state.quant_type, state.shape, state.dtype
    )


def _forward(layer: nn.Module, stock, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """x (..., in) -> (..., out); a convolution: x (B, in, H, W) -> (B, out, H', W')."""
    name = None if args or kwargs else _active_adapter(layer)
    update = None if name is None else _update_of(layer, name)
    base = layer.base_layer
    place = geometry(base)
    if update is None or (place is not None and x.dim() != 4):
        return stock(x, *args, **kwargs)
    base_dtype = base.weight.quant_state.dtype if is_packed(base) else base.weight.dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else base_dtype
    if not autocast and not (x.dtype == update.a.dtype == dtype):
        return stock(x, *args, **kwargs)
    dropped = layer.lora_dropout[name](x)
    low_rank_input = None if dropped is x else dropped.to(dtype)
    unpack, rescale = _unpacking(base), None
    if update.magnitude is not None:
        # The norm is taken for a constant (arXiv 2402.09353, section 4.3).
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            parts = unpack(base.weight), update.a, update.b, update.scaling
            norm = torch.linalg.norm(_merged(*parts), dim=1) if place is None else norm_of_sum(*parts)
        rescale = update.magnitude / norm
    arguments = (x.to(dtype), low_rank_input, base.weight, base.bias, update.a, update.b, rescale)
    if place is None:
        return _LeanLora.apply(*arguments, update.scaling, unpack)
    return LeanLoraConv.apply(*arguments, update.scaling, place)


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s·B·A (out, in) in the adapters' type."""
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)


class _LeanLora(torch.autograd.Function):
    """y = (x·Wᵀ + s·(z·Aᵀ)·Bᵀ) ∘ rescale + bias with z = x, or x after dropout (arXiv 2106.09685, eq. 3; with
    `rescale` arXiv 2402.09353, eq. 5).

    x, z (..., in), W (out, in), A (r, in), B (out, r), rescale (out,), computed in x's type.
    """

    @staticmethod
    def forward(ctx, x, z, weight, bias, a, b, rescale, scaling, unpack):
        with torch.autocast(x.device.type, enabled=False):
            dtype = x.dtype
            bias_now = None if bias is None else bias.to(dtype)
            y = F.linear(x, unpack(weight).to(dtype), bias_now if rescale is None else None)
            z = x if z is None else z
            ctx.shared = z is x
            low = z.reshape(-1, z.shape[-1]) @ a.to(dtype).t()  # (rows, r)
            y.view(-1, y.shape[-1]).addmm_(low, b.to(dtype).t(), alpha=scaling)
            if rescale is not None:
                y.mul_(rescale.to(dtype))
                if bias is not None:
                    y.add_(bias_now)
        ctx.scaling, ctx.unpack = scaling, unpack
        ctx.save_for_backward(z, low, weight, bias, a, b, rescale)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, low, weight, bias, a, b, rescale = ctx.saved_tensors
        dtype = grad.dtype
        rows = grad.reshape(-1, grad.shape[-1])
        b_now = b.to(dtype)
        grad_rescale = None
        if rescale is not None:
            b_now = b_now * rescale.to(dtype)[:, None]
            # Of each row's sum with the output before scaling, which is not kept.
            products = rows.t() @ z.reshape(-1, z.shape[-1])  # (out, in)
            grad_rescale = (_merged(ctx.unpack(weight), a, b, ctx.scaling) * products).sum(1)
            del products
        grad_low = (rows @ b_now).mul_(ctx.scaling)  # (rows, r)
        grad_x = grad_z = None
        if ctx.needs_input_grad[0]:
            w = ctx.unpack(weight).to(dtype)
            grad_x = rows @ (w if rescale is None else w * rescale.to(dtype)[:, None])
            del w
            if ctx.shared:
                grad_x.addmm_(grad_low, a.to(dtype))
            grad_x = grad_x.view(z.shape)
        if ctx.needs_input_grad[1]:
            grad_z = (grad_low @ a.to(dtype)).view(z.shape)
        grad_a = (grad_low.t() @ z.reshape(-1, z.shape[-1])).to(a.dtype) if ctx.needs_input_grad[4] else None
        grad_b = None
        if ctx.needs_input_grad[5]:
            grad_b = (rows.t() @ low).mul_(ctx.scaling).to(b.dtype)
            if rescale is not None:
                grad_b.mul_(rescale[:, None])
        grad_bias = rows.sum(0).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return grad_x, grad_z, None, grad_bias, grad_a, grad_b, grad_rescale, None, None
