"""Heads for semantic segmentation: Panoptic FPN's and UPerNet's, on a pyramid of maps.

Both give logits at a resolution of their own, enlarged bilinearly to the image's.  Group norms throughout:
batches of dense prediction are small, and batch norms of a new head could not keep statistics that they
never had.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

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
    (B, out_channels, H, W) named "0", "1", ... and what `extra` adds.
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

    Each level goes to the size of the largest by stages of 3 x 3 convolution, group norm, ReLU and doubling,
    the largest by one without; the sum is classified.
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
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221), transformers' head with group norms."""

    def __init__(self, channels: list[int], width: int, num_classes: int):
        # Here, because transformers takes seconds.
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
