"""E3VA: adapters on a highway next to a Swin transformer, without a backward pass through the backbone.

Yin et al., "Parameter-efficient is not sufficient: exploring parameter, memory, and time efficient adapter
tuning for dense predictions" (ACM MM 2024, arXiv 2306.09729).  There is no published code; where the text
does not say, this is our reading:

    of each block of the frozen trunk    a, m    outputs of (shifted) window attention and of the MLP
    in a stage, on the highway           h <- h + A(a),  h <- h + A'(m)
    between stages                       h <- P(x + h) - P(x)
    to the head, for each stage          x + h

with x the trunk's map, P its frozen patch merging, whose weights the highway inherits (backward runs through
its norm and product, but computes no gradients of them; the difference keeps h = 0 at 0, which P(h) alone
would not), and A the adapter with both projections factorised ("dual low-rank structure"):

    A(z) = gelu(z P1 Q1 + b1) P2 Q2 + b2,   P1 (d, r), Q1 (r, d'), P2 (d', r), Q2 (r, d)

Q2 and b2 start at 0, so training starts from the linear probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from toolkit.backbones.dense import DenseModel
from toolkit.errors import InputError, Options, option
from toolkit.methods.registry import NOT_TRIED, rates, register, searched
from toolkit.methods.taps import hooked
from toolkit.methods.trainable import linear


@dataclass(frozen=True)
class E3vaOptions(Options):
    """Options of E3VA."""

    rank: int = option(8, "rank of both factors of an adapter", between=(1, 4096))
    reduction: int = option(8, "an adapter's inside is the stage's width over this", between=(1, 4096))


class E3vaModel(DenseModel):
    """A `DenseModel` whose head reads the trunk's maps plus those of a highway of adapters.

    The trunk is frozen, without a graph, and always in evaluation mode.
    """

    def __init__(self, model: DenseModel, rank: int, reduction: int):
        super().__init__(model.trunk, model.head)
        self.highway = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(_adapter(block.dim, rank, block.dim // reduction) for _ in range(2))
                for block in stage.blocks
            )
            for stage in self.trunk.layers
        )

    def train(self, mode: bool = True) -> E3vaModel:
        super().train(mode)
        self.trunk.eval()
        return self

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """x + h of each stage, (B, H', W', C), the largest first."""
        with torch.no_grad():
            x = self.trunk.patch_embed(images)
        h, maps = None, []
        for stage, adapters in zip(self.trunk.layers, self.highway):
            if h is not None:
                with torch.no_grad():
                    merged = stage.downsample(x)
                h, x = stage.downsample(x + h) - merged, merged
            for block, pair in zip(stage.blocks, adapters):
                x, *branches = _run(block, x)
                for adapter, branch in zip(pair, branches):
                    change = adapter(branch).view(x.shape)
                    h = change if h is None else h + change
            maps.append(x + h)
        return maps


@torch.no_grad()
def _run(block: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output of a Swin block for x (B, H, W, C), and what its attention and its MLP added."""
    # Each branch ends in one of these modules, which do nothing in evaluation mode; a plan may have the block
    # run its batch in slices.
    branches = {"drop_path1": [], "drop_path2": []}
    hooks = {name: lambda *seen, parts=parts: parts.append(seen[-1]) for name, parts in branches.items()}
    with hooked(block, hooks):
        x = block(x)
    return x, *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in branches.values())


def _adapter(width: int, rank: int, middle: int) -> nn.Sequential:
    """(..., width) -> (..., width) through `middle`, by products of rank `rank`; zero at first."""
    adapter = nn.Sequential(
        nn.Linear(width, rank, bias=False),
        nn.Linear(rank, middle),
        nn.GELU(),
        nn.Linear(middle, rank, bias=False),
        nn.Linear(rank, width),
    )
    nn.init.zeros_(adapter[-1].weight)
    nn.init.zeros_(adapter[-1].bias)
    return adapter


def e3va(model: nn.Module, options: E3vaOptions) -> E3vaModel:
    """`model`, a dense model on a Swin transformer, with adapters; it shares trunk and head with the result.

    Raises `InputError` for another model, and for sizes that leave an adapter without a middle.
    """
    if not isinstance(model, DenseModel):
        raise InputError(
            f"method 'e3va' adapts dense models on Swin transformers, not {type(model).__name__}: choose a "
            "data set for segmentation or detection, or method 'losa' or 'lst' for classification."
        )
    narrowest = min(block.dim for stage in model.trunk.layers for block in stage.blocks)
    if options.reduction > narrowest:
        raise InputError(
            f"reduction {options.reduction} leaves the adapters of {narrowest} channels without a middle; "
            f"choose 1 to {narrowest}."
        )
    return E3vaModel(linear(model), options.rank, options.reduction)


register(
    "e3va",
    e3va,
    searched(demo_swin=1e-2)
    | rates(f"configurations of Mona, by E3VA's first author; {NOT_TRIED}", default=1e-4),
    E3vaOptions,
    tasks=("segmentation", "detection"),
    frozen_backbone=True,
)
