"""Dense prediction: a pretrained trunk that yields maps of several sizes, and a new head that reads them.

As with classifiers, a method decides what of the trunk trains, and the head trains under each; so every
method of `toolkit.methods` works on it.  The head begins with norms of its own, one per map, as the trunk has
none after its intermediate maps.
"""

from __future__ import annotations

import functools

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from toolkit.backbones import build_backbone
from toolkit.backbones.dense_heads import FpnSegmentation, RegionDetector, RetinaDetector, UperNet
from toolkit.errors import InputError, check_name

# Per task: name -> constructor from channels, (strides,) width and num_classes; the usual one first.
HEADS = {
    "segmentation": {"fpn": FpnSegmentation, "upernet": UperNet},
    "detection": {
        "retinanet": RetinaDetector,
        "faster_rcnn": RegionDetector,
        "mask_rcnn": functools.partial(RegionDetector, masks=True),
    },
}


class DenseModel(nn.Module):
    """`head(maps, (height, width), targets)` on the maps of `trunk`.

    forward(images (B, 3, H, W)): a segmentation head returns logits (B, K, H, W); a detector a list of one
    dict per image: boxes float (n, 4) in pixels, scores (n,), labels int64 (n,) from 0, and for mask_rcnn
    masks bool (n, H, W).  With `targets`, which only detectors take, it returns the dict of its losses,
    scalars, in training and in evaluation mode.
    """

    def __init__(self, trunk: SwinTransformer, head: nn.Module):
        super().__init__()
        self.trunk = trunk
        # Not named "head": peft matches modules by the ends of their names, and torchvision's detectors have
        # parts of that name.
        self.dense_head = head
        self.pretrained_cfg = trunk.pretrained_cfg

    @property
    def head(self) -> nn.Module:
        """Norms, pyramid and predictor: they are new, and train under every method."""
        return self.dense_head

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name for it."""
        return self.dense_head

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of the trunk's stages, (B, H', W', C) each, the largest first."""
        x, maps = self.trunk.patch_embed(images), []
        for stage in self.trunk.layers:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: torch.Tensor, targets: dict[str, torch.Tensor] | None = None):
        size = tuple(images.shape[2:])
        maps = self.maps(images)
        return self.dense_head(maps, size) if targets is None else self.dense_head(maps, size, targets)


def build_dense(
    backbone: str,
    head: str,
    num_classes: int,
    pretrained: bool,
    task: str,
    image_size: int | None = None,
) -> DenseModel:
    """Build a model for `task`, "segmentation" or "detection", on a Swin transformer.

    `backbone`: "demo_swin", "swin_tiny_patch4_window7_224" or any other timm `SwinTransformer`, with its
    weights if `pretrained`.  `head`: fpn | upernet for segmentation, retinanet | faster_rcnn | mask_rcnn for
    detection, "" for the first of each; it is new and random: seed torch before.
    `image_size`: pixels of a side, a multiple of the coarsest map's stride; None: the backbone's own.
    Windows and their tables of positions stay those of the weights, unless a map is smaller than its window:
    then timm cuts the window and interpolates the table.

    Raises `InputError`, before weights are loaded, for an unsuitable backbone, head, task or size.
    """
    heads = HEADS[check_name("task of dense prediction", task, HEADS)]
    head = check_name(f"head for {task}", head or next(iter(heads)), heads)
    with torch.device("meta"):
        outline = build_backbone(backbone, 1, pretrained=False)
    if not isinstance(outline, SwinTransformer):
        raise InputError(
            f"backbone {backbone!r} is a {type(outline).__name__}; dense prediction needs the maps of a timm "
            "SwinTransformer: 'demo_swin', 'swin_tiny_patch4_window7_224', or another of its size."
        )
    own_size = outline.patch_embed.img_size[0]
    channels, strides = ([info[key] for info in outline.feature_info] for key in ("num_chs", "reduction"))
    size = own_size if image_size is None else image_size
    if size < 1 or size % strides[-1]:
        raise InputError(
            f"image_size {size} is not a multiple of {strides[-1]}, the stride of {backbone}'s coarsest map; "
            f"choose {max(1, round(size / strides[-1])) * strides[-1]}."
        )
    trunk = build_backbone(backbone, 1, pretrained)
    if size != own_size:
        windows = [stage.blocks[0].attn.window_size for stage in trunk.layers]
        trunk.set_input_size((size, size), window_size=windows)
    # Only classification uses these.
    trunk.norm, trunk.head = nn.Identity(), nn.Identity()
    trunk.pretrained_cfg = trunk.pretrained_cfg | {"input_size": (3, size, size)}
    arguments = (channels, strides) if task == "detection" else (channels,)
    # Width of the pyramid: narrow, so that heads stay a small part of the trained parameters.
    width = 64 if channels[-1] < 512 else 128
    return DenseModel(trunk, heads[head](*arguments, width, num_classes))
