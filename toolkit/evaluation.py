"""`evaluate()`: accuracy, loss and cost of a model over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from toolkit.backbones import data_config
from toolkit.budget import DeviceMemory, device_memory, format_bytes, is_out_of_memory, tensors_of
from toolkit.budget.step import autocast
from toolkit.datasets import Splits, loader
from toolkit.experiment import Experiment
from toolkit.measure import FlopCounter, Meter, Window

if TYPE_CHECKING:
    from toolkit.baselines.evaluate import Prepared
    from toolkit.fit_result import FitResult


@dataclass
class Evaluation:
    """Metrics of one pass over a split; `predictions` and `labels` are int64 (N,), `confidences` their
    probabilities under a softmax of the scores, float64 (N,)."""

    top1_pct: float
    top5_pct: float | None  # None where the model names one class only
    loss: float | None  # cross-entropy; None where its scores give no probabilities
    window: Window
    peak_bytes: int | None  # None where costs were not asked for
    macs_per_image: float | None  # multiply-adds; likewise
    predictions: torch.Tensor
    confidences: torch.Tensor | None  # None where its scores give no probabilities
    labels: torch.Tensor

    @property
    def seconds(self) -> float:
        """Time of the whole pass, data loading included."""
        return self.window.seconds

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", peak {format_bytes(self.peak_bytes)}"
        top5 = "" if self.top5_pct is None else f"top-5 {self.top5_pct:.2f} %, "
        loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
        return (
            f"top-1 {self.top1_pct:.2f} %, {top5}{loss}"
            f"{len(self.labels):,} images in {self.seconds:.2f} s{peak}"
        )


def evaluate(
    model: nn.Module,
    batches: DataLoader,
    *,
    precision: str = "fp32",
    meter: Meter | None = None,
    costs: bool = True,
) -> Evaluation:
    """Accuracy, loss and cost of `model` over `batches` of `(images, labels)`, on the model's device.

    `images`: what the model takes, a tensor or anything with `.to(device)`; it returns scores (B, classes).

    With `costs`, memory and multiply-adds are counted on the first batch, before the clock starts.  No
    other exceeds it, unless the model's work depends on what it sees, as that of generated answers does;
    on CUDA the peak is of all batches.
    """
    device = next(model.parameters()).device
    model.eval()
    memory, macs_per_image = _costs(model, batches, precision) if costs else (None, None)
    logits, labels = [], []
    with torch.inference_mode(), (meter or Meter(device)).window("evaluate") as window:
        for images, batch_labels in batches:
            with autocast(device, precision):
                logits.append(model(images.to(device)).float().cpu())
            labels.append(batch_labels)
    scores, labels = torch.cat(logits).double(), torch.cat(labels)  # (N, classes), (N,)
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = ranked == labels[:, None]
    return Evaluation(
        top1_pct=100 * hits[:, 0].double().mean().item(),
        top5_pct=100 * hits.any(1).double().mean().item(),
        loss=F.cross_entropy(scores, labels).item(),
        window=window,
        peak_bytes=memory and memory.peak_bytes,
        macs_per_image=macs_per_image,
        predictions=ranked[:, 0].clone(),
        confidences=scores.softmax(1).amax(1),
        labels=labels,
    )


@torch.no_grad()  # in inference mode the CPU's counter does not see into composite operators
def _costs(model: nn.Module, batches: DataLoader, precision: str) -> tuple[DeviceMemory, float]:
    """The memory whose peak is of the first batch, and that batch's multiply-adds per image."""
    device = next(model.parameters()).device
    memory, counter = device_memory(device), FlopCounter()
    memory.track(tensors_of(model))
    memory.reset_peak()
    images, labels = next(iter(batches))
    images = images.to(device)
    memory.track(images.values() if isinstance(images, Mapping) else [images])
    with memory, counter, autocast(device, precision):
        model(images)
    return memory, counter.flops.macs / len(labels)


def evaluate_split(
    model: nn.Module, splits: Splits, split: str, experiment: Experiment, meter: Meter | None = None
) -> Evaluation:
    """`evaluate` on one split of the experiment's data, prepared as the backbone asks."""
    batches = loader(
        getattr(splits, split), data_config(model), splits.policy, batch_size=experiment.batch_size
    )
    return evaluate(model, batches, precision=experiment.precision, meter=meter)


def test(
    model: nn.Module,
    splits: Splits,
    experiment: Experiment,
    result: FitResult,
    meter: Meter | None = None,
) -> Evaluation | None:
    """Evaluate on the test split, once, if training ended `ok`; None if it did not.

    Running out of memory here, or a loss that is not finite, becomes the status of `result`.
    """
    return attempt(result, lambda: evaluate_split(model, splits, "test", experiment, meter))


def attempt(result: FitResult | Prepared, test: Callable[[], Evaluation]) -> Evaluation | None:
    """`test()`, if all went well so far; None, with a status and an error in `result`, if it does not."""
    if result.status != "ok":
        return None
    try:
        evaluation = test()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result.status, result.error = "oom", f"in the test: {str(error).splitlines()[0]}"
        return None
    if not math.isfinite(evaluation.loss):
        result.status, result.error = "nan", f"test loss {evaluation.loss}"
        return None
    return evaluation
