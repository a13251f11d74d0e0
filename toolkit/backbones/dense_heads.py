"""Heads for dense prediction on a pyramid of maps.

* Semantic segmentation: Panoptic FPN's head and UPerNet's.  Their logits have a resolution of their own and
  are enlarged bilinearly to the image's.  Group norms throughout: batches of dense prediction are small, and
  the batch norms of a new head have no statistics to keep.
* Detection: torchvision's RetinaNet, Faster R-CNN and Mask R-CNN on maps that are computed already.  Their
  predictors, losses, anchors and suppression of duplicates are used, but not their forward passes, which
  would also resize and normalise images and run the trunk.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from toolkit.errors import InputError

_RATIOS = (0.5, 1.0, 2.0)  # height by width of anchors
# Sides of anchors in strides of their level.  Smaller than the papers' 4 and 8, whose smallest objects have
# 32 pixels: here an anchor has to match 10 pixels of an image of 64.
_RETINA_ANCHORS = tuple(3 * 2 ** (octave / 3) for octave in range(3))
_REGION_ANCHORS = (5,)
_MASK_THRESHOLD = 0.5
_GROUPS = 8  # of group norms


class LevelNorms(nn.Module):
    """A layer norm for each map: [(B, H, W, C), ...] -> [(B, C, H, W), ...]."""

    def __init__(self, channels: list[int]):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, maps)]


class Pyramid(nn.Module):
    """Norms and a feature pyramid (Lin et al. 2017, arXiv 1612.03144): maps of `out_channels` channels each.

    forward: the last `len(channels)` maps of a trunk, (B, H, W, C) -> an ordered dict of maps
    (B, out_channels, H, W) named "0", "1", ... and those that `extra` adds.
    """

    def __init__(self, channels: list[int], out_channels: int, extra: ExtraFPNBlock | None = None):
        super().__init__()
        self.norms = LevelNorms(channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra)
        self.out_channels = out_channels

    def forward(self, maps: list[torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
        maps = self.norms(maps[-len(self.norms.norms) :])
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))


class FpnSegmentation(nn.Module):
    """Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446, sec. 3.1 and fig. 3).

    Each level is enlarged to the size of the largest by stages of 3 x 3 convolution, group norm, ReLU and
    doubling (the largest: one stage without doubling); the sum is classified.
    """

    def __init__(self, channels: list[int], width: int, num_classes: int):
        super().__init__()
        self.pyramid = Pyramid(channels, width)
        self.levels = nn.ModuleList(_upwards(width, width // 2, level) for level in range(len(channels)))
        self.predictor = nn.Conv2d(width // 2, num_classes, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        features = self.pyramid(maps).values()
        summed = sum(level(x) for level, x in zip(self.levels, features))
        return F.interpolate(self.predictor(summed), size, mode="bilinear")


def _upwards(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    stages = []
    for number in range(max(1, doublings)):
        stages.append(
            Conv2dNormActivation(
                channels if number else in_channels, channels, norm_layer=lambda c: nn.GroupNorm(_GROUPS, c)
            )
        )
        if doublings:
            stages.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    return nn.Sequential(*stages)


class UperNet(nn.Module):
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221): transformers' head with group norms."""

    def __init__(self, channels: list[int], width: int, num_classes: int):
        # Imported here, because transformers takes seconds.
        from transformers import UperNetConfig
        from transformers.models.upernet.modeling_upernet import UperNetConvModule, UperNetHead

        super().__init__()
        self.norms = LevelNorms(channels)
        self.decoder = UperNetHead(UperNetConfig(hidden_size=width, num_labels=num_classes), channels)
        for module in self.decoder.modules():
            if isinstance(module, UperNetConvModule):
                module.batch_norm = nn.GroupNorm(_GROUPS, width)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        return F.interpolate(self.decoder(self.norms(maps)), size, mode="bilinear")


# --- detection ------------------------------------------------------------------------------------

Targets = dict[str, torch.Tensor]  # of a batch; also the losses, and what is found in an image


class RetinaDetector(nn.Module):
    """RetinaNet (Lin et al. 2017, arXiv 1708.02002) on all maps but the largest, as published, and one more.

    `strides`: of the maps of `channels`, in pixels.  Losses: classification, bbox_regression.
    """

    def __init__(self, channels: list[int], strides: list[int], width: int, num_classes: int):
        super().__init__()
        anchors = _anchors([*strides[1:], 2 * strides[-1]], _RETINA_ANCHORS)
        pyramid = Pyramid(channels[1:], width, LastLevelMaxPool())
        count = anchors.num_anchors_per_location()[0]
        # Without norms its towers, whose weights start at 0.01, pass on almost nothing of so few channels.
        head = RetinaNetHead(width, count, num_classes, norm_layer=functools.partial(nn.GroupNorm, 8))
        self.detector = RetinaNet(pyramid, num_classes, anchor_generator=anchors, head=head)

    def forward(
        self, maps: list[torch.Tensor], size: tuple[int, int], targets: Targets | None = None
    ) -> Targets | list[Targets]:
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
    mask, each prefixed with "loss_", from anchors and proposals that are drawn at random.
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
        self, maps: list[torch.Tensor], size: tuple[int, int], targets: Targets | None = None
    ) -> Targets | list[Targets]:
        net = self.detector
        features = OrderedDict((name, x.float()) for name, x in net.backbone(maps).items())
        images = _image_list(features["0"], size)
        rows = None
        if targets is not None:
            if self.masks and "instances" not in targets:
                raise InputError(
                    "mask_rcnn learns from instance masks, which these targets lack: use a data set with "
                    "instances, such as digit_scenes, or head 'faster_rcnn'."
                )
            rows = _rows(targets, first_label=1)
        # Both parts compute losses only if these flags are set.
        net.rpn.training = net.roi_heads.training = targets is not None
        with torch.autocast(features["0"].device.type, enabled=False):  # bf16 has no odd integers beyond 256
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
    """Images without content: torchvision only reads their size."""
    batch = len(like)
    return ImageList(like.new_empty(()).expand(batch, 3, *size), [size] * batch)


def _rows(targets: Targets, first_label: int) -> list[Targets]:
    """Targets of a batch in torchvision's form, one dict per image, without padding."""
    rows = []
    for number, boxes in enumerate(targets["boxes"]):
        known = boxes[:, 4] >= 0
        row = {"boxes": boxes[known, :4], "labels": boxes[known, 4].long() + first_label}
        if "instances" in targets:
            instances = 1 + known.nonzero()[:, 0]
            row["masks"] = (targets["instances"][number] == instances[:, None, None]).to(torch.uint8)
        rows.append(row)
    return rows
