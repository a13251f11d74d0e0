"""DTL: a compact path next to the backbone carries low-rank updates and feeds them back late (Fu, Zhu, Wu
2024, "DTL: Disentangled Transfer Learning for Visual Recognition", arXiv 2312.07856).

    h_(i+1) = h_i + B_i A_i x_i,   x_(i+1) = block_i(x_i) + swish(h_(i+1)), the sum only in the last blocks

x_i: input of block i; swish(h) = h sigmoid(100 h).  B_i starts at zero, so training starts from the linear
probe.  Blocks before the first feedback, and that block itself, run without a graph; gradients run through
the blocks behind it.  Published for transformers, whose features keep one shape: in a hierarchical backbone
the path is in the last stage, at the blocks that return features like the last block's and keep positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.errors import InputError, option
from toolkit.methods.registry import rates, register, searched
from toolkit.methods.side import OnFrozen, SideOptions, low_rank, silent, to_four_bits
from toolkit.methods.taps import CHANNELS_FIRST, Form, Survey, forms_of, hooked
from toolkit.methods.trainable import head_names

BETA = 100.0  # of swish, as in the authors' code


@dataclass(frozen=True)
class DtlOptions(SideOptions):
    """Options of DTL."""

    rank: int = option(8, "rank of the path's updates", between=(1, 4096))
    feedback: int = option(0, "last blocks with feedback; 0: half of those on the path", between=(0, 10_000))


def dtl(model: nn.Module, options: DtlOptions) -> DtlModel:
    """A path next to `model`, which is modified in place.

    Raises `InputError` for more feedback than blocks on the path.
    """
    head_names(model)  # raises if there is none
    survey = Survey.of(model)
    names, form, widths = _path(model, survey)
    if options.feedback > len(names):
        raise InputError(
            f"feedback is {options.feedback}, and the path of {type(model).__name__} has {len(names)} "
            f"blocks: choose 0 (half of them) to {len(names)}."
        )
    if options.four_bit:
        to_four_bits(model)
    with torch.device(next(model.parameters()).device):
        path = nn.ModuleList(low_rank(width, form.width, options.rank) for width in widths)
    for update in path:
        silent(update[1])
    return DtlModel(model, survey, path, names, form, options.feedback or -(-len(names) // 2))


def _path(model: nn.Module, survey: Survey) -> tuple[list[str], Form, list[int]]:
    """Names of the blocks on the path, the form of their outputs, and the widths of their inputs."""
    forms, _ = forms_of(model, survey)
    last, form = survey.blocks[-1], forms[-1]
    axis = 1 if form.layout == CHANNELS_FIRST else -1
    width = last.returned[axis]
    seen = []
    for block in survey.blocks:
        resized = list(block.read)
        if len(resized) == len(last.returned):
            resized[axis] = width
        if block.returned == last.returned == torch.Size(resized):
            seen.append(block)
    if not seen:
        raise InputError(
            f"{type(model).__name__} has no path for 'dtl': its last block, {last.name}, changes positions, "
            f"features {tuple(last.read)} to {tuple(last.returned)}; choose method 'losa', 'lst' or 'lora'."
        )
    return [b.name for b in seen], form, [b.read[axis] for b in seen]


class DtlModel(OnFrozen):
    """`side`: the path, one low-rank map for each block in `names`; the last `feedback` blocks get sums."""

    def __init__(
        self,
        model: nn.Module,
        survey: Survey,
        path: nn.ModuleList,
        names: list[str],
        form: Form,
        feedback: int,
    ):
        super().__init__(model, survey, path)
        self.names, self.form, self.feedback = names, form, feedback

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        carried: list[torch.Tensor] = []  # h, once there is one

        def before(update: nn.Module, module: nn.Module, args: tuple) -> None:
            h = self._updated(update, args[0])
            carried[:] = [carried[0] + h if carried else h]

        def after(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            # swish(h) = silu(100 h) / 100, for which autograd keeps one tensor.
            return output + F.silu(BETA * carried[0]) / BETA

        hooks = {name: partial(before, update) for name, update in zip(self.names, self.side)}
        with hooked(self.backbone, dict.fromkeys(self.names[-self.feedback :], after), hooks):
            features = self.backbone.forward_features(images)
        return self.head.forward_head(features)

    def _updated(self, update: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The path's update from x, in the layout of the blocks."""
        if self.form.layout != CHANNELS_FIRST:
            return update(x)
        return update(x.movedim(1, -1)).movedim(-1, 1)


register(
    "dtl",
    dtl,
    searched(demo_vit=1e-2) | rates("authors' scripts of arXiv 2312.07856", default=3e-4),
    DtlOptions,
    tasks=("classification",),
    frozen_backbone=True,
)
