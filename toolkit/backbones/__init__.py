"""Pretrained vision models by name, with a fresh head."""

from __future__ import annotations

import timm
import timm.data
from torch import nn

from toolkit.backbones.demo import build_demo_vit
from toolkit.errors import InputError, check_name

# Short names of the models that the project's tables use; any other timm name works too.
TIMM_NAMES = {
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "tiny_vit": "tiny_vit_21m_224.dist_in22k_ft_in1k",
}
BACKBONES = ("demo_vit", *TIMM_NAMES)


def check_backbone(name: str) -> str:
    """Return `name` if it can be built; raise `InputError` with the nearest match if not."""
    if name in BACKBONES or timm.is_model(name):
        return name
    try:
        return check_name("backbone", name, [*BACKBONES, *timm.list_models()])
    except InputError as error:
        # A thousand timm names help nobody: keep the first sentences, shorten the list.
        message = str(error).split(" Valid: ")[0]
        raise InputError(f"{message} Valid: {', '.join(BACKBONES)}, or any of timm.list_models().") from None


def build_backbone(name: str, num_classes: int, pretrained: bool = True) -> nn.Module:
    """Build a classifier for `num_classes` classes on the backbone `name`.

    `demo_vit` takes its pretrained weights from this repository; `vit_small`, `tiny_vit` and any other
    timm name from the Hugging Face hub, and only if `pretrained`.  The head is new and random: seed
    torch before.  Raises `InputError` for an unknown name, a damaged weight file, or hub weights that
    cannot be had.
    """
    check_backbone(name)
    if name == "demo_vit":
        return build_demo_vit(num_classes, pretrained)
    timm_name = TIMM_NAMES.get(name, name)
    try:
        return timm.create_model(timm_name, pretrained=pretrained, num_classes=num_classes)
    except (OSError, RuntimeError) as error:  # what hub clients raise offline differs by version
        if not pretrained:
            raise InputError(f"timm cannot build {timm_name!r}: {error}") from error
        raise InputError(
            f"the pretrained weights of {name!r} ({timm_name}) could not be loaded: {error}. Connect to the "
            "Hugging Face hub once so that they are cached, or set pretrained=False for random weights."
        ) from error


def data_config(model: nn.Module) -> dict:
    """What images the model wants: timm's keys `input_size` (C, H, W), `mean`, `std`, `interpolation`,
    `crop_pct`.  peft wrappers are looked through."""
    return timm.data.resolve_model_data_config(model)
