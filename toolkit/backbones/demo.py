"""`demo_vit`: a ViT small enough for a laptop's CPU, with weights of our own in this repository.

Pretrained on `formula_images` by `notebooks/pretrain_demo_backbone.ipynb`, so that the whole toolkit
can be tried without a download.  It is a plain timm `VisionTransformer`; nothing treats it specially.
The weight files of `demo_cnn` are written and checked here too.
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from toolkit.errors import InputError
from toolkit.files import DATA, sha256_of

WEIGHTS = DATA / "demo_vit.safetensors"
SHA256 = "fcb84cb856b3fb6734917cc1065202f58beaa6fe0e530d2383b924452bc8b2b1"

DATA_CONFIG = {
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
    model.pretrained_cfg = DATA_CONFIG
    if pretrained:
        load_demo_weights(model, WEIGHTS, SHA256)
    return model


def load_demo_weights(model: nn.Module, path: Path, sha256: str, *, head: bool = False) -> None:
    """Fill all of a timm `model` but its head, or with `head` that too, from `path`.

    Raises `InputError` unless the file's digest is `sha256` and it holds just that.
    """
    if not path.exists():
        raise InputError(
            f"the weights of {path.stem} are missing: {path}. "
            f"Restore it with `git checkout data/{path.name}`."
        )
    if sha256_of(path) != sha256:
        raise InputError(
            f"the weights of {path.stem} are damaged: {path} is not the file that was published. "
            f"Restore it with `git checkout data/{path.name}`."
        )
    weights = safetensors.torch.load_file(path)
    expected = model.state_dict().keys() - (set() if head else _head(model))
    if weights.keys() != expected:
        missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
        raise InputError(f"{path} does not fit {path.stem}: missing {missing}, unexpected {unexpected}.")
    model.load_state_dict(weights, strict=False)


def save_demo_weights(model: nn.Module, path: Path, *, head: bool = False) -> str:
    """Write all of a timm `model` but its head, or with `head` that too, as safetensors.

    Returns the sha256 to publish.
    """
    left_out = set() if head else _head(model)
    weights = {name: t.contiguous() for name, t in model.state_dict().items() if name not in left_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, path)
    return sha256_of(path)


def _head(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters."""
    return {
        name
        for name, p in model.named_parameters()
        if any(p is q for q in model.get_classifier().parameters())
    }
