"""`demo_vit`: a ViT small enough for a laptop's CPU, with weights of our own in this repository.

Pretrained on `formula_images` by `notebooks/pretrain_demo_backbone.ipynb`, so that the whole toolkit
can be tried without a download.  It is a plain timm `VisionTransformer`; nothing treats it specially.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from toolkit.errors import InputError
from toolkit.files import sha256_of
from toolkit.paths import DATA

WEIGHTS = DATA / "demo_vit.safetensors"
SHA256 = "fcb84cb856b3fb6734917cc1065202f58beaa6fe0e530d2383b924452bc8b2b1"

_DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def build_demo_vit(num_classes: int, pretrained: bool) -> nn.Module:
    """32 px images in patches of 8, four blocks of width 96: 0.47 M parameters."""
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=3, num_classes=num_classes
    )
    model.pretrained_cfg = _DATA_CONFIG
    if pretrained:
        load_demo_weights(model, WEIGHTS, SHA256)
    return model


def load_demo_weights(model: nn.Module, path: Path, sha256: str) -> None:
    """Fill everything but the head from `path`; raises `InputError` unless the file's digest is `sha256`."""
    if not path.exists():
        raise InputError(
            f"the weights of demo_vit are missing: {path}. Restore it with `git checkout data/{path.name}`."
        )
    if sha256_of(path) != sha256:
        raise InputError(f"the weights of demo_vit are damaged: {path} is not the file that was published.")
    weights = safetensors.torch.load_file(path)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if set(missing) != {"head.weight", "head.bias"} or unexpected:
        raise InputError(f"{path} does not fit demo_vit: missing {missing}, unexpected {unexpected}.")


def save_demo_weights(model: nn.Module, path: Path) -> str:
    """Write everything but the head as safetensors; returns the sha256 to publish."""
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path)
    return sha256_of(path)
