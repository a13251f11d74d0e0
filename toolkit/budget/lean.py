"""Lean forms: layers that keep for backward only the tensors that their gradients need.

torch keeps the input and the weight of every convolution, and the input of every batch norm, whether or
not a gradient reads them.  The input gradient of a convolution needs its weight alone, and that of a batch
norm with running statistics a scale per channel (arXiv 2404.12406): a frozen layer keeps no activation
here.  Other layers register forms of their own (`register_form`; low-rank layers: `methods.lean`).

Exact: the same operators and sums.  Frozen layers give the same bits as torch (a convolution in channels-last
order may round otherwise).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.budget.wrapping import Wrapping, own_class

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
# A lean forward: a function of the module, its own forward and its arguments.
Form = Callable[..., torch.Tensor]
_FINDERS: list[Callable[[nn.Module], Form | None]] = []


def register_form(find: Callable[[nn.Module], Form | None]) -> None:
    """Add lean forms: `find(module)` returns the form of a module, or None if it has none."""
    _FINDERS.insert(0, find)


class LeanForms:
    """Replaces the forward of layers in `model` by forms that keep less for backward, until `remove()`.

    Covers frozen convolutions, frozen batch norms that use their running statistics, and registered forms.
    """

    def __init__(self, model: nn.Module):
        self.layers = []
        for module in model.modules():
            form = next((form for find in _FINDERS if (form := find(module)) is not None), None)
            if form is not None:
                self.layers.append(Wrapping(module, functools.partial(form, module)))

    def remove(self) -> None:
        """Let every layer run its own forward."""
        for layer in self.layers:
            layer.remove()
        self.layers = []


def geometry(layer: nn.Module) -> Geometry | None:
    """Stride, padding, dilation and groups of a two-dimensional convolution that pads with zeros.

    None for every other module: subclasses may pad in their own way.
    """
    if own_class(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    return layer.stride, layer.padding, layer.dilation, layer.groups


def _form_of(module: nn.Module) -> Form | None:
    if geometry(module) is not None:
        return _conv_forward
    # timm's batch norms end with dropout and activation.
    parts = [name for name, _ in module.named_children()]
    with_activation = isinstance(module, nn.BatchNorm2d) and parts == ["drop", "act"]
    return _norm_forward if own_class(module) in _NORMS or with_activation else None


register_form(_form_of)


def _conv_forward(layer: nn.Conv2d, stock, *args, **kwargs) -> torch.Tensor:
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


def _norm_forward(module: nn.Module, stock, *args, **kwargs) -> torch.Tensor:
    """x (B, channels, ...), same shape out; the module's own forward if its weight trains or in training."""
    frozen = module.weight is None or not module.weight.requires_grad
    fixed = not module.training and module.running_var is not None and torch.is_grad_enabled()
    if kwargs or len(args) != 1 or not (frozen and fixed):
        return stock(*args, **kwargs)
    (x,) = args
    y = _FrozenNorm.apply(x, module.weight, module.bias, module.running_mean, module.running_var, module.eps)
    return module.act(module.drop(y)) if hasattr(module, "act") else y


def conv_gradients(
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
        grad_x, _, grad_bias = conv_gradients(
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
        none = var.new_empty(0)  # statistics of the batch, which are not used
        # Only the weight's gradient reads the input, so `grad` takes its place.
        grad_x, _, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, grad, weight, mean, var, none, none, False, ctx.eps, [need_x, False, need_bias]
        )
        return grad_x, None, grad_bias, None, None, None
