"""Pretrained vision models by name, with a fresh head.

A class of models may name the modules that low-rank methods adapt, `lora_targets`, and those of them that
QLoRA stores in 4 bit, `four_bit_targets`: regular expressions that match whole module names.  In other models
(all of timm's) these are the linear layers in the blocks.
"""

from __future__ import annotations

import functools
import itertools
import warnings

import timm
import timm.data
import torch
from timm.layers import to_2tuple
from torch import nn

from toolkit.backbones import demo
from toolkit.backbones.checkpoints import RANDOM_WEIGHTS, opening
from toolkit.backbones.mambavision import mambavision_t
from toolkit.backbones.packaged import PACKAGED
from toolkit.backbones.vim import vim_small
from toolkit.errors import InputError, check_name, one_line

# Short names of the models in the project's tables; any other timm name works too.
TIMM_NAMES = {
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "tiny_vit": "tiny_vit_21m_224.dist_in22k_ft_in1k",
    # timm's models of these names pad otherwise than the weights were trained for
    "efficientnet_lite0": "tf_efficientnet_lite0",
    "efficientnet_lite2": "tf_efficientnet_lite2",
    "mobilenet_v2": "mobilenetv2_100",
}
# Models that timm lacks.
OWN = {
    **{name: functools.partial(demo.build_demo, name) for name in demo.SHA256},
    "vim_small": vim_small,
    "mambavision_t": mambavision_t,
}
BACKBONES = (*OWN, *TIMM_NAMES)
SMALL = "small:"  # prefix of a name: its reduced instance

# Image size and arguments of each `small_instance`.  The last maps keep more than one token, as attention
# over a single token has no gradient for queries and keys.
_SMALL = {
    "vit_small": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}),
    "tiny_vit": (
        64,
        {
            "embed_dims": (16, 64, 64, 128),
            "depths": (2, 2, 2, 2),
            "num_heads": (1, 2, 2, 4),
            "window_sizes": (4, 4, 4, 2),
            "drop_path_rate": 0.0,
        },
    ),
    "vim_small": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "d_state": 4}),
    "mambavision_t": (
        64,
        {
            "stem_dim": 8,
            "embed_dim": 16,
            "depths": (1, 1, 2, 2),
            "num_heads": (2, 4),
            "window_sizes": (4, 2),
            "d_state": 4,
        },
    ),
}


def check_backbone(name: str) -> str:
    """Return `name` if it can be built; raise `InputError` with the nearest match if not."""
    if name.startswith(SMALL):
        check_name(f"backbone {SMALL}...", name.removeprefix(SMALL), _SMALL)
        return name
    if name in BACKBONES or timm.is_model(name):
        return name
    try:
        return check_name("backbone", name, [*BACKBONES, *timm.list_models()])
    except InputError as error:
        # A list of a thousand timm names helps nobody: keep the first sentences only.
        message = str(error).split(" Valid: ")[0]
        raise InputError(f"{message} Valid: {', '.join(BACKBONES)}, or any of timm.list_models().") from None


def build_backbone(name: str, num_classes: int, pretrained: bool = True, **sizes: object) -> nn.Module:
    """Build a classifier for `num_classes` classes on the backbone `name`.

    `small:vit_small` and the like are small instances with random weights, see `small_instance`.
    If `pretrained`, the demo backbones load their weights from this repository, those of `packaged` from an
    installed package, all others from the Hugging Face hub.  The head is new and random: seed torch before.
    Only the source models `demo_cnn_digits` and `demo_cnn_textures` have a trained one, for 10 and 15
    classes, and packaged weights with a head for 1,000.
    `sizes` (`depth`, `embed_dim`, `img_size`, ...) are arguments of the model's class, to build small
    instances with random weights.

    Raises `InputError` for an unknown name or size, sizes together with pretrained weights, another number of
    classes than a source model's, a damaged weight file, or hub weights that cannot be downloaded.
    """
    check_backbone(name)
    if name.startswith(SMALL):
        if pretrained:
            raise InputError(f"{name!r} has random weights: set pretrained=False.")
        if sizes:
            raise InputError(
                f"{name!r} has its own sizes: leave {[*sizes]}, or build {name[len(SMALL) :]!r}."
            )
        return small_instance(name.removeprefix(SMALL), num_classes)
    if sizes and pretrained:
        raise InputError(
            f"the pretrained {name!r} has its own sizes: set pretrained=False or leave out {[*sizes]}."
        )
    try:
        if name in OWN:
            return OWN[name](num_classes, pretrained, **sizes)
        return _build_timm(name, num_classes, pretrained, **sizes)
    except TypeError as error:
        if not sizes:
            raise
        raise InputError(f"{name!r} cannot be built with the sizes {sizes}: {error}.") from error


def _build_timm(name: str, num_classes: int, pretrained: bool, **sizes: object) -> nn.Module:
    timm_name = TIMM_NAMES.get(name, name)
    create = functools.partial(timm.create_model, timm_name, num_classes=num_classes, **sizes)
    packaged = PACKAGED.get(timm_name)
    if pretrained and not (packaged and packaged.path):
        otherwise = f"`{packaged.pip}`, or {RANDOM_WEIGHTS}" if packaged else RANDOM_WEIGHTS
        with opening(f"the pretrained weights of {name!r} ({timm_name})", otherwise):
            return create(pretrained=True)
    try:
        model = create()
    except (OSError, RuntimeError) as error:
        raise InputError(f"timm cannot build {timm_name!r}: {error}") from error
    if pretrained:
        packaged.load(model)
    if "img_size" in sizes:
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, *to_2tuple(sizes["img_size"]))}
    return model


def resize(model: nn.Module, name: str, pixels: int) -> None:
    """Make the backbone `name` take square images of `pixels` a side; position embeddings are interpolated.

    Raises `InputError` for a size that it cannot take.
    """
    problem = f"{name!r} cannot take images of {pixels} x {pixels} pixels"
    if not hasattr(model, "set_input_size") and model.pretrained_cfg.get("fixed_input_size"):
        raise InputError(f"{problem}, only its own size; set the resolution to 0.")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if not pixels or pixels % patch:  # timm leaves out the rest of the image without a word
        raise InputError(
            f"{name!r} cuts images into patches of {patch} pixels: choose a resolution that is a multiple of "
            f"that instead of {pixels}."
        )
    try:
        if hasattr(model, "set_input_size"):
            with warnings.catch_warnings(action="ignore"):  # about how timm interpolates tables of positions
                model.set_input_size(img_size=pixels)
        tensors = itertools.chain(model.named_parameters(), model.named_buffers())
        state = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors}
        torch.func.functional_call(model, state, torch.empty(2, 3, pixels, pixels, device="meta"))
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{problem} ({one_line(error)}); choose another resolution.") from error
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, pixels, pixels)}


def small_instance(name: str, num_classes: int) -> nn.Module:
    """A reduced `vit_small`, `tiny_vit`, `vim_small` or `mambavision_t` with random weights.

    It has the same classes and kinds of blocks with fewer than 0.7 M parameters, for images of 32 or 64 px
    (see `data_config`).
    """
    pixels, sizes = _SMALL[check_name("small instance", name, _SMALL)]
    model = build_backbone(name, num_classes, pretrained=False, **sizes)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, pixels, pixels)}
    return model


def weights_source(model: nn.Module, pretrained: bool) -> dict[str, str]:
    """Where the weights of `model` come from, with the digest of their file if known, and their licence."""
    known = getattr(model, "pretrained_cfg", None) or {}
    if not pretrained:
        return {"weights_source": "random", "weights_license": ""}
    source = known.get("origin_url") or known.get("hf_hub_id") or "this package"
    return {
        "weights_source": " ".join([source, *(known.get("notes") or [])]),
        "weights_license": known.get("license") or "not known",
    }


def data_config(model: nn.Module) -> dict:
    """The images that a model expects, with or without a peft wrapper.

    Keys are timm's: `input_size` (C, H, W), `mean`, `std`, `interpolation`, `crop_pct`.
    """
    return timm.data.resolve_model_data_config(model)
