"""Adapters, by peft: LoRA, DoRA, AdaLoRA, LoRA on weights of four bits, IA3 and LoKr.

Every one of them adapts the same layers of a backbone, see `targets`; the head trains too.  All are peft's
own configurations with whole names, so what `save_pretrained` writes loads and merges in plain peft (but
AdaLoRA's with `clip_rank`, see `adalora`).
"""

from __future__ import annotations

import re

from torch import nn

from toolkit.errors import InputError
from toolkit.methods.lean import is_packed, unpacked_weight
from toolkit.methods.targets import Targets, narrow_layers, targets_of

# AdaLoRA starts with half as many ranks again as it ends with, as peft's defaults do (12 and 8).
INITIAL_RANK_FACTOR = 1.5
# Of packed weights, the best first.  On the CPU bitsandbytes 0.50.2 unpacks wrongly, by a quarter of the
# weights' size, where a block reaches into the next row.
BLOCK_SIZES = (64, 32)


def lora(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    lora_targets: str = "",
    clip_rank: bool = False,
    depthwise: str = "train",
    use_dora: bool = False,
) -> nn.Module:
    targets = targets_of(model, "dora" if use_dora else "lora", lora_targets, depthwise)
    narrow = narrow_layers(model, targets, lora_rank, clip_rank)
    return _with_lora(model, targets, lora_rank, lora_alpha, lora_dropout, narrow, use_dora=use_dora)


def dora(model: nn.Module, **options) -> nn.Module:
    return lora(model, use_dora=True, **options)


def qlora(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    lora_targets: str = "",
    clip_rank: bool = False,
    double_quantisation: bool = False,
) -> nn.Module:
    targets = targets_of(model, "qlora", lora_targets)
    narrow = narrow_layers(model, targets, lora_rank, clip_rank)
    pattern = getattr(model, "four_bit_targets", ".*")
    quantise(model, [n for n in targets.adapted if re.fullmatch(pattern, n)], double_quantisation)
    return _with_lora(model, targets, lora_rank, lora_alpha, lora_dropout, narrow)


def adalora(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    lora_targets: str = "",
    clip_rank: bool = False,
    depthwise: str = "train",
) -> nn.Module:
    """peft has one initial rank for all layers.  With `clip_rank` narrow ones begin with fewer, here; such
    adapters are to be saved by `toolkit.save_adapted`, as plain peft would build them too large."""
    import peft

    targets = targets_of(model, "adalora", lora_targets, depthwise)
    narrow = narrow_layers(model, targets, lora_rank, clip_rank, start=_initial_rank)
    initial_rank = _initial_rank(lora_rank)
    limits = [narrow.get(layer, initial_rank) for layer in targets.adapted]
    target = sum(min(lora_rank, limit) for limit in limits)
    if target == sum(limits):
        raise InputError(
            f"at lora_rank {lora_rank} every layer has all ranks that it allows, {max(limits)} at most, so "
            "adalora has none to move; choose a lower lora_rank, or method 'lora'."
        )
    config = peft.AdaLoraConfig(
        target_r=lora_rank,
        init_r=initial_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        total_step=1,  # unknown yet: see RankAllocation.begin
        **_places(targets),
    )
    wrapped = peft.get_peft_model(model, config)
    if narrow:
        tuner = wrapped.base_model
        name = tuner.trainable_adapter_name
        for layer, most in narrow.items():
            alpha = lora_alpha * most / initial_rank
            tuner.model.get_submodule(layer).update_layer(name, most, alpha, config=config)
        tuner.rankallocator = peft.tuners.adalora.RankAllocator(tuner.model, config, name)
        tuner.rankallocator.target_bgt = target
    return wrapped


def ia3(model: nn.Module, lora_targets: str = "") -> nn.Module:
    """A factor for each output channel of each layer.  (The paper's places are keys, values and the inside of
    MLPs; timm's attention computes queries, keys and values in one layer.)"""
    import peft

    targets = targets_of(model, "ia3", lora_targets)
    return peft.get_peft_model(model, peft.IA3Config(feedforward_modules=[], **_places(targets)))


def lokr(model: nn.Module, lora_rank: int = 8, lora_alpha: int = 16, lora_targets: str = "") -> nn.Module:
    """Updates alpha / rank · W1 ⊗ W2, whose sides are the factors of the layer's that are nearest each other.

    W2 is a product of rank `lora_rank` where that is less than half of its longer side, and whole elsewhere:
    so no rank is too high for a layer.
    """
    import peft

    targets = targets_of(model, "lokr", lora_targets)
    return peft.get_peft_model(model, peft.LoKrConfig(r=lora_rank, alpha=lora_alpha, **_places(targets)))


def quantise(model: nn.Module, names: list[str], double_quantisation: bool) -> None:
    """Store the weights of these linear layers as NF4, in blocks of 64 or, where rows are no multiple of 64,
    of 32 (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise InputError(
            f"weights of 4 bits need bitsandbytes, which cannot be imported here ({error}); install it or "
            "choose method 'lora'."
        ) from error
    blocks = {}
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise InputError(
                f"{name} is a {type(linear).__name__}: only plain linear layers can be stored in 4 bits."
            )
        blocks[name] = next((size for size in BLOCK_SIZES if linear.in_features % size == 0), None)
        if blocks[name] is None:
            raise InputError(
                f"{name} has {linear.in_features} inputs, no multiple of {BLOCK_SIZES[-1]}, so its weights "
                f"cannot be stored in 4 bits; leave it out of {type(model).__name__}.four_bit_targets."
            )
    for name, block in blocks.items():
        linear = model.get_submodule(name)
        packed = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compress_statistics=double_quantisation,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data,
            requires_grad=False,
            blocksize=block,
            compress_statistics=double_quantisation,
            quant_type="nf4",
            module=packed,
        )
        packed.bias = linear.bias
        # Otherwise the first evaluation on some CPUs repacks the weights in place for a kernel that
        # computes in bf16, fails for some shapes, and leaves later training steps without gradients.
        packed.support_avx512bf16_for_cpu = False
        packed.to(linear.weight.device)  # packs
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
    model.is_loaded_in_4bit = True  # by which peft knows to use its layers for packed weights


def four_bit_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with packed weights by name; not peft's, which are around them."""
    return {name: module for name, module in model.named_modules() if is_packed(module)}


def merge(model: nn.Module) -> nn.Module:
    """The plain backbone with the adapters' updates in its weights; gives the same logits up to rounding.

    Packed layers become plain ones in the adapters' type: packing a merged weight again would change it
    by some 10 %.  `model` itself is used up.
    """
    if not hasattr(model, "merge_and_unload"):
        raise InputError(f"{type(model).__name__} carries no adapters to merge; it is a plain model already.")
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "lora_A") and is_packed(base := layer.base_layer):
            (adapter,) = layer.active_adapters
            plain = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
            delta = layer.get_delta_weight(adapter)
            plain.weight = nn.Parameter(unpacked_weight(base).to(delta.dtype) + delta, requires_grad=False)
            plain.bias = base.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    merged = model.merge_and_unload()
    merged.is_loaded_in_4bit = False
    for module in merged.modules():
        module.__dict__.pop("frozen_statistics", None)
    return merged


def _initial_rank(lora_rank: int) -> int:
    """Of AdaLoRA, which ends with a mean of `lora_rank`."""
    return max(lora_rank + 1, int(INITIAL_RANK_FACTOR * lora_rank))


def _with_lora(
    model: nn.Module,
    targets: Targets,
    rank: int,
    alpha: int,
    dropout: float,
    narrow: dict[str, int],
    use_dora: bool = False,
) -> nn.Module:
    """`narrow`: layers with a rank of their own; their scale is alpha / `rank` as that of all others."""
    import peft  # here, because it brings transformers along: seconds that the other methods do without

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        # peft lets a pattern match the end of a name; the ^ keeps it from that.
        rank_pattern={f"^{re.escape(name)}": most for name, most in narrow.items()},
        alpha_pattern={f"^{re.escape(name)}": alpha * most / rank for name, most in narrow.items()},
        use_dora=use_dora,
        **_places(targets),
    )
    return peft.get_peft_model(model, config)


def _places(targets: Targets) -> dict:
    """`targets` as peft's configurations take them."""
    names = "|".join(map(re.escape, targets.adapted))
    return {"target_modules": names, "modules_to_save": list(targets.beside)}
