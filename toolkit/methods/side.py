"""Models that adapt beside a frozen backbone: what is shared by `losa`, `lst` and `dtl`.

Low-rank updates inside a backbone save gradients and optimizer state, but to train them backward has to
run through every block, and so almost all activations are kept.  A side network reads what the blocks
compute and is all that backward sees: of the backbone nothing is kept.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import nn

from toolkit.budget import find_blocks
from toolkit.errors import InputError
from toolkit.methods.low_rank import quantise
from toolkit.methods.taps import Survey, Taps
from toolkit.methods.trainable import linear


class OnFrozen(nn.Module):
    """A frozen backbone, always in evaluation mode, a trained network beside it, and the head.

    `backbone` computes features, `head` reads them: the model's `forward_head` with the modules that it
    calls, of which the classifier trains.  `side` is what is added.
    """

    def __init__(self, model: nn.Module, survey: Survey, side: nn.Module):
        super().__init__()
        linear(model)
        head = _head_of(model, survey.head)
        self.backbone, self.side, self.head = model, side, head
        self.train(model.training)

    @property
    def pretrained_cfg(self) -> dict:
        """The backbone's: what images it wants."""
        return self.backbone.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        return self.head.get_classifier()

    def train(self, mode: bool = True) -> OnFrozen:
        super().train(mode)
        self.backbone.eval()
        return self


class SideModel(OnFrozen):
    """A model that reads taps of its backbone: gradients never enter that.

    `side`: takes a list of features as `features` returns them, which it empties as it reads, and returns
    features (B, N, C) for the head.
    """

    def __init__(self, model: nn.Module, survey: Survey, taps: Taps, side: nn.Module):
        super().__init__(model, survey, side)
        self.taps = taps

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the side network reads of images (B, 3, H, W): the tapped features (B, N, C_i), in the order
        of the blocks, and the final ones (B, N, C) last, without a graph."""
        with torch.no_grad():
            return self.taps.collect(self.backbone, images)

    def from_features(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits (B, K) of what `features` returned."""
        unread = list(features)
        del features  # so that each is let go when it has been read
        return self.head.forward_head(self.taps.for_head(self.side(unread)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.from_features(self.features(images))


def low_rank(width_in: int, width_out: int, rank: int) -> nn.Sequential:
    """A linear map of features (..., C_in) -> (..., C_out) through `rank` numbers, without bias."""
    return nn.Sequential(nn.Linear(width_in, rank, bias=False), nn.Linear(rank, width_out, bias=False))


def silent(layer: nn.Linear) -> nn.Linear:
    """`layer`, which gives 0 until it is trained."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def to_four_bits(model: nn.Module) -> None:
    """Store the linear layers of the blocks of `model` in NF4, of these what `four_bit_targets` of its class
    names, if it does.

    Raises `InputError` where there is none, or one that cannot be packed.
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
            f"four_bit_backbone packs linear layers, and the blocks of {type(model).__name__} have none; "
            "choose four_bit_backbone=False."
        )
    quantise(model, names, double_quantisation=False)


def check_positive(**options: int) -> None:
    """Raise `InputError` for an option below 1."""
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")


def _head_of(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """What `forward_head` of `model` needs, with the children `names`, which `model` loses."""
    head = copy.copy(model)
    head._parameters, head._buffers, head._modules = {}, {}, {}
    for name in names:
        head._modules[name] = model._modules.pop(name)
    return head
