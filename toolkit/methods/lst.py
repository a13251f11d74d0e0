"""LST: a small transformer next to the backbone reads its blocks like the rungs of a ladder (Sung, Cho,
Bansal 2022, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv
2206.06522).

    h_1 = B_1(D_1 b_1),   h_i = B_i(s_i h_(i-1) + (1 - s_i) D_i b_i),   s_i = sigmoid(a_i / 0.1)
    y = final features + U h,   b_i: output of tapped block i,   a_i = 0 at first

D_i are linear maps to the width d / reduction, B_i transformer blocks of that width.  U starts at zero, so
training starts from the linear probe: our choice, as is that the first rung reads the first tapped block and
not the embedding.  The maps D_i train, so the features that they read are kept for backward; nothing inside
the backbone is.  All starts at random: the paper prunes B_i from the backbone by Fisher information, which
takes data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from toolkit.errors import InputError, option
from toolkit.methods.registry import rates, register, searched
from toolkit.methods.side import SideModel, TapOptions, reading_taps, silent
from toolkit.methods.taps import Taps

TEMPERATURE = 0.1  # of the gates
HEAD_WIDTH = 8  # channels of an attention head, at least
_MLP_RATIO = 4


@dataclass(frozen=True)
class LstOptions(TapOptions):
    """Options of LST."""

    reduction: int = option(8, "the ladder's width is the backbone's over this", between=(1, 4096))


def lst(model: nn.Module, options: LstOptions) -> SideModel:
    """A ladder with one rung per tapped block next to `model`, which is modified in place."""

    def ladder(taps: Taps) -> Ladder:
        width, remainder = divmod(taps.final.width, options.reduction)
        if remainder:
            raise InputError(
                f"reduction {options.reduction} does not divide the {taps.final.width} channels of "
                f"{type(model).__name__}; choose a divisor."
            )
        return Ladder(taps.widths, width)

    return reading_taps(model, options, ladder)


class Ladder(nn.Module):
    """Features of `widths`, (B, N, C_i), the final ones last -> (B, N, C)."""

    def __init__(self, widths: tuple[int, ...], width: int):
        super().__init__()
        *read, final = widths
        self.rungs = nn.ModuleList(Rung(each, width, first=i == 0) for i, each in enumerate(read))
        self.up = silent(nn.Linear(width, final))

    def forward(self, unread: list[torch.Tensor]) -> torch.Tensor:
        h = None
        for rung in self.rungs:
            h = rung(unread.pop(0), h)
        return unread.pop() + self.up(h)


class Rung(nn.Module):
    """B(s h + (1 - s) D b) for features b (B, N, C_b) and h (B, N, C), or B(D b) for the first."""

    def __init__(self, width_in: int, width: int, first: bool):
        from timm.models.vision_transformer import Block  # timm takes seconds to import

        super().__init__()
        self.down = nn.Linear(width_in, width)
        if not first:
            self.gate = nn.Parameter(torch.zeros(1))
        self.block = Block(width, _heads(width), mlp_ratio=_MLP_RATIO, qkv_bias=True)

    def forward(self, b: torch.Tensor, h: torch.Tensor | None) -> torch.Tensor:
        x = self.down(b)
        if h is not None:
            x = torch.lerp(x, h.to(x.dtype), torch.sigmoid(self.gate / TEMPERATURE).to(x.dtype))
        return self.block(x)


def _heads(width: int) -> int:
    """The largest number of heads of at least `HEAD_WIDTH` channels that divides `width`."""
    return max((n for n in range(1, width + 1) if width % n == 0 and width // n >= HEAD_WIDTH), default=1)


register(
    "lst",
    lst,
    searched(demo_vit=2e-2) | rates("authors' scripts of arXiv 2206.06522, for T5", default=3e-3),
    LstOptions,
    tasks=("classification",),
    frozen_backbone=True,
    frozen_features=True,
)
