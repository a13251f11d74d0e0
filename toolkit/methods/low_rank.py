"""LoRA and DoRA, and the parts that all adapters made by peft share.

Adapters go to the layers that `targets` finds, and the head trains too.  They are peft's own configurations
with whole layer names, so what `save_pretrained` writes loads and merges in plain peft.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.errors import InputError, Options, option
from toolkit.methods.adapted_weight import show_adapted_weight
from toolkit.methods.lean import is_packed, unpacked_weight
from toolkit.methods.registry import NOT_TRIED, SCRIPTS, rates, register, searched
from toolkit.methods.targets import Targets, narrow_layers, targets_of


@dataclass(frozen=True)
class RankOptions(Options):
    """Options of all low-rank updates."""

    rank: int = option(8, "rank of the updates", between=(1, 4096))
    alpha: int = option(16, "updates are scaled by alpha / rank", between=(1, 65536))
    dropout: float = option(0.0, "dropout in front of the updates", between=(0, 0.99))
    targets: str = option("", "pattern of the whole names of layers to adapt; empty: the backbone's own")
    clip_rank: bool = option(False, "layers too narrow for the rank get the highest that they allow")


@dataclass(frozen=True)
class LoraOptions(RankOptions):
    """Options of updates that convolutions can have too."""

    depthwise: str = option(
        "train", "weights of grouped convolutions next to adapted ones", choices=("train", "freeze")
    )


def lora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Low-rank updates (Hu et al. 2022, arXiv 2106.09685)."""
    return with_lora(model, targets_of(model, "lora", options.targets, options.depthwise), options)


def dora(model: nn.Module, options: LoraOptions) -> nn.Module:
    """Low-rank updates of directions, and magnitudes apart from them (Liu et al. 2024, arXiv 2402.09353)."""
    targets = targets_of(model, "dora", options.targets, options.depthwise)
    return with_lora(model, targets, options, use_dora=True)


def merge(model: nn.Module) -> nn.Module:
    """The plain backbone with the adapters' updates in its weights; its logits are equal up to rounding.

    Packed layers become plain ones in the adapters' type: packing a merged weight again would change it
    by some 10 %.  `model` is modified in place; use the returned model.
    """
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"{type(model).__name__} carries no adapters to merge; it is a plain model already.")
    from peft.tuners.tuners_utils import BaseTunerLayer  # peft imports transformers, which takes seconds
    from peft.utils import ModulesToSaveWrapper

    # Not peft's `merge_and_unload`, which takes every module with an attribute `base_layer`, such as timm's
    # DLA, for an adapted layer.
    merged = model.base_model.model
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            plain = _merged(layer)
        elif isinstance(layer, ModulesToSaveWrapper):
            plain = layer.modules_to_save[layer.active_adapter]
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, plain)
    del merged.peft_config
    merged.is_loaded_in_4bit = False
    for module in merged.modules():
        module.__dict__.pop("frozen_statistics", None)
        module.__dict__.pop("always_evaluates", None)
    return merged


def unpack(model: nn.Module) -> nn.Module:
    """`model` with plain layers in the place of those packed in 4 bits; it is modified in place."""
    for name, layer in list(model.named_modules()):
        if is_packed(layer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _unpacked(layer, unpacked_weight(layer)))
    return model


def _merged(layer: nn.Module) -> nn.Module:
    """The layer below an adapter, with the adapter's update in its weight."""
    base = layer.get_base_layer()
    if not is_packed(base):
        layer.merge()
        return base
    return _unpacked(base, layer.weight.detach())  # the adapted one


def _unpacked(packed: nn.Module, weight: torch.Tensor) -> nn.Linear:
    plain = nn.Linear(packed.in_features, packed.out_features, packed.bias is not None, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), packed.bias
    return plain


def with_lora(model: nn.Module, targets: Targets, options: RankOptions, use_dora: bool = False) -> nn.Module:
    """Add LoRA; layers too narrow for the rank have their own, at the scale alpha / rank of all others."""
    rank, alpha = options.rank, options.alpha
    # peft lets a pattern match the end of a name; the ^ prevents that.
    narrow = {
        f"^{re.escape(name)}": most
        for name, most in narrow_layers(model, targets, rank, options.clip_rank).items()
    }
    return attach(
        model,
        targets,
        "LoraConfig",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=options.dropout,
        rank_pattern=narrow,
        alpha_pattern={name: alpha * most / rank for name, most in narrow.items()},
        use_dora=use_dora,
    )


def attach(model: nn.Module, targets: Targets, config: str, **settings: object) -> nn.Module:
    """`peft.get_peft_model` with the configuration `config` of these settings.

    But only `targets.own` train next to the adapters (peft, which compares the ends of names, would also wrap
    or leave out `blocks.0.head` next to `head`), and layers show their adapted weight.
    """
    import peft  # it imports transformers, which takes seconds
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    settings["target_modules"] = "|".join(map(re.escape, targets.adapted))
    wrapped = peft.get_peft_model(model, getattr(peft, config)(**settings))
    for module in wrapped.modules():
        if isinstance(module, BaseTunerLayer):
            show_adapted_weight(module)
    for name in targets.own:
        parent, _, child = name.rpartition(".")
        own = ModulesToSaveWrapper(model.get_submodule(name), wrapped.active_adapter)
        own.set_adapter(wrapped.active_adapter)
        setattr(model.get_submodule(parent), child, own)
    wrapped.peft_config[wrapped.active_adapter].modules_to_save = list(targets.own)  # to be saved
    return wrapped


register(
    "lora",
    lora,
    # Of demo_cnn 5e-2 diverges.
    searched(demo_vit=3e-3, demo_swin=5e-3, demo_cnn=5e-3, demo_cnn_digits=2e-2, demo_cnn_textures=2e-2)
    | rates(f"{SCRIPTS}; MambaPEFT, arXiv 2411.03855", vim_small=1e-3)
    | rates("tried on the validation split of textures at 96 pixels, no other rate", efficientnet_lite0=2e-3)
    | rates(SCRIPTS, default=5e-4),
    LoraOptions,
    convolutions=("plain", "same"),  # peft makes its own layers of the class of timm's Conv2dSame
)
register(
    "dora",
    dora,
    # Of demo_cnn_textures 5e-2 diverges.
    searched(demo_vit=5e-3, demo_cnn_digits=5e-3, demo_cnn_textures=2e-2)
    | rates(f"as lora; {NOT_TRIED}", vim_small=1e-3, default=5e-4),
    LoraOptions,
    convolutions=("plain",),
)
