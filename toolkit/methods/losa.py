"""LoSA: low-rank mixers refine the features of a frozen backbone (Mercea, Gritsenko, Schmid, Arnab 2024,
"Time-, Memory- and Parameter-Efficient Visual Adaptation", arXiv 2402.02887).

    y_0 = the features that the head reads,   y_i = y_(i-1) + g_i(b_i + y_(i-1)),   b_i: output of block i
    g(X) = C + T,   C = gelu(LN(X) W1) W2,   T = (gelu(LN(X + C)^T V1) V2)^T

C mixes channels and T tokens.  W2 and V2 start at zero: training starts from the linear probe, bit for bit.
The official code is not released.  Our reading: y_0 are the final features and g has no residual of its own
(otherwise training would not start from them); LN has no scale or shift, since W1 and V1 can have both;
features of other widths go through a trained low-rank map first, and maps are averaged to the final positions
(see `taps`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.errors import option
from toolkit.methods.registry import NOT_TRIED, rates, register, searched
from toolkit.methods.side import SideModel, TapOptions, low_rank, reading_taps, silent

EPS = 1e-6  # of layer norms, as in vision transformers


@dataclass(frozen=True)
class LosaOptions(TapOptions):
    """Options of LoSA."""

    rank: int = option(8, "rank of the mixers", between=(1, 4096))


def losa(model: nn.Module, options: LosaOptions) -> SideModel:
    """A mixer for each tapped block next to `model`, which is modified in place."""
    return reading_taps(model, options, lambda taps: Refinement(taps.widths, taps.positions, options.rank))


class Refinement(nn.Module):
    """Mixers, one per tapped block: features of `widths`, (B, N, C_i), the final ones last -> (B, N, C)."""

    def __init__(self, widths: tuple[int, ...], positions: int, rank: int):
        super().__init__()
        *read, final = widths
        self.mixers = nn.ModuleList(Mixer(width, final, positions, rank) for width in read)

    def forward(self, unread: list[torch.Tensor]) -> torch.Tensor:
        y = unread.pop()
        for mixer in self.mixers:
            y = mixer(unread.pop(0), y)
        return y


class Mixer(nn.Module):
    """y + g(b + y) for features b (B, N, C_b) and y (B, N, C)."""

    def __init__(self, width_in: int, width: int, positions: int, rank: int):
        super().__init__()
        self.widen = low_rank(width_in, width, rank) if width_in != width else nn.Identity()
        self.channels_in = nn.Linear(width, rank)
        self.channels_out = silent(nn.Linear(rank, width, bias=False))
        self.tokens_in = nn.Linear(positions, rank)
        self.tokens_out = silent(nn.Linear(rank, positions, bias=False))

    def forward(self, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.widen(b) + y
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():
            return y + self.change(x)
        # Only x is kept for backward: norms and products of low rank cost less to compute again than to keep.
        return y + checkpoint(self.change, x, use_reentrant=False, preserve_rng_state=False)

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """g(x), (B, N, C)."""
        channels = self.channels_out(F.gelu(self.channels_in(_normed(x))))  # (B, N, C)
        # Products of batches: matmul would copy its input to make it a single product.
        weight_in, weight_out = (
            layer.weight.expand(len(x), -1, -1) for layer in (self.tokens_in, self.tokens_out)
        )
        codes = torch.baddbmm(self.tokens_in.bias[:, None], weight_in, _normed(x + channels))  # (B, r, C)
        return channels + torch.bmm(weight_out, F.gelu(codes))


def _normed(x: torch.Tensor) -> torch.Tensor:
    """Layer norm over channels without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


register(
    "losa",
    losa,
    searched(demo_vit=2e-2) | rates(f"the paper does not say; {NOT_TRIED}", default=1e-3),
    LosaOptions,
    tasks=("classification",),
    frozen_backbone=True,
    frozen_features=True,
)
