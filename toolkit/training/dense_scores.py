"""Scores of dense predictions: mean IoU of masks, and mean average precision of boxes as COCO defines it.

torchmetrics computes them, with faster-coco-eval under the latter.  Here is what it is given, and what of
its answer is kept, in per cent.  torchmetrics takes seconds to import: so import this where it is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.detection import MeanAveragePrecision

from toolkit.datasets.tasks import IGNORED
from toolkit.errors import InputError


class SegmentationScore:
    """Mean IoU (Everingham et al. 2010, sec. 4.3) of predicted classes, over all pixels of all images.

    The IoU of a class is the pixels that are rightly said to be of it, by the pixels that are, or are said
    to be; pixels of class `IGNORED` are neither.  A class that is in no mask and in no prediction has none
    and is left out of the mean; one that is only predicted counts with 0.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self._pairs = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch: float (B, K, h, w), enlarged bilinearly if need be, and classes int (B, H, W).

        Raises `InputError` for a class beyond the last.
        """
        known = targets[targets != IGNORED]
        if len(known) and (known.min() < 0 or known.max() >= self.num_classes):
            raise InputError(
                f"masks hold the classes {known.min()} to {known.max()}, the model has {self.num_classes}: "
                "build it for the data set's classes."
            )
        self._pairs.to(logits.device)
        for image, target in zip(logits, targets):  # one by one: enlarged logits of a batch are large
            if image.shape[1:] != target.shape:
                image = F.interpolate(image[None], size=target.shape, mode="bilinear")[0]
            self._pairs.update(image.argmax(0)[None], target[None].to(image.device))

    def result(self) -> dict[str, float | list[float | None] | None]:
        """`miou_pct`, `pixel_accuracy_pct`, and `iou_pct` of each class; None without such pixels."""
        pairs = self._pairs.compute().double().cpu()  # (true, predicted), pixels
        right = pairs.diag()
        union = pairs.sum(0) + pairs.sum(1) - right
        seen = union > 0
        iou = 100 * right / union
        return {
            "miou_pct": iou[seen].mean().item() if seen.any() else None,
            "pixel_accuracy_pct": (100 * right.sum() / pairs.sum()).item() if pairs.sum() else None,
            "iou_pct": [value if known else None for value, known in zip(iou.tolist(), seen.tolist())],
        }


class DetectionScore:
    """Average precision of boxes (and masks): COCO's, over IoU 0.5 to 0.95, at most 100 boxes an image.

    The mean is over the classes that the truth has.  `masks`: score instance masks too.  Boxes and masks
    are compared at the resolution of the network's input.
    """

    def __init__(self, num_classes: int, masks: bool = False):
        self.num_classes, self.masks = num_classes, masks
        kinds = ("bbox", "segm") if masks else "bbox"
        self._precision = MeanAveragePrecision(iou_type=kinds, backend="faster_coco_eval")
        self._precision.warn_on_many_detections = False  # those beyond 100 are COCO's to leave out

    def update(self, predictions: list[dict[str, torch.Tensor]], targets: dict[str, torch.Tensor]) -> None:
        """Add a batch: for each image boxes (n, 4), scores (n,), labels (n,), perhaps masks bool (n, H, W);
        and targets as `loader` gives them.

        Raises `InputError` for a class beyond the last, and for `masks` without instances.
        """
        if self.masks and "instances" not in targets:
            raise InputError(
                "masks cannot be scored on a data set without instances: give a head that gives boxes only, "
                "such as faster_rcnn, or the data set digit_scenes."
            )
        most = int(targets["boxes"][..., 4].max())
        if most >= self.num_classes:
            raise InputError(
                f"boxes hold the class {most}, the model has {self.num_classes}: build it for the data "
                "set's classes."
            )
        self._precision.update(
            [self._kept(prediction) for prediction in predictions],
            [self._truth(targets, row) for row in range(len(predictions))],
        )

    def _kept(self, prediction: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("boxes", "scores", "labels", *(["masks"] if self.masks else []))
        return {name: prediction[name].detach().cpu() for name in names}

    def _truth(self, targets: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        boxes = targets["boxes"][row].cpu()
        boxes = boxes[boxes[:, 4] >= 0]
        truth = {"boxes": boxes[:, :4], "labels": boxes[:, 4].long()}
        if self.masks:
            numbers = torch.arange(1, len(boxes) + 1)[:, None, None]
            truth["masks"] = targets["instances"][row].cpu() == numbers
        return truth

    def result(self) -> dict[str, float | None]:
        """`map_pct`, at IoU 0.5 `map50_pct` and at 0.75 `map75_pct`; with masks `mask_map_pct` and so on.

        None where no image has a box to be found.
        """
        found = self._precision.compute()
        parts = {"": "bbox_", "mask_": "segm_"} if self.masks else {"": ""}
        scores = {
            f"{ours}{name}_pct": found[f"{theirs}{key}"].item()
            for ours, theirs in parts.items()
            for name, key in (("map", "map"), ("map50", "map_50"), ("map75", "map_75"))
        }
        return {name: 100 * value if value >= 0 else None for name, value in scores.items()}  # -1: no box
