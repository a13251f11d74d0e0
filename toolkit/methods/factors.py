"""Adapters that multiply: IA3 (a factor per channel) and LoKr (Kronecker products)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from toolkit.errors import Options, option
from toolkit.methods.low_rank import attach
from toolkit.methods.registry import NOT_TRIED, rates, register, searched
from toolkit.methods.targets import targets_of


@dataclass(frozen=True)
class Ia3Options(Options):
    """Options of IA3."""

    targets: str = option("", "pattern of the whole names of layers to adapt; empty: the backbone's own")


@dataclass(frozen=True)
class LokrOptions(Options):
    """Options of LoKr."""

    rank: int = option(8, "rank of the second factor", between=(1, 4096))
    alpha: int = option(16, "updates are scaled by alpha / rank", between=(1, 65536))
    targets: str = option("", "pattern of the whole names of layers to adapt; empty: the backbone's own")


def ia3(model: nn.Module, options: Ia3Options) -> nn.Module:
    """A factor for each output channel of each layer (Liu et al. 2022, arXiv 2205.05638).

    The paper scales keys, values and the inside of MLPs; timm's attention computes queries, keys and values
    in one layer, so all are scaled.
    """
    return attach(model, targets_of(model, "ia3", options.targets), "IA3Config", feedforward_modules=[])


def lokr(model: nn.Module, options: LokrOptions) -> nn.Module:
    """Updates alpha / rank · W1 ⊗ W2 (LyCORIS, Yeh et al. 2023, arXiv 2309.14859).

    The sides of W1 and W2 are those factors of the layer's sides that are nearest each other.  W2 is a
    product of rank `rank` where that is less than half of its longer side, and whole elsewhere: no rank is
    too high.
    """
    targets = targets_of(model, "lokr", options.targets)
    adapted = attach(model, targets, "LoKrConfig", r=options.rank, alpha=options.alpha)
    for module in adapted.modules():
        if hasattr(module, "lokr_w1"):
            # In training mode peft's LoKr draws a random number per layer even at a dropout of 0 and branches
            # on it, which changes the run's random numbers and cannot be planned.
            module.always_evaluates = True
    return adapted


register(
    "ia3",
    ia3,
    searched(demo_cnn_digits=2e-2, demo_cnn_textures=2e-2) | rates(NOT_TRIED, default=5e-3),
    Ia3Options,
    convolutions=("plain", "grouped", "same", "dilated", "padded"),
)
register(
    "lokr",
    lokr,
    searched(demo_cnn_digits=2e-2, demo_cnn_textures=2e-2) | rates(NOT_TRIED, default=1e-3),
    LokrOptions,
    convolutions=("plain", "grouped", "dilated"),
)
