"""Lean forms of low-rank layers: they take no more memory than the arithmetic needs.

peft computes base(x) + B(A(dropout(x))) · s with stock operators: three temporaries of the output's size in
forward, two in backward, the input kept once more by A, and under autocast cast and kept once per layer that
reads it.  DoRA and AdaLoRA keep even more.  Here one autograd function does all three, on the same
parameters: the products of the low-rank path are added in place, and backward gets only A's input, in the
type of the computation.  A convolution keeps its input and the map of `rank` channels, nothing of the
output's size.  A 4-bit base weight is unpacked when it is needed, and again in backward.  Saving, merging and
loading by peft are unchanged.

Exact: the same sum, so equal to peft except for the order of rounding.  Layers are recognised by the
attributes of peft's layers, without importing peft.  Importing this module registers the forms, the FLOPs of
4-bit products and the scales of 4-bit weights with `budget`; `toolkit.plan` and `toolkit.auto_checkpoint` are
imported from here, so that they know low-rank layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.budget import auto_checkpoint, plan
from toolkit.budget.lean import Form, Geometry, conv_gradients, geometry, register_form
from toolkit.budget.memory import register_attached
from toolkit.budget.wrapping import own_class

__all__ = [
    "LeanLora",
    "LeanLoraConv",
    "auto_checkpoint",
    "is_packed",
    "norm_of_sum",
    "plan",
    "unpacked_weight",
]

_POINT = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups of a 1x1 convolution
_PIXELS = (0, 2, 3)  # all dimensions but that of the channels


@dataclass(frozen=True)
class _Update:
    """The update of a base weight: s·B·A, A (r, in), B (out, r); then rows are scaled.

    For a convolution: A (r, in, height, width), B (out, r, 1, 1).
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None  # DoRA: (out,) or (1, out, 1, 1)


def _form_of(module: nn.Module) -> Form | None:
    """The lean form of a low-rank layer on a frozen linear layer or convolution.

    LoRA, DoRA without dropout, and AdaLoRA of linear layers, LoRA and DoRA of convolutions without groups.
    Other variants, merged, disabled, several active adapters, adapters with a bias or of another type than
    the base weight (without autocast): peft's own forward runs.
    """
    parts = ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters")
    if not all(hasattr(module, part) for part in parts):
        return None
    base = module.base_layer
    single = geometry(base) is not None and base.groups == 1
    return _forward if own_class(base) is nn.Linear or is_packed(base) or single else None


register_form(_form_of)


def is_packed(layer: nn.Module) -> bool:
    """Whether a linear layer has a 4-bit weight (bitsandbytes)."""
    return isinstance(layer, nn.Linear) and hasattr(getattr(layer.weight, "quant_state", None), "quant_type")


def _scales(parameter: nn.Parameter) -> Iterator[torch.Tensor]:
    """The tensors that the scales of a 4-bit weight are in; they may be packed themselves."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = getattr(state, "state2", None)


register_attached(_scales)


def _active_adapter(layer: nn.Module) -> str | None:
    """The adapter that the lean form can compute; None if peft has to run."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.disable_adapters or layer.merged or layer.base_layer.weight.requires_grad:
        return None
    return active[0]


def _update_of(layer: nn.Module, name: str) -> _Update | None:
    """The adapter as an `_Update`; None if the lean form cannot compute it."""
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    base = layer.base_layer
    if hasattr(layer, "lora_E"):  # AdaLoRA: P·diag(E)·Q (arXiv 2303.10512, eq. 3)
        a = a * (layer.lora_E[name] * (scaling / (layer.ranknum[name] + 1e-5)))
        if geometry(base) is not None:
            a, b = a.view(-1, *base.weight.shape[1:]), b[:, :, None, None]
        return _Update(a, b, 1.0)
    kind = nn.Conv2d if geometry(base) is not None else nn.Linear
    if not (own_class(a) is own_class(b) is kind and a.bias is None and b.bias is None):
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
    """Weight of a layer; of a 4-bit one (out, in), in its type before packing."""
    return _unpacked(getattr(layer.weight, "quant_state", None), layer.weight)


def _unpacked(state, weight: torch.Tensor) -> torch.Tensor:
    """Values (out, in) of a stored weight: itself where there is no `state` of a 4-bit one."""
    if state is None:
        return weight
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
    unpack = functools.partial(_unpacked, getattr(base.weight, "quant_state", None))
    rescale = None
    if update.magnitude is not None:
        # The norm is treated as a constant (arXiv 2402.09353, section 4.3).
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            parts = unpack(base.weight), update.a, update.b, update.scaling
            norm = torch.linalg.norm(_merged(*parts), dim=1) if place is None else norm_of_sum(*parts)
        rescale = update.magnitude / norm
    arguments = (x.to(dtype), low_rank_input, base.weight, base.bias, update.a, update.b, rescale)
    if place is None:
        return LeanLora.apply(*arguments, update.scaling, unpack)
    return LeanLoraConv.apply(*arguments, update.scaling, place)


def _merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """W + s·B·A (out, in) in the adapters' type."""
    return torch.addmm(weight.to(a.dtype), b, a, alpha=scaling)


class LeanLora(torch.autograd.Function):
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
            # Row sums of grad times the output before scaling, which is not kept.
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


def norm_of_sum(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norm of each output channel of W + s·B·A, without that sum: (1, out, 1, 1).

    W (out, in, k, l), A (r, in, k, l), B (out, r, 1, 1): |w + s·b·A|² = |w|² + s·b·(2·A·w + s·A·Aᵀ·b).
    """
    w, a, b = weight.to(a.dtype).flatten(1), a.flatten(1), b.flatten(1)
    added = (b * torch.addmm(2 * w @ a.t(), b, a @ a.t(), alpha=scaling)).sum(1)
    squares = torch.linalg.vector_norm(w, dim=1).square() + scaling * added
    return squares.clamp(min=0).sqrt().view(1, -1, 1, 1)


class LeanLoraConv(torch.autograd.Function):
    """y = (W * x + s·B * (A * z)) ∘ rescale + bias with z = x, or x after dropout; `*` is a convolution.

    x, z (B, in, H, W), W (out, in, k, l), A (r, in, k, l) of W's geometry, B (out, r, 1, 1), rescale
    (1, out, 1, 1) or None.  The convolutional form of arXiv 2106.09685, eq. 3, and 2402.09353, eq. 5.
    """

    @staticmethod
    def forward(ctx, x, z, weight, bias, a, b, rescale, scaling, where):
        with torch.autocast(x.device.type, enabled=False):
            dtype = x.dtype
            ctx.shared = z is None
            z = x if z is None else z
            low = F.conv2d(z, a.to(dtype), None, *where)  # (B, r, H', W')
            bias_now = None if bias is None else bias.to(dtype)
            y = _sum(x, weight, bias_now if rescale is None else None, low, b, scaling, where)
            if rescale is not None:
                y.mul_(rescale.to(dtype))
                if bias is not None:
                    y.add_(bias_now.view(-1, 1, 1))
        ctx.scaling, ctx.where = scaling, where
        ctx.shape = x.shape
        # With a magnitude the convolution runs again in backward, on x.
        ctx.save_for_backward(z, low, weight, bias, a, b, rescale)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, low, weight, bias, a, b, rescale = ctx.saved_tensors
        need_x, need_z, _, need_bias, need_a, need_b, _, _, _ = ctx.needs_input_grad
        dtype = grad.dtype
        grad_bias = grad.sum(_PIXELS).to(bias.dtype) if need_bias else None
        grad_rescale = None
        if rescale is not None:
            before = _sum(z, weight, None, low, b, ctx.scaling, ctx.where)  # is not kept
            grad_rescale = before.mul_(grad).sum(_PIXELS, keepdim=True).to(rescale.dtype)
            del before
            grad = grad * rescale.to(dtype)
        grad_low, grad_b, _ = conv_gradients(grad, low, b.to(dtype), _POINT, to_input=True, to_weight=need_b)
        grad_low.mul_(ctx.scaling)
        grad_x = grad_z = None
        if need_x:
            grad_x = conv_gradients(grad, ctx.shape, weight.to(dtype), ctx.where, to_input=True)[0]
        del grad
        a_now, both = a.to(dtype), need_x and ctx.shared
        in_place = both and ctx.where == _POINT and a.shape[2:] == (1, 1)
        through = need_z or (both and not in_place)
        added, grad_a, _ = conv_gradients(grad_low, z, a_now, ctx.where, to_input=through, to_weight=need_a)
        if in_place:
            _add(grad_x, a_now.flatten(1).t(), grad_low)
        elif both:
            grad_x.add_(added)
        elif need_z:
            grad_z = added
        grad_a = grad_a.to(a.dtype) if need_a else None
        grad_b = grad_b.mul_(ctx.scaling).to(b.dtype) if need_b else None
        return grad_x, grad_z, None, grad_bias, grad_a, grad_b, grad_rescale, None, None


def _sum(x, weight, bias, low, b, scaling: float, where: Geometry) -> torch.Tensor:
    """W * x + bias + s·B * low; the second product is added in place."""
    y = F.conv2d(x, weight.to(x.dtype), bias, *where)
    _add(y, b.to(x.dtype).flatten(1), low, scaling)
    return y


def _add(y, matrix, x, scaling: float = 1.0) -> None:
    """y (B, m, H, W) += scaling · matrix (m, n) · x (B, n, H, W) at each pixel, in place."""
    columns = x.view(*x.shape[:2], -1)
    y.view(*y.shape[:2], -1).baddbmm_(matrix.expand(len(y), -1, -1), columns, alpha=scaling)
