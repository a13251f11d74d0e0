"""Convolutions and batch norms that keep for backward only what their gradients are made of.

torch keeps the input and the weight of every convolution, and the input of every batch norm, whether or
not a gradient reads them.  The input gradient of a convolution needs its weight alone, and that of a batch
norm with running statistics a scale per channel (arXiv 2404.12406): a frozen layer keeps no activation
here.  A convolution under LoRA or DoRA keeps its input and the map of `rank` channels, nothing of the
output's size, and adds the adapter's part in place.

Exact: the same operators and sums.  Frozen layers give the same bits as torch (a convolution in channels-last
order may round otherwise), adapted ones the same but for the order of rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_POINT = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups of a 1x1 convolution
_PIXELS = (0, 2, 3)  # all dimensions but that of the channels
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]


def geometry(layer: nn.Module) -> Geometry | None:
    """Stride, padding, dilation and groups of a two-dimensional convolution that pads with zeros.

    None for every other module: subclasses may pad in their own way.
    """
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return layer.stride, layer.padding, layer.dilation, layer.groups


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, or one with dropout and activation at its end (timm's)."""
    parts = [name for name, _ in module.named_children()]
    with_activation = isinstance(module, nn.BatchNorm2d) and parts == ["drop", "act"]
    return type(module) in _NORMS or with_activation


def conv_forward(layer: nn.Conv2d, stock, *args, **kwargs) -> torch.Tensor:
    """x (B, in, H, W) -> (B, out, H', W'); the layer's own forward if its weight trains."""
    if kwargs or len(args) != 1:
        return stock(*args, **kwargs)
    (x,) = args
    bias_trains = layer.bias is not None and layer.bias.requires_grad
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else layer.weight.dtype
    useful = torch.is_grad_enabled() and (x.requires_grad or bias_trains)
    if not useful or layer.weight.requires_grad or x.dim() != 4 or (x.dtype != dtype and not autocast):
        return stock(x)
    return _FrozenConv.apply(x.to(dtype), layer.weight, layer.bias, geometry(layer))


def norm_forward(module: nn.Module, stock, *args, **kwargs) -> torch.Tensor:
    """x (B, channels, ...), same shape out; the module's own forward if its weight trains or in training."""
    frozen = module.weight is None or not module.weight.requires_grad
    fixed = not module.training and module.running_var is not None and torch.is_grad_enabled()
    if kwargs or len(args) != 1 or not (frozen and fixed):
        return stock(*args, **kwargs)
    (x,) = args
    y = _FrozenNorm.apply(x, module.weight, module.bias, module.running_mean, module.running_var, module.eps)
    return module.act(module.drop(y)) if hasattr(module, "act") else y


def norm_of_sum(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """Norm of each output channel of W + s·B·A, without that sum: (1, out, 1, 1).

    W (out, in, k, l), A (r, in, k, l), B (out, r, 1, 1): |w + s·b·A|² = |w|² + s·b·(2·A·w + s·A·Aᵀ·b).
    """
    w, a, b = weight.to(a.dtype).flatten(1), a.flatten(1), b.flatten(1)
    added = (b * torch.addmm(2 * w @ a.t(), b, a @ a.t(), alpha=scaling)).sum(1)
    squares = torch.linalg.vector_norm(w, dim=1).square() + scaling * added
    return squares.clamp(min=0).sqrt().view(1, -1, 1, 1)


def _backward(
    grad, x, weight, where: Geometry, *, to_input: bool, to_weight: bool = False, to_bias: bool = False
):
    """Gradients of input, weight and bias of a convolution; `x` may be the shape of the input alone."""
    if isinstance(x, torch.Size):  # one number, seen as an input of that shape
        x = grad.new_empty(1).expand(x)
    stride, padding, dilation, groups = where
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [len(weight)],
        stride,
        padding,
        dilation,
        False,
        [0, 0],
        groups,
        [to_input, to_weight, to_bias],
    )


class _FrozenConv(torch.autograd.Function):
    """y = W * x + bias that keeps no activation; the bias may train."""

    @staticmethod
    def forward(ctx, x, weight, bias, where):
        ctx.where, ctx.shape = where, x.shape
        ctx.save_for_backward(weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), *where)

    @staticmethod
    def backward(ctx, grad):
        weight, bias = ctx.saved_tensors
        need_x, _, need_bias, _ = ctx.needs_input_grad
        grad_x, _, grad_bias = _backward(
            grad, ctx.shape, weight.to(grad.dtype), ctx.where, to_input=need_x, to_bias=need_bias
        )
        return grad_x, None, grad_bias.to(bias.dtype) if need_bias else None, None


class _FrozenNorm(torch.autograd.Function):
    """Batch norm by running statistics that keeps no activation; weight frozen, the bias may train."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps):
        ctx.eps = eps
        ctx.save_for_backward(weight, mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        weight, mean, var = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad[:3]
        none = var.new_empty(0)  # statistics of the batch
        # The input, which only the weight's gradient reads, is left out: the gradient stands in for it.
        grad_x, _, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, grad, weight, mean, var, none, none, False, ctx.eps, [need_x, False, need_bias]
        )
        return grad_x, None, grad_bias, None, None, None


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
        grad_low, grad_b, _ = _backward(grad, low, b.to(dtype), _POINT, to_input=True, to_weight=need_b)
        grad_low.mul_(ctx.scaling)
        grad_x = grad_z = None
        if need_x:
            grad_x = _backward(grad, ctx.shape, weight.to(dtype), ctx.where, to_input=True)[0]
        del grad
        a_now, both = a.to(dtype), need_x and ctx.shared
        in_place = both and ctx.where == _POINT and a.shape[2:] == (1, 1)
        through = need_z or (both and not in_place)
        added, grad_a, _ = _backward(grad_low, z, a_now, ctx.where, to_input=through, to_weight=need_a)
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
