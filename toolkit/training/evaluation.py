"""`evaluate()`: score, loss and cost of a model over a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from toolkit.backbones import data_config
from toolkit.budget import DeviceMemory, device_memory, format_bytes, is_out_of_memory, tensors_of
from toolkit.budget.step import autocast
from toolkit.datasets import Splits, loader
from toolkit.datasets.tasks import TASKS, Task
from toolkit.experiment import Experiment
from toolkit.measure import FlopCounter, Meter, Window
from toolkit.measure.quantities import QUANTITIES
from toolkit.training.result import FitResult
from toolkit.training.task_scores import TASK_SCORES, ImageMeans


@dataclass
class Evaluation:
    """Metrics and cost of one pass over a split."""

    metric: str  # the one that runs are compared by
    scores: dict[str, float | None]  # by metric, see `measure.quantities`; None if nothing could be scored
    loss: float | None  # None if the outputs have no loss in a test
    images: int
    window: Window
    peak_bytes: int | None  # None if costs were not asked for
    macs_per_image: float | None  # multiply-adds; likewise
    uncounted: tuple[str, ...]  # operators that are not in them, since they have no formula
    # Of classifiers only:
    predictions: torch.Tensor | None = None  # int64 (N,)
    labels: torch.Tensor | None = None  # int64 (N,)
    confidences: torch.Tensor | None = None  # float (N,), probabilities of the predicted classes

    @property
    def seconds(self) -> float:
        """Time of the whole pass, data loading and metrics included."""
        return self.window.seconds

    @property
    def score_pct(self) -> float | None:
        """The score that runs are compared by."""
        return self.scores[self.metric]

    @property
    def top1_pct(self) -> float:
        """Accuracy of a classifier."""
        return self.scores["top1_pct"]

    @property
    def top5_pct(self) -> float | None:
        """Top-5 accuracy of a classifier; None if the model names one class only."""
        return self.scores["top5_pct"]

    def per_class(self, classes: Sequence[str]) -> pd.DataFrame:
        """Images and accuracy of each class of a classifier, the least accurate first."""
        right = pd.Series((self.predictions == self.labels).numpy()).groupby(self.labels.numpy())
        table = pd.DataFrame({"images": right.size(), "accuracy_pct": 100 * right.mean()})
        table.index = pd.Index([classes[label] for label in table.index], name="class")
        return table.sort_values("accuracy_pct")

    @property
    def fields(self) -> dict[str, float | None]:
        """The fields under `quality` of a record."""
        return {f"test_{name}": value for name, value in self.scores.items()} | {"test_loss": self.loss}

    def __str__(self) -> str:
        parts = []
        for name, value in self.scores.items():
            quantity = QUANTITIES[name]
            parts.append(f"{quantity.label} {quantity.text(value)} {quantity.unit}".strip())
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(f"{self.images:,} images in {self.seconds:.2f} s")
        if self.peak_bytes is not None:
            parts.append(f"peak {format_bytes(self.peak_bytes)}")
        return ", ".join(parts)


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple],
    *,
    task: Task = TASKS["classification"],
    num_classes: int = 0,
    precision: str = "fp32",
    meter: Meter | None = None,
    costs: bool = True,
) -> Evaluation:
    """Measure score, loss and cost of `model` over `batches` of `(images, targets)`, on the model's device.

    `images`: what the model takes, a tensor or anything with `.to(device)`; a classifier returns scores
    (B, classes), for dense tasks see `backbones.dense_model`.  `num_classes`: of the data set, which dense
    tasks need.

    With `costs`, memory and multiply-adds are counted on the first batch, before the clock starts.  No
    other batch exceeds it, unless the model's work depends on the input, as that of generated answers does;
    on CUDA the peak is that of all batches.
    """
    device = next(model.parameters()).device
    model.eval()
    memory, macs_per_image, uncounted = _costs(model, batches, precision) if costs else (None, None, ())
    score, means, images_seen = TASK_SCORES[task.name](num_classes), ImageMeans(task.name), 0
    with torch.inference_mode(), (meter or Meter(device)).window("evaluate") as window:
        for images, targets in batches:
            with autocast(device, precision):
                outputs = model(images.to(device))
            outputs = tree_map(_on_host, outputs)
            score.update(outputs, targets)
            means.update(outputs, targets)
            images_seen += _images_in(targets)
        fields = score.result()
        scores = means.result() | fields.pop("scores")
        scores = {task.metric: scores.pop(task.metric), **scores}  # the first one is that of histories
    return Evaluation(
        metric=task.metric,
        scores=scores,
        images=images_seen,
        window=window,
        peak_bytes=memory and memory.peak_bytes,
        macs_per_image=macs_per_image,
        uncounted=uncounted,
        **fields,
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()


def _images_in(targets) -> int:
    return len(tree_leaves(targets)[0])


@torch.no_grad()  # in inference mode the CPU's counter does not see into composite operators
def _costs(
    model: nn.Module, batches: Iterable[tuple], precision: str
) -> tuple[DeviceMemory, float, tuple[str, ...]]:
    """Run the first batch; returns the memory that counted its peak, its multiply-adds per image, and the
    operators that are not counted."""
    device = next(model.parameters()).device
    memory, counter = device_memory(device), FlopCounter()
    memory.track(tensors_of(model))
    memory.reset_peak()
    images, targets = next(iter(batches))
    images = images.to(device)
    memory.track(images.values() if isinstance(images, Mapping) else [images])
    with memory, counter, autocast(device, precision):
        model(images)
    return memory, counter.flops.macs / _images_in(targets), tuple(counter.uncounted)


def evaluate_split(
    model: nn.Module, splits: Splits, split: str, experiment: Experiment, meter: Meter | None = None
) -> Evaluation:
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
) -> Evaluation | None:
    """Evaluate on the test split, once, if training ended `ok`; None if it did not.

    Out of memory and a loss that is not finite become the status of `result`.
    """
    return attempt(result, lambda: evaluate_split(model, splits, "test", experiment, meter))


class Outcome(Protocol):
    """How a run went so far, for its record: `FitResult`, or the preparation of a baseline."""

    status: str
    error: str | None
    started_at: str  # UTC
    environment: dict
    weights_sha256: str
    memory_source: str
    predicted_peak_bytes: int | None


def attempt(outcome: Outcome, test: Callable[[], Evaluation]) -> Evaluation | None:
    """Return `test()` if all went well so far; None, with a status and an error in `outcome`, if it fails."""
    if outcome.status != "ok":
        return None
    try:
        evaluation = test()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        outcome.status, outcome.error = "oom", f"in the test: {str(error).splitlines()[0]}"
        return None
    if evaluation.loss is not None and not math.isfinite(evaluation.loss):
        outcome.status, outcome.error = "nan", f"test loss {evaluation.loss}"
        return None
    return evaluation
