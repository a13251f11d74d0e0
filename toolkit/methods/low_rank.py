"""Low-rank adapters, by peft: LoRA, DoRA, AdaLoRA, and LoRA on weights of four bits.

Every one of them adapts the same layers of a backbone: those that its class names in `lora_targets` (an
anchored pattern of module names), or else all linear layers in its blocks.  The head trains too.
"""

from __future__ import annotations

import re

from torch import nn

from toolkit.budget import find_blocks
from toolkit.budget.lean import is_packed, unpacked_weight
from toolkit.errors import InputError
from toolkit.methods.trainable import freeze_statistics, head_name

# AdaLoRA starts with half as many ranks again as it ends with, as peft's defaults do (12 and 8).
INITIAL_RANK_FACTOR = 1.5
# Of packed weights, the best first.  On the CPU bitsandbytes 0.50.2 unpacks wrongly, by a quarter of the
# weights' size, where a block reaches into the next row.
BLOCK_SIZES = (64, 32)


def target_names(model: nn.Module) -> list[str]:
    """Names of the layers that low-rank methods adapt, in the model's order.

    Full names, not suffixes: the suffix `proj` of a ViT's attention also matches `patch_embed.proj`.
    """
    pattern = getattr(model, "lora_targets", None)
    if pattern is not None:
        names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    else:
        names = [
            f"{block_name}.{name}" if name else block_name
            for block_name, block in find_blocks(model).items()
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        ]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layers in its blocks for LoRA to adapt.")
    return names


def lora(model: nn.Module, lora_rank: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.0) -> nn.Module:
    return _with_adapters(model, lora_rank, lora_alpha, lora_dropout)


def dora(model: nn.Module, lora_rank: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.0) -> nn.Module:
    return _with_adapters(model, lora_rank, lora_alpha, lora_dropout, use_dora=True)


def qlora(
    model: nn.Module,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    double_quantisation: bool = False,
) -> nn.Module:
    targets = target_names(model)
    pattern = getattr(model, "four_bit_targets", None)
    quantise(model, [n for n in targets if pattern is None or re.fullmatch(pattern, n)], double_quantisation)
    return _with_adapters(model, lora_rank, lora_alpha, lora_dropout, targets)


def adalora(
    model: nn.Module, lora_rank: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.0
) -> nn.Module:
    import peft

    targets = target_names(model)
    initial_rank = max(lora_rank + 1, int(INITIAL_RANK_FACTOR * lora_rank))
    _check_rank(model, targets, initial_rank, f"lora_rank {lora_rank} (AdaLoRA starts at {initial_rank})")
    config = peft.AdaLoraConfig(
        target_r=lora_rank,
        init_r=initial_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        total_step=1,  # unknown yet: see RankAllocation.begin
        target_modules=_pattern(targets),
        modules_to_save=[head_name(model)],
    )
    return _wrap(model, config)


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
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise InputError(
                f"{name} is a {type(linear).__name__}: only plain linear layers can be stored in 4 bits."
            )
        block = next((size for size in BLOCK_SIZES if linear.in_features % size == 0), None)
        if block is None:
            raise InputError(
                f"{name} has {linear.in_features} inputs, no multiple of {BLOCK_SIZES[-1]}, so its weights "
                f"cannot be stored in 4 bits; leave it out of {type(model).__name__}.four_bit_targets."
            )
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
    freeze_statistics(merged, False)
    return merged


def _with_adapters(
    model: nn.Module,
    rank: int,
    alpha: int,
    dropout: float,
    targets: list[str] | None = None,
    **options,
) -> nn.Module:
    import peft  # here, because it brings transformers along: seconds that the other methods do without

    targets = targets or target_names(model)
    _check_rank(model, targets, rank, f"lora_rank {rank}")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_pattern(targets),
        modules_to_save=[head_name(model)],
        **options,
    )
    return _wrap(model, config)


def _wrap(model: nn.Module, config) -> nn.Module:
    """`model` with peft's layers; checks that of its own only the head trains, which peft goes by suffix."""
    import peft

    freeze_statistics(model)
    wrapped = peft.get_peft_model(model, config)
    saved = [n for n, m in wrapped.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    if len(saved) != 1:
        raise InputError(
            f"peft takes {len(saved)} modules for the head, {', '.join(saved)}; rename what ends like it."
        )
    return wrapped


def _pattern(names: list[str]) -> str:
    return "|".join(map(re.escape, names))


def _check_rank(model: nn.Module, targets: list[str], rank: int, said: str) -> None:
    """A rank above what a layer can have adds parameters and no freedom."""
    for name in targets:
        layer = model.get_submodule(name)
        if not hasattr(layer, "in_features"):
            raise InputError(
                f"{name} is a {type(layer).__name__}, which LoRA of linear layers cannot adapt; name other "
                f"layers in {type(model).__name__}.lora_targets."
            )
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise InputError(
                f"{said} is above the {most} that {name} ({layer.in_features} -> {layer.out_features}) "
                f"allows; choose at most {most}."
            )
