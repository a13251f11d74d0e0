"""`DenseModel`: a pretrained trunk that gives maps of several sizes, and a new head that reads them.

As with classifiers, a method decides what of the trunk trains, and the head trains under each; so every
method of `toolkit.methods` works on it as it is.  The head begins with norms of its own, one per map: the
trunk has none behind its maps that dense prediction could use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # methods import this module, and `Experiment` them: it does without timm
    from timm.models.swin_transformer import SwinTransformer


class DenseModel(nn.Module):
    """`head(maps, (height, width), targets)` on the maps of `trunk`.

    forward(images (B, 3, H, W)): logits (B, K, H, W) of a segmentation head, of a detector a list of one
    dict per image, boxes float (n, 4) in pixels, scores (n,), labels int64 (n,) from 0, of mask_rcnn also
    masks bool (n, H, W).  With `targets`, which are for detectors alone: the dict of its losses, scalars,
    in training and in evaluation mode.
    """

    def __init__(self, trunk: SwinTransformer, head: nn.Module):
        super().__init__()
        self.trunk = trunk
        # Not named "head": peft knows modules by the ends of their names, and torchvision's detectors hold
        # parts of that name.
        self.dense_head = head
        self.pretrained_cfg = trunk.pretrained_cfg

    @property
    def head(self) -> nn.Module:
        """Norms, pyramid and predictor: what is new, and trains under every method."""
        return self.dense_head

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name for it."""
        return self.dense_head

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What the stages of the trunk give, (B, H', W', C) each, the largest first."""
        x, maps = self.trunk.patch_embed(images), []
        for stage in self.trunk.layers:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: torch.Tensor, targets: dict[str, torch.Tensor] | None = None):
        size = tuple(images.shape[2:])
        maps = self.maps(images)
        return self.dense_head(maps, size) if targets is None else self.dense_head(maps, size, targets)
