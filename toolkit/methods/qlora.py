"""QLoRA: LoRA on weights of four bits (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from toolkit.errors import InputError, option
from toolkit.methods.low_rank import RankOptions, with_lora
from toolkit.methods.registry import NOT_TRIED, SCRIPTS, TUNED_ON, rates, register
from toolkit.methods.targets import narrow_layers, targets_of

# Of packed weights, the best first.  On the CPU bitsandbytes 0.50.2 unpacks wrongly, by a quarter of the
# weights' size, where a block reaches into the next row.
BLOCK_SIZES = (64, 32)


@dataclass(frozen=True)
class QloraOptions(RankOptions):
    """Options of QLoRA."""

    double_quantisation: bool = option(False, "the scales of packed weights are packed too")


def qlora(model: nn.Module, options: QloraOptions) -> nn.Module:
    """Low-rank updates of linear layers in four bits."""
    targets = targets_of(model, "qlora", options.targets)
    narrow_layers(model, targets, options.rank, options.clip_rank)  # before anything is packed
    pattern = getattr(model, "four_bit_targets", ".*")
    quantise(model, [n for n in targets.adapted if re.fullmatch(pattern, n)], options.double_quantisation)
    return with_lora(model, targets, options)


def quantise(model: nn.Module, names: list[str], double_quantisation: bool) -> None:
    """Store the weights of these linear layers as NF4, in blocks of 64, or of 32 where rows are not a
    multiple of 64 (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    try:
        import bitsandbytes  # it takes seconds
    except ImportError as error:
        raise InputError(
            f"weights of 4 bits need bitsandbytes, which cannot be imported here ({error}); install it or "
            "choose method 'lora'."
        ) from error
    remedy = (
        "choose method 'lora' (or four_bit=False), or set the model's attribute four_bit_targets to a "
        "pattern of the whole names of the layers to pack."
    )
    blocks = {}
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise InputError(
                f"{name} is a {type(linear).__name__}: only plain linear layers can be stored in 4 bits; "
                f"{remedy}"
            )
        blocks[name] = next((size for size in BLOCK_SIZES if linear.in_features % size == 0), None)
        if blocks[name] is None:
            raise InputError(
                f"{name} has {linear.in_features} inputs, not a multiple of {BLOCK_SIZES[-1]}, so its "
                f"weights cannot be stored in 4 bits; {remedy}"
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
    model.is_loaded_in_4bit = True  # tells peft to use its layers for packed weights


register(
    "qlora",
    qlora,
    rates(TUNED_ON.format("digits"), demo_vit=5e-3)
    | rates(f"as lora; {NOT_TRIED}", vim_small=1e-3)
    | rates(SCRIPTS, default=5e-4),
    QloraOptions,
)
