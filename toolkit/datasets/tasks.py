"""Tasks: a class for each image, a class for each pixel, or boxes around objects.

A `Task` is all that `fit` needs to know about a data set: the loss, and the score that is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from toolkit.measure.quantities import NOT_ENDED, QUANTITIES, Quantity, register_metric

IGNORED = 255  # label of pixels that neither loss nor score counts


@dataclass(frozen=True)
class Task:
    """A task: its loss, its metrics, and the heads of its models.

    `loss(outputs, targets)`: the losses of a batch's parts, weighted by their images, add up to the batch's
    (except for Faster and Mask R-CNN, whose losses are means over proposals drawn in each pass).
    `hits(outputs, targets)`: correct answers, in images; None if a training step does not show them.
    """

    name: str
    metric: str  # of validation and test, in per cent
    train_metric: str | None  # `hits` per image, in per cent
    heads: tuple[str, ...]  # of dense models, the default first
    loss: Callable[[Any, Any], torch.Tensor]
    hits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    zeros: Callable[[int, int, int], Any]  # targets for a number of images of height and width

    def inputs(self, images: torch.Tensor, targets: Any) -> Any:
        """Arguments of a model in training: torchvision's detectors compute their losses themselves."""
        return (images, targets) if self.name == "detection" else images


def _logits(outputs: Any) -> torch.Tensor:
    """The logits (B, K) among outputs: in training torchvision's GoogLeNet returns auxiliary ones, too."""
    return getattr(outputs, "logits", outputs)


def _class_loss(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(_logits(outputs), labels)


def _right_classes(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return (_logits(outputs).detach().argmax(1) == labels).sum()


def _pixel_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean over all pixels, ignored ones adding nothing, so that parts of a batch add up to its loss."""
    return F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="sum") / masks.numel()


def _right_pixels(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """The share of correct pixels times the number of images."""
    right = (logits.detach().argmax(1) == masks).sum()
    return right * len(masks) / (masks != IGNORED).sum().clamp(min=1)


def _no_boxes(images: int, height: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor([0.0, 0, width, height, 0]).repeat(images, 1, 1),  # the whole image
        "instances": torch.ones(images, height, width, dtype=torch.uint8),
    }


def _among_highest(count: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def right(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Whether an image's class is among the `count` highest of its scores, (B, classes)."""
        # Five for every metric, so that equal scores rank alike in all of them.
        highest = scores.topk(min(5, scores.shape[1]), dim=1).indices
        return (highest[:, :count] == labels[:, None]).any(1)

    return right


_ONE_CLASS = f"{NOT_ENDED}, or the model names one class only"
_NOTHING = f"{NOT_ENDED}, or no image has anything to score"

register_metric(Quantity("top1_pct", "accuracy", "%", better="more"), "classification", _among_highest(1))
register_metric(
    Quantity("top5_pct", "top-5 accuracy", "%", better="more", missing=_ONE_CLASS),
    "classification", _among_highest(5),
)  # fmt: skip
register_metric(  # the mean over classes of the share of their images that are right
    Quantity("balanced_pct", "balanced accuracy", "%", better="more"), "classification"
)
for _name, _label in (("miou_pct", "mean IoU"), ("pixel_accuracy_pct", "pixel accuracy")):
    register_metric(Quantity(_name, _label, "%", better="more", missing=_NOTHING), "segmentation")
for _name, _label in (
    ("map_pct", "box mAP"), ("map50_pct", "box AP at IoU 0.5"), ("map75_pct", "box AP at IoU 0.75"),
    ("mask_map_pct", "mask mAP"), ("mask_map50_pct", "mask AP at IoU 0.5"),
    ("mask_map75_pct", "mask AP at IoU 0.75"),
):  # fmt: skip
    register_metric(Quantity(_name, _label, "%", better="more", missing=_NOTHING), "detection")


TASKS = {
    "classification": Task(
        "classification", "top1_pct", "top1_pct", (), _class_loss, _right_classes,
        lambda images, height, width: torch.zeros(images, dtype=torch.long),
    ),
    "segmentation": Task(
        "segmentation", "miou_pct", "pixel_accuracy_pct", ("fpn", "upernet"), _pixel_loss, _right_pixels,
        lambda images, height, width: torch.zeros(images, height, width, dtype=torch.long),
    ),
    "detection": Task(
        "detection", "map_pct", None, ("retinanet", "faster_rcnn", "mask_rcnn"),
        lambda losses, targets: sum(losses.values()), None, _no_boxes,
    ),
}  # fmt: skip


def split_targets(targets: Any, size: int) -> list:
    """Split `targets`, a tensor (B, ...) or a dict of such, into parts of at most `size` images."""
    leaves, structure = tree_flatten(targets)
    return [tree_unflatten(parts, structure) for parts in zip(*(leaf.split(size) for leaf in leaves))]


def score_in(row: dict, part: str) -> tuple[str, float] | None:
    """Find metric and value of the score in a row of `FitResult.history`; `part`: "train" or "val"."""
    found = {name.removeprefix(f"{part}_"): value for name, value in row.items() if name.startswith(part)}
    return next(((name, value) for name, value in found.items() if name in QUANTITIES), None)
