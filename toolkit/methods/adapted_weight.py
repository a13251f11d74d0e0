"""Adapted layers whose `weight` is the adapted one.

Some models read the weight of a layer without calling the layer: the attention of BEiT and SwinV2,
`nn.MultiheadAttention`, torch's fast path of a transformer encoder in evaluation.  peft's adapters act in the
layer's forward and show the base weight, so there they would do nothing, and say nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from toolkit.methods.lean import unpacked_weight


def show_adapted_weight(layer: nn.Module) -> None:
    """Let `weight` (and of IA3 also `bias`) of a peft layer be what merging would make it."""
    layer.__class__ = _showing(type(layer))


@functools.cache
def _showing(kind: type) -> type:
    attributes = {
        "weight": property(_weight),
        "bias": property(_bias),
        "__reduce_ex__": lambda layer, protocol: (_new, (kind,), layer.__dict__),  # to copy and pickle
    }
    return type(kind.__name__, (kind,), attributes)


def _new(kind: type) -> nn.Module:
    shown = _showing(kind)
    return shown.__new__(shown)


def _active(layer: nn.Module) -> list[str]:
    return [] if layer.disable_adapters or layer.merged else layer.active_adapters


def _scaled(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`tensor` (out, ...) times one of `factors` per output."""
    return tensor * factors.reshape(-1, *[1] * (tensor.dim() - 1))


def _weight(layer: nn.Module) -> torch.Tensor:
    base = layer.get_base_layer()
    weight = unpacked_weight(base)
    for name in _active(layer):
        if hasattr(layer, "ia3_l"):
            weight = _scaled(weight, layer.ia3_l[name])
            continue
        weight = weight + layer.get_delta_weight(name)
        if name in getattr(layer, "lora_variant", {}):  # DoRA, whose norm counts as a constant
            norm = torch.linalg.vector_norm(weight.detach().flatten(1), dim=1)
            weight = _scaled(weight, layer.lora_magnitude_vector[name].weight.flatten() / norm)
    return weight


def _bias(layer: nn.Module) -> torch.Tensor | None:
    bias = layer.get_base_layer().bias
    if bias is not None and hasattr(layer, "ia3_l"):
        for name in _active(layer):
            bias = _scaled(bias, layer.ia3_l[name])
    return bias
