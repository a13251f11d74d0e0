"""Costs of one training step of a method, counted on fake tensors before anything is downloaded or trained.

Next to our figures are those of the profiler of arXiv 2507.23536 for the same step.  They differ in two ways:
its weight gradients of depthwise convolutions count `groups` times too much, while it does not count singular
value decompositions, and its "peak memory" is the sum of each category's own maximum, whenever that occurs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pandas as pd

from toolkit.budget import LeanForms
from toolkit.budget.fakes import Others, on_fake_tensors
from toolkit.budget.optimizers import optimizer_like
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast.step import step_of
from toolkit.measure import FlopCounter
from toolkit.measure.memory import memory_of_step
from toolkit.methods import check_batch_norms, summarize
from toolkit.methods.optimizer import optimizer_flops

# The setting of arXiv 2507.23536 as far as it is known: with rank 1, ten classes and frozen depthwise layers,
# LoRA's memory is within five points of the published one.
PUBLISHED_SETTING = {"rank": 1, "alpha": 1, "depthwise": "freeze"}
# Column of `cost_table` -> the figure whose change from full fine-tuning it shows.
CHANGES = {
    "peak_change_pct": "peak_bytes",
    "published_bytes_change_pct": "published_bytes",
    "flops_change_pct": "flops",
    "published_flops_change_pct": "published_flops",
}


@dataclass(frozen=True)
class StepCosts:
    """Costs of one step of a whole batch: FLOPs, bytes, numbers of parameters."""

    forward_flops: int
    backward_flops: int
    optimizer_flops: int  # with projections, and one step's share of a decomposition
    svd_flops: int  # one choice of all of an optimizer's subspaces; 0 without such
    published_flops: int  # by the counter of arXiv 2507.23536
    corrected_flops: int  # by that counter, with the weight gradient of grouped convolutions corrected
    peak_bytes: int  # the highest simultaneous sum, at a step that chooses subspaces
    category_peaks: dict[str, int]  # category -> bytes at its own highest moment
    trainable: int
    total: int

    @property
    def flops(self) -> int:
        """Forward pass, backward pass and optimizer."""
        return self.forward_flops + self.backward_flops + self.optimizer_flops

    @property
    def published_bytes(self) -> int:
        """The sum of the categories' maxima, which is published as the peak."""
        return sum(self.category_peaks.values())

    @property
    def gradient_bytes(self) -> int:
        """The most bytes of gradients that exist at once."""
        return self.category_peaks.get("gradients", 0)


def step_costs(
    backbone: str,
    method: str,
    *,
    batch_size: int,
    num_classes: int = 10,
    image_size: int | None = None,
    lean: bool = False,
    **options: object,
) -> StepCosts:
    """Costs of one fp32 step of `method` on `backbone`: its optimizer, cross-entropy, no checkpointing.

    `image_size`: pixels of a side, by default what the backbone's weights were made for.  `lean`: with the
    memory-minimal exact forms of layers that `planned` uses; by default stock torch and peft.  `options`:
    fields of `Experiment`, of which a method ignores what is not its own.  Raises `InputError` for names,
    options and sizes that cannot be run.
    """
    if num_classes < 2:
        raise InputError(f"num_classes must be at least 2, got {num_classes}.")
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size must be a positive number of pixels, got {image_size}.")
    experiment = Experiment.flat(
        backbone=backbone, method=method, batch_size=batch_size, checkpointing="none", device="cpu", **options
    )
    return _count(experiment, num_classes, image_size, lean)


@functools.cache
def _count(experiment: Experiment, num_classes: int, image_size: int | None, lean: bool) -> StepCosts:
    step = step_of(experiment, num_classes)
    images, labels = step.batch
    if image_size is not None:
        images = images.new_zeros(*images.shape[:2], image_size, image_size)
    check_batch_norms(step.model, [len(images)], tuple(images.shape[1:]))
    make_optimizer = optimizer_like(step.optimizer, step.model)
    # Our optimizers hide their operators from the counters.
    ours, published, corrected = map(FlopCounter, ({}, PUBLISHED_COUNTER, CORRECTED_COUNTER))
    forms = LeanForms(step.model) if lean else None
    try:
        with on_fake_tensors(step.model, (images, labels), Others(step.optimizer)) as batch:
            memory = memory_of_step(step.model, batch, step.loss, make_optimizer, ours, published, corrected)
    finally:
        if forms:
            forms.remove()
    spent, sizes, flops = optimizer_flops(step.optimizer), summarize(step.model), ours.flops
    return StepCosts(
        forward_flops=flops.forward,
        backward_flops=flops.backward + flops.recompute,
        optimizer_flops=spent.adam + spent.projection + spent.svd_per_refresh // spent.gap,
        svd_flops=spent.svd_per_refresh,
        published_flops=published.flops.total + spent.projection,
        corrected_flops=corrected.flops.total + spent.projection,
        peak_bytes=memory.peak_bytes,
        category_peaks=dict(memory.category_peaks),
        trainable=sizes.trainable,
        total=sizes.total,
    )


def cost_table(
    backbones: Sequence[str], methods: Sequence[str], batch_sizes: Sequence[int], **options: object
) -> pd.DataFrame:
    """`step_costs` of all combinations, one row each, and what each changes from full fine-tuning.

    Columns: `backbone`, `method`, `batch_size`, the figures of `StepCosts` except for `category_peaks`, and
    `CHANGES` in per cent of `full`: the true peak and FLOPs, and the published ones.  `options`, and what is
    raised: as for `step_costs`.
    """
    rows = []
    for backbone, batch_size in itertools.product(backbones, batch_sizes):
        full = step_costs(backbone, "full", batch_size=batch_size, **options)
        for method in methods:
            costs = step_costs(backbone, method, batch_size=batch_size, **options)
            rows.append(dict(backbone=backbone, method=method, batch_size=batch_size) | _row(costs, full))
    return pd.DataFrame(rows)


def _row(costs: StepCosts, full: StepCosts) -> dict:
    figures = {f.name: getattr(costs, f.name) for f in fields(costs) if f.name != "category_peaks"}
    figures |= {name: getattr(costs, name) for name in ("flops", "published_bytes", "gradient_bytes")}
    changes = {name: 100 * (getattr(costs, of) / getattr(full, of) - 1) for name, of in CHANGES.items()}
    return figures | changes


def _matmul(m: int, n: int, k: int) -> int:
    return 2 * m * n * k - m * k


def _published_mm(a, b, *, out_val) -> int:
    return _matmul(*a.shape, b.shape[1])


def _published_addmm(bias, a, b, *, out_val, **scales) -> int:
    return _matmul(*a.shape, b.shape[1]) + bias.shape[0] * a.shape[1]


def _published_convolution(x, weight, bias, *rest, out_val) -> int:
    per_pixel = weight.numel() + (out_val.shape[1] if bias is not None else 0)
    return 2 * x.shape[0] * math.prod(out_val.shape[2:]) * per_pixel


def _published_convolution_backward(grad, x, weight, *rest, out_val) -> int:
    """The weight gradient as if every output channel saw every input channel: `groups` times too much."""
    mask = rest[-1]
    input_gradient = 2 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel()
    weight_gradient = 2 * x.shape[1] * grad.numel() * math.prod(weight.shape[2:])
    return mask[0] * input_gradient + mask[1] * weight_gradient


def _corrected_convolution_backward(grad, x, weight, *rest, out_val) -> int:
    input_gradient = 2 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel()
    return (rest[-1][0] + rest[-1][1]) * input_gradient


def _published_batch_norm(x, weight, bias, *rest, out_val) -> int:
    return x.numel() * (6 + weight.requires_grad + bias.requires_grad) + 2 * x.shape[1]


def _published_batch_norm_backward(grad, x, weight, *rest, out_val) -> int:
    return x.numel() * (4 + weight.requires_grad) + x.shape[1] * (1 + weight.requires_grad)


# The operators that the profiler of arXiv 2507.23536 knows, and what it counts for them.
PUBLISHED_COUNTER = {
    "aten.mm": _published_mm,
    "aten.addmm": _published_addmm,
    "aten.convolution": _published_convolution,
    "aten.convolution_backward": _published_convolution_backward,
    "aten.native_batch_norm": _published_batch_norm,
    "aten.native_batch_norm_backward": _published_batch_norm_backward,
    "aten.add": lambda a, b, *, out_val, **_: 2 * a.numel(),
    "aten.add_": lambda a, b, *, out_val, **_: 2 * a.numel(),
    "aten.mul": lambda a, b, *, out_val: out_val.numel(),
    "aten.mul_": lambda a, b, *, out_val: out_val.numel(),
}
CORRECTED_COUNTER = PUBLISHED_COUNTER | {"aten.convolution_backward": _corrected_convolution_backward}
