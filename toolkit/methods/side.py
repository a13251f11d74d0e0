"""Networks that train next to a frozen backbone: the parts that `losa`, `lst` and `dtl` share.

Low-rank updates inside a backbone save gradients and optimizer state, but their gradients run through every
block, so almost all activations are kept.  A side network reads the outputs of blocks and is all that
backward sees: nothing inside the backbone is kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.budget import find_blocks
from toolkit.errors import InputError, Options, option
from toolkit.methods.qlora import quantise
from toolkit.methods.taps import Survey, Taps, taps_of
from toolkit.methods.trainable import head_names, linear


@dataclass(frozen=True)
class SideOptions(Options):
    """Options of all side networks."""

    four_bit: bool = option(False, "linear layers in the frozen blocks are packed in four bits")


@dataclass(frozen=True)
class TapOptions(SideOptions):
    """Options of side networks that read taps."""

    taps: int = option(0, "blocks to read, spread evenly, the last included; 0: all", between=(0, 10_000))


class OnFrozen(nn.Module):
    """A frozen backbone, always in evaluation mode, a trained network next to it, and the head.

    `backbone` computes features; `head` reads them: the model's `forward_head` with the modules that it
    calls, of which the classifier trains.  `side` is the added network.
    """

    def __init__(self, model: nn.Module, survey: Survey, side: nn.Module):
        super().__init__()
        linear(model)
        head = _head_of(model, survey.head)
        self.backbone, self.side, self.head = model, side, head
        self.train(model.training)

    @property
    def pretrained_cfg(self) -> dict:
        """The backbone's configuration: size and normalisation of images."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        return self.head.get_classifier()

    def train(self, mode: bool = True) -> OnFrozen:
        super().train(mode)
        self.backbone.eval()
        return self


class SideModel(OnFrozen):
    """A model that reads taps of its backbone; gradients never enter the backbone.

    `side` reads a list of features as `features` returns them, emptying it, and returns features (B, N, C)
    for the head.
    """

    def __init__(self, model: nn.Module, survey: Survey, taps: Taps, side: nn.Module):
        super().__init__(model, survey, side)
        self.taps = taps

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The side network's input from images (B, 3, H, W), without a graph: the tapped features (B, N, C_i)
        in the order of the blocks, and the final ones (B, N, C) last."""
        with torch.no_grad():
            return self.taps.collect(self.backbone, images)

    def from_features(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K) of the result of `features`."""
        unread = list(features)
        del features  # each is released once it was read
        return self.head.forward_head(self.taps.for_head(self.side(unread)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.from_features(self.features(images))


def reading_taps(model: nn.Module, options: TapOptions, make_side: Callable[[Taps], nn.Module]) -> SideModel:
    """A side network, made for the taps of `model`, next to it; `model` is modified in place."""
    head_names(model)  # raises if there is none
    survey = Survey.of(model)
    taps = taps_of(model, survey, options.taps)
    with torch.device(next(model.parameters()).device):
        side = make_side(taps)
    if options.four_bit:
        to_four_bits(model)
    return SideModel(model, survey, taps, side)


def low_rank(width_in: int, width_out: int, rank: int) -> nn.Sequential:
    """A linear map of features (..., C_in) -> (..., C_out) through `rank` numbers, without bias."""
    return nn.Sequential(nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False))


def silent(layer: nn.Linear) -> nn.Linear:
    """`layer` with an output of 0 until it is trained."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def to_four_bits(model: nn.Module) -> None:
    """Store the linear layers in the blocks of `model` in NF4; only those named by the `four_bit_targets` of
    its class, if it has such.

    Raises `InputError` if there are none, or one cannot be packed.
    """
    inside = tuple(f"{name}." for name in find_blocks(model))
    pattern = getattr(model, "four_bit_targets", ".*")
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(inside) and re.fullmatch(pattern, name)
    ]
    if not names:
        raise InputError(
            f"four_bit packs linear layers, and the blocks of {type(model).__name__} have none; choose "
            "four_bit=False."
        )
    quantise(model, names, double_quantisation=False)


def _head_of(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A copy of `model` for `forward_head` with only the children `names`, which `model` loses."""
    head = copy.copy(model)
    head._parameters, head._buffers, head._modules = {}, {}, {}
    for name in names:
        head._modules[name] = model._modules.pop(name)
    return head
