"""Scores of predictions over a split, one class for each task.

`TASK_SCORES[task](num_classes)` takes batches (`update`) and returns fields of an `Evaluation` (`result`).
Metrics with a per-image function (`measure.quantities`) need no such class: `ImageMeans` averages them.
torchmetrics computes IoU and average precision (with faster-coco-eval); it takes seconds to import, so it is
imported where it is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from toolkit.datasets.tasks import IGNORED, TASKS
from toolkit.errors import InputError
from toolkit.measure.quantities import METRICS, QUANTITIES


class ImageMeans:
    """The metrics that `register_metric` has functions for, averaged over all images."""

    def __init__(self, task: str):
        self._functions = {name: function for name, function in METRICS[task].items() if function}
        self._values: dict[str, list[torch.Tensor]] = {name: [] for name in self._functions}

    def update(self, outputs, targets) -> None:
        """Add a batch."""
        for name, per_image in self._functions.items():
            self._values[name].append(per_image(outputs, targets).double())  # (B,)

    def result(self) -> dict[str, float]:
        """Value by metric; shares become per cent."""
        return {
            name: (100 if QUANTITIES[name].unit == "%" else 1) * torch.cat(values).mean().item()
            for name, values in self._values.items()
        }


class ClassScore:
    """Loss and predicted classes of a classifier; its metrics are means over images."""

    def __init__(self, num_classes: int):
        self._scores: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, scores: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: scores (B, classes) and labels (B,)."""
        self._scores.append(scores)
        self._labels.append(labels)

    def result(self) -> dict:
        """The fields of an `Evaluation` that classifiers have."""
        scores, labels = torch.cat(self._scores).double(), torch.cat(self._labels)  # (N, classes), (N,)
        highest = scores.topk(min(5, scores.shape[1]), dim=1).indices  # as the metrics rank them
        right = (highest[:, 0] == labels).double()
        recalls = [right[labels == label].mean() for label in labels.unique()]
        return {
            "scores": {"balanced_pct": 100 * torch.stack(recalls).mean().item()},
            "loss": F.cross_entropy(scores, labels).item(),
            "predictions": highest[:, 0].clone(),
            "confidences": scores.softmax(1).amax(1),
            "labels": labels,
        }


class SegmentationScore:
    """Mean IoU (Everingham et al. 2010, sec. 4.3) of predicted classes, over all pixels of all images.

    The IoU of a class is the number of pixels rightly predicted to be of it, over the number of those that
    are of it or are predicted to be.  Pixels labelled `IGNORED` do not count.  A class that occurs in no mask
    and in no prediction is left out of the mean; a class that is only predicted counts as 0.
    """

    def __init__(self, num_classes: int):
        from torchmetrics.classification import MulticlassConfusionMatrix

        self.num_classes = num_classes
        self._pairs = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self._loss_sum, self._images = 0.0, 0

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch: logits float (B, K, H, W) and classes int (B, H, W).

        Raises `InputError` for a class that the model does not have.
        """
        known = targets[targets != IGNORED]
        if len(known) and (known.min() < 0 or known.max() >= self.num_classes):
            raise InputError(
                f"masks hold the classes {known.min()} to {known.max()}, the model has {self.num_classes}: "
                "build it for the data set's classes."
            )
        self._pairs.update(logits.argmax(1), targets)
        self._loss_sum += TASKS["segmentation"].loss(logits, targets).item() * len(logits)
        self._images += len(logits)

    def class_iou(self) -> list[float | None]:
        """IoU of each class in per cent; None for a class that does not occur."""
        pairs = self._pairs.compute().double()  # (true, predicted), pixels
        right = pairs.diag()
        union = pairs.sum(0) + pairs.sum(1) - right
        return [100 * (r / u).item() if u > 0 else None for r, u in zip(right, union)]

    def result(self) -> dict:
        """The fields of an `Evaluation`; a score is None if no pixel counts."""
        pairs = self._pairs.compute().double()
        iou = torch.tensor([value for value in self.class_iou() if value is not None], dtype=torch.float64)
        accuracy = (100 * pairs.diag().sum() / pairs.sum()).item() if pairs.sum() else None
        return {
            "scores": {"miou_pct": iou.mean().item() if len(iou) else None, "pixel_accuracy_pct": accuracy},
            "loss": self._loss_sum / self._images,
        }


class DetectionScore:
    """Average precision of boxes and masks as COCO defines it: IoU 0.5 to 0.95, at most 100 boxes an image.

    The mean is over the classes that occur in the truth.  Masks are scored if the model predicts them.  Boxes
    and masks are compared at the resolution of the network's input.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self._precision = None  # made for the first batch, which tells whether there are masks

    def update(self, predictions: list[dict[str, torch.Tensor]], targets: dict[str, torch.Tensor]) -> None:
        """Add a batch: for each image boxes (n, 4), scores (n,), labels (n,), perhaps masks bool (n, H, W);
        and targets as `loader` makes them.

        Raises `InputError` for a class that the model does not have, and for masks that cannot be scored.
        """
        from torchmetrics.detection import MeanAveragePrecision

        if self._precision is None:
            self.masks = "masks" in predictions[0]
            kinds = ("bbox", "segm") if self.masks else "bbox"
            self._precision = MeanAveragePrecision(iou_type=kinds, backend="faster_coco_eval")
            self._precision.warn_on_many_detections = False  # COCO leaves out those beyond 100
        if self.masks and "instances" not in targets:
            raise InputError(
                "masks cannot be scored on a data set without instances: choose a head that predicts boxes "
                "only, such as faster_rcnn, or the data set digit_scenes."
            )
        highest = int(targets["boxes"][..., 4].max())
        if highest >= self.num_classes:
            raise InputError(
                f"boxes hold the class {highest}, the model has {self.num_classes}: build it for the data "
                "set's classes."
            )
        names = ("boxes", "scores", "labels", *(["masks"] if self.masks else []))
        self._precision.update(
            [{name: prediction[name] for name in names} for prediction in predictions],
            [self._truth(targets, row) for row in range(len(predictions))],
        )

    def _truth(self, targets: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        boxes = targets["boxes"][row]
        boxes = boxes[boxes[:, 4] >= 0]  # the others are padding
        truth = {"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}
        if self.masks:
            numbers = torch.arange(1, len(boxes) + 1)[:, None, None]
            truth["masks"] = targets["instances"][row] == numbers
        return truth

    def result(self) -> dict:
        """The fields of an `Evaluation`; a score is None if no image has a box to be found.

        Detectors compute their loss in training only, so there is none.
        """
        found = self._precision.compute()
        parts = {"": "bbox_", "mask_": "segm_"} if self.masks else {"": ""}
        scores = {}
        for ours, theirs in parts.items():
            for name, key in (("map", "map"), ("map50", "map_50"), ("map75", "map_75")):
                value = found[f"{theirs}{key}"].item()
                scores[f"{ours}{name}_pct"] = 100 * value if value >= 0 else None  # -1: no box
        return {"scores": scores, "loss": None}


TASK_SCORES = {
    "classification": ClassScore,
    "segmentation": SegmentationScore,
    "detection": DetectionScore,
}
