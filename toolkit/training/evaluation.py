"""`evaluate()`: score, loss and cost of a model over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from toolkit.backbones import data_config
from toolkit.budget import DeviceMemory, device_memory, format_bytes, is_out_of_memory, tensors_of
from toolkit.budget.step import autocast
from toolkit.datasets import Splits, loader
from toolkit.datasets.tasks import TASKS, Task
from toolkit.experiment import Experiment
from toolkit.measure import FlopCounter, Meter, Window

if TYPE_CHECKING:
    from toolkit.baselines.evaluate import Prepared
    from toolkit.training.result import FitResult


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

    @property
    def score_pct(self) -> float:
        """By which runs are compared."""
        return self.top1_pct

    @property
    def fields(self) -> dict[str, float | None]:
        """What a record keeps of the quality."""
        return {"test_top1_pct": self.top1_pct, "test_top5_pct": self.top5_pct, "test_loss": self.loss}

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", peak {format_bytes(self.peak_bytes)}"
        top5 = "" if self.top5_pct is None else f"top-5 {self.top5_pct:.2f} %, "
        loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
        return (
            f"top-1 {self.top1_pct:.2f} %, {top5}{loss}"
            f"{len(self.labels):,} images in {self.seconds:.2f} s{peak}"
        )


@dataclass
class DenseEvaluation:
    """Metrics of one pass of segmentation or detection over a split.

    `scores`: see `dense.metrics`, in per cent; the one named `metric` is what runs are compared by.
    """

    metric: str
    scores: dict
    loss: float | None  # None of detectors, which compute it in training only
    images: int
    window: Window
    peak_bytes: int | None  # None where costs were not asked for
    macs_per_image: float | None  # multiply-adds; likewise

    @property
    def seconds(self) -> float:
        """Time of the whole pass, data loading and metrics included."""
        return self.window.seconds

    @property
    def score_pct(self) -> float | None:
        """By which runs are compared; None where no image has anything to be found."""
        return self.scores[self.metric]

    @property
    def fields(self) -> dict[str, float | None]:
        """What a record keeps of the quality."""
        scores = {f"test_{name}": value for name, value in self.scores.items() if not isinstance(value, list)}
        return scores | {"test_loss": self.loss}

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", peak {format_bytes(self.peak_bytes)}"
        scores = ", ".join(
            f"{name.removesuffix('_pct').replace('_', ' ')} {'–' if value is None else f'{value:.2f} %'}"
            for name, value in self.scores.items()
            if not isinstance(value, list)
        )
        return f"{scores}; {self.images:,} images in {self.seconds:.2f} s{peak}"


def evaluate(
    model: nn.Module,
    batches: DataLoader,
    *,
    task: Task = TASKS["classification"],
    num_classes: int = 0,
    precision: str = "fp32",
    meter: Meter | None = None,
    costs: bool = True,
) -> Evaluation | DenseEvaluation:
    """Score, loss and cost of `model` over `batches` of `(images, targets)`, on the model's device.

    `images`: what the model takes, a tensor or anything with `.to(device)`; a classifier returns scores
    (B, classes), for dense tasks see `dense.model`, and `num_classes` is that of the data set.

    With `costs`, memory and multiply-adds are counted on the first batch, before the clock starts.  No
    other exceeds it, unless the model's work depends on what it sees, as that of generated answers does;
    on CUDA the peak is of all batches.
    """
    device = next(model.parameters()).device
    model.eval()
    memory, macs_per_image = _costs(model, batches, precision) if costs else (None, None)
    if task.heads:
        return _evaluate_dense(model, batches, task, num_classes, precision, meter, memory, macs_per_image)
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


def _evaluate_dense(
    model: nn.Module,
    batches: DataLoader,
    task: Task,
    num_classes: int,
    precision: str,
    meter: Meter | None,
    memory: DeviceMemory | None,
    macs_per_image: float | None,
) -> DenseEvaluation:
    from toolkit.training.dense_scores import DetectionScore, SegmentationScore

    device = next(model.parameters()).device
    score, losses, images_seen = None, [], 0
    with torch.inference_mode(), (meter or Meter(device)).window("evaluate") as window:
        for images, targets in batches:
            with autocast(device, precision):
                outputs = model(images.to(device))
            if task.name == "segmentation":
                outputs = outputs.float().cpu()
                score = score or SegmentationScore(num_classes)
                losses.append(task.loss(outputs, targets).item() * len(images))
            else:
                score = score or DetectionScore(num_classes, masks="masks" in outputs[0])
            score.update(outputs, targets)
            images_seen += len(images)
        scores = score.result()
    return DenseEvaluation(
        metric=task.metric,
        scores=scores,
        loss=sum(losses) / images_seen if losses else None,
        images=images_seen,
        window=window,
        peak_bytes=memory and memory.peak_bytes,
        macs_per_image=macs_per_image,
    )


@torch.no_grad()  # in inference mode the CPU's counter does not see into composite operators
def _costs(model: nn.Module, batches: DataLoader, precision: str) -> tuple[DeviceMemory, float]:
    """The memory whose peak is of the first batch, and that batch's multiply-adds per image."""
    device = next(model.parameters()).device
    memory, counter = device_memory(device), FlopCounter()
    memory.track(tensors_of(model))
    memory.reset_peak()
    images, targets = next(iter(batches))
    images = images.to(device)
    memory.track(images.values() if isinstance(images, Mapping) else [images])
    with memory, counter, autocast(device, precision):
        model(images)
    return memory, counter.flops.macs / len(next(iter(tree_leaves(targets))))


def evaluate_split(
    model: nn.Module, splits: Splits, split: str, experiment: Experiment, meter: Meter | None = None
) -> Evaluation | DenseEvaluation:
    """`evaluate` on one split of the experiment's data, prepared as the backbone asks."""
    batches = loader(
        getattr(splits, split), data_config(model), splits.policy, batch_size=experiment.batch_size
    )
    return evaluate(
        model, batches, task=TASKS[splits.task], num_classes=len(splits.classes),
        precision=experiment.precision, meter=meter,
    )  # fmt: skip


def test(
    model: nn.Module,
    splits: Splits,
    experiment: Experiment,
    result: FitResult,
    meter: Meter | None = None,
) -> Evaluation | DenseEvaluation | None:
    """Evaluate on the test split, once, if training ended `ok`; None if it did not.

    Running out of memory here, or a loss that is not finite, becomes the status of `result`.
    """
    return attempt(result, lambda: evaluate_split(model, splits, "test", experiment, meter))


def attempt(
    result: FitResult | Prepared, test: Callable[[], Evaluation | DenseEvaluation]
) -> Evaluation | DenseEvaluation | None:
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
    if evaluation.loss is not None and not math.isfinite(evaluation.loss):
        result.status, result.error = "nan", f"test loss {evaluation.loss}"
        return None
    return evaluation
