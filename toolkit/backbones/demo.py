"""Backbones small enough for a laptop's CPU, with weights of our own in this repository.

* `demo_vit`: a vision transformer.
* `demo_cnn`: its convolutional sibling, of the blocks of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).
* `demo_swin`: its hierarchical sibling for dense prediction, with maps of four sizes and windows with and
  without shift (Liu et al. 2021, arXiv 2103.14030).
* `demo_cnn_digits`, `demo_cnn_textures`: source models for distribution shift, `demo_cnn` fully fine-tuned on
  a clean data set and published with its head.

`notebooks/extras/pretrain_demo_backbone.ipynb` made the weights, from images of formulas, so that the whole
toolkit can be tried without a download.  All are plain timm models; nothing treats them specially.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import timm
from timm.models.efficientnet import EfficientNet, decode_arch_def
from torch import nn

from toolkit.backbones.checkpoints import fill, head_parameters, read_weights
from toolkit.errors import InputError
from toolkit.files import DATA, sha256_of

SHA256 = {  # of the weight files, `data/NAME.safetensors`
    "demo_vit": "fcb84cb856b3fb6734917cc1065202f58beaa6fe0e530d2383b924452bc8b2b1",
    "demo_cnn": "d0004d320aa9f428e3bee80baa2e48abf2fc080edcb5c60be3dde6bb2ca03a3f",
    "demo_swin": "af3792e5bb617e3c1a22e8a0425a799dfef8871a85b4125175d07416e2a9108b",
    "demo_cnn_digits": "2e08da7e754c8b4dedcf248ba439c268f0429bef4797ebd6e364c44d93c6e70d",
    "demo_cnn_textures": "9f524816e2434a4fc449f24c3fc2b2daf86e1641a7d412567f8091ba0fcceac7",
}
SOURCE_CLASSES = {"demo_cnn_digits": 10, "demo_cnn_textures": 15}  # of the data set in the name

DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}

# timm's strings: inverted residuals, r repeats, k kernel, s stride, e expansion, c channels.  All blocks are
# of one type, so that each counts as a block.  Most of the work is at 8 x 8 and 4 x 4 pixels, since depthwise
# convolutions of larger maps are slow on a CPU.
_CNN_BLOCKS = [
    ["ir_r1_k3_s1_e3_c16"], ["ir_r2_k3_s2_e4_c32"], ["ir_r2_k3_s2_e4_c64"], ["ir_r1_k3_s1_e4_c96"],
]  # fmt: skip


def build_demo(name: str, num_classes: int, pretrained: bool) -> nn.Module:
    """Build the demo backbone `name` with a head for `num_classes` classes.

    The head is new and random, but for pretrained source models, which bring theirs.  Raises `InputError` for
    another number of classes than a pretrained source model's, and for missing or damaged weights.
    """
    with_head = name in SOURCE_CLASSES
    if pretrained and num_classes != SOURCE_CLASSES.get(name, num_classes):
        raise InputError(
            f"the pretrained {name!r} has a head for {SOURCE_CLASSES[name]} classes, the data set has "
            f"{num_classes}: take a data set of its classes, shifted or not, or backbone 'demo_cnn' with a "
            "new head."
        )
    model = {"demo_vit": _vit, "demo_swin": _swin}.get(name, _cnn)(num_classes)
    known = getattr(model, "pretrained_cfg", {})
    of_timm = {key: known[key] for key in ("architecture", "first_conv", "classifier") if key in known}
    model.pretrained_cfg = of_timm | DATA_CONFIG | {"license": "apache-2.0"}
    if pretrained:
        load_demo_weights(model, DATA / f"{name}.safetensors", SHA256[name], head=with_head)
    return model


def _vit(num_classes: int) -> nn.Module:
    """32 px images in patches of 8, four blocks of width 96: 0.47 M parameters."""
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=num_classes,
    )  # fmt: skip


def _cnn(num_classes: int) -> nn.Module:
    """32 px images, maps of 16, 8 and 4 px, six inverted residuals: 0.15 M parameters."""
    return EfficientNet(
        decode_arch_def(_CNN_BLOCKS),
        num_classes=num_classes, num_features=320, stem_size=16, act_layer=nn.ReLU6,
    )  # fmt: skip


def _swin(num_classes: int) -> nn.Module:
    """32 px images in patches of 2: maps of 16, 8, 4 and 2 px of 24, 48, 96 and 192 channels, two blocks on
    each, 1.3 M parameters.

    Windows are 4 x 4 px, on the last map 2 x 2: no more than a map has at 32 px, so that the tables of
    relative positions stay as they are when `set_input_size` makes the images larger.
    """
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        embed_dim=24,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=(4, 4, 4, 2),
        drop_path_rate=0.0,
        weight_init="jax",  # by width: timm's usual 0.02 leaves branches this narrow without effect
    )
    model.reset_classifier(num_classes)  # that initialisation sets the head to zero
    return model


def load_demo_weights(model: nn.Module, path: Path, sha256: str, *, head: bool = False) -> None:
    """Fill a timm `model` from `path`: all weights but the head's, or with `head` all.

    Raises `InputError` unless the file's digest is `sha256` and it holds these weights.
    """
    try:
        fill(model, read_weights(path, sha256), path, head=head)
    except InputError as error:
        raise InputError(f"{error} Restore the file with `git checkout data/{path.name}`.") from error


def save_demo_weights(model: nn.Module, path: Path, *, head: bool = False) -> str:
    """Write the weights of a timm `model`, with `head` the head's too, as safetensors; return the sha256."""
    left_out = set() if head else head_parameters(model)
    weights = {name: t.contiguous() for name, t in model.state_dict().items() if name not in left_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path)
    return sha256_of(path)
