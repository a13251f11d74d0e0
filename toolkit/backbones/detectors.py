"""Detectors: torchvision's RetinaNet, Faster R-CNN and Mask R-CNN behind maps that are computed already.

Their predictors, losses, anchors and suppression of doubles are torchvision's own.  Its classes also resize
and normalise images and run the trunk, which is done elsewhere here: so their forward passes are not used.
No library that this project uses has Cascade R-CNN.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from toolkit.backbones.dense_heads import Pyramid
from toolkit.errors import InputError

_RATIOS = (0.5, 1.0, 2.0)  # height by width of anchors
# Sides of anchors in strides of their level.  Less than the 4 and 8 of the papers, whose smallest objects
# have 32 pixels: here 10 pixels of an image of 64 have to match one.
_RETINA_ANCHORS = tuple(3 * 2 ** (octave / 3) for octave in range(3))
_REGION_ANCHORS = (5,)
_MASK_THRESHOLD = 0.5


class RetinaDetector(nn.Module):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002) on all maps but the largest, as published, and one more.

    `strides`: of the maps of `channels`, in pixels.  Losses: classification, bbox_regression.
    """

    def __init__(self, channels: list[int], strides: list[int], width: int, num_classes: int):
        super().__init__()
        anchors = _anchors([*strides[1:], 2 * strides[-1]], _RETINA_ANCHORS)
        pyramid = Pyramid(channels[1:], width, LastLevelMaxPool())
        count = anchors.num_anchors_per_location()[0]
        # Without norms its towers, whose weights begin at 0.01, pass on next to nothing of so few channels.
        head = RetinaNetHead(width, count, num_classes, norm_layer=functools.partial(nn.GroupNorm, 8))
        self.detector = RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head)

    def forward(
        self,
        maps: list[torch.Tensor],
        size: tuple[int, int],
        targets: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        net = self.detector
        features = list(net.backbone(maps).values())
        outputs = {name: value.float() for name, value in net.head(features).items()}
        images = _image_list(features[0], size)
        anchors = net.anchor_generator(images, [x.float() for x in features])
        if targets is not None:
            return net.compute_loss(_rows(targets, first_label=0), outputs, anchors)
        places = [x.shape[2] * x.shape[3] * net.head.classification_head.num_anchors for x in features]
        split = {name: list(value.split(places, dim=1)) for name, value in outputs.items()}
        anchors = [list(image.split(places)) for image in anchors]
        return net.postprocess_detections(split, anchors, images.image_sizes)


class RegionDetector(nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv 1506.01497), with `masks` Mask R-CNN (He et al. 2017, arXiv
    1703.06870), on all maps and one more; its parts are as wide as the pyramid, in the published proportions.

    `strides`: of the maps of `channels`, in pixels.  Losses: objectness, rpn_box_reg, classifier, box_reg,
    mask, each with "loss_" before it, from anchors and proposals that are drawn at random.
    """

    def __init__(
        self, channels: list[int], strides: list[int], width: int, num_classes: int, masks: bool = False
    ):
        super().__init__()
        classes = num_classes + 1  # torchvision's class 0 is the background
        parts = {
            "box_head": TwoMLPHead(width * 7**2, 4 * width),  # regions are pooled to 7 x 7
            "box_predictor": FastRCNNPredictor(4 * width, classes),
        }
        if masks:
            parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1)
            parts["mask_predictor"] = MaskRCNNPredictor(width, width, classes)
        self.masks = masks
        self.detector = (MaskRCNN if masks else FasterRCNN)(
            Pyramid(channels, width, LastLevelMaxPool()),
            rpn_anchor_generator=_anchors([*strides, 2 * strides[-1]], _REGION_ANCHORS),
            **parts,
        )

    def forward(
        self,
        maps: list[torch.Tensor],
        size: tuple[int, int],
        targets: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        net = self.detector
        features = OrderedDict((name, x.float()) for name, x in net.backbone(maps).items())
        images = _image_list(features["0"], size)
        rows = None
        if targets is not None:
            if self.masks and "instances" not in targets:
                raise InputError(
                    "mask_rcnn learns from instance masks, which these targets lack: take a data set with "
                    "instances, such as digit_scenes, or head 'faster_rcnn'."
                )
            rows = _rows(targets, first_label=1)
        # By this both parts decide whether they give losses.
        net.rpn.training = net.roi_heads.training = targets is not None
        with torch.autocast(features["0"].device.type, enabled=False):  # bf16 knows no odd pixel beyond 256
            proposals, losses = net.rpn(images, features, rows)
            detections, more_losses = net.roi_heads(features, proposals, images.image_sizes, rows)
        if targets is not None:
            return losses | more_losses
        for found in detections:
            found["labels"] = found["labels"] - 1
            if self.masks:
                pasted = paste_masks_in_image(found["masks"], found["boxes"], size)  # (n, 1, H, W)
                found["masks"] = pasted[:, 0] > _MASK_THRESHOLD
        return detections


def _anchors(strides: list[int], sides: tuple[float, ...]) -> AnchorGenerator:
    sizes = tuple(tuple(stride * side for side in sides) for stride in strides)
    return AnchorGenerator(sizes, (_RATIOS,) * len(strides))


def _image_list(like: torch.Tensor, size: tuple[int, int]) -> ImageList:
    """What torchvision asks of the images, which is their size alone."""
    batch = len(like)
    return ImageList(like.new_empty(()).expand(batch, 3, *size), [size] * batch)


def _rows(targets: dict[str, torch.Tensor], first_label: int) -> list[dict[str, torch.Tensor]]:
    """Targets of a batch as torchvision's, one dict per image, without the rows that are padding."""
    rows = []
    for number, boxes in enumerate(targets["boxes"]):
        known = boxes[:, 4] >= 0
        row = {"boxes": boxes[known, :4], "labels": boxes[known, 4].long() + first_label}
        if "instances" in targets:
            instances = 1 + known.nonzero()[:, 0]
            row["masks"] = (targets["instances"][number] == instances[:, None, None]).to(torch.uint8)
        rows.append(row)
    return rows
