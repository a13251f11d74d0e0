"""How a backbone is adapted: which parameters train, and what is added.

`adapt(model, "lora")` returns the model to train, `summarize(model)` counts it.  peft does what it
can; what it lacks (BitFit by module type) is here.  The classifier head trains under every method.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from toolkit.budget import find_blocks
from toolkit.errors import InputError, check_name


@dataclass(frozen=True)
class Method:
    """A way to adapt: `apply(model, **options)` returns the model to train."""

    apply: Callable[..., nn.Module]
    options: tuple[str, ...]  # the options that `apply` understands
    default_lr: float  # AdamW; chosen on the validation split of the embedded data sets


@dataclass(frozen=True)
class Summary:
    """Sizes of an adapted model."""

    trainable: int  # parameters that receive gradients
    total: int  # all parameters; peft's untouched copy of the head is not counted twice
    adapter_bytes: int  # what has to be stored per task: the trainable parameters

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.trainable / self.total:.2f} %), adapter {self.adapter_bytes:,} bytes"
        )


def adapt(model: nn.Module, method: str, **options: object) -> nn.Module:
    """Prepare `model` for training by `method`.

    `full`: everything trains.  `linear`: the head alone.  `bitfit`: head and bias terms (Ben Zaken et
    al. 2022, arXiv 2106.10199).  `lora`: head and low-rank updates of every linear layer in the blocks
    (Hu et al. 2022, arXiv 2106.09685); options `lora_rank`, `lora_alpha`, `lora_dropout`.

    Works in place; the returned module is the one to train (peft wraps).  Raises `InputError` for an
    unknown method or option, and for a model without a head that can be found.
    """
    chosen = METHODS[check_name("method", method, METHODS)]
    for name in options:
        check_name(f"option of method {method!r}", name, chosen.options or ["(it has none)"])
    return chosen.apply(model, **options)


def summarize(model: nn.Module) -> Summary:
    """Count the parameters of an adapted model."""
    parameters = [p for name, p in model.named_parameters() if ".original_module." not in name]
    trainable = [p for p in parameters if p.requires_grad]
    return Summary(
        trainable=sum(p.numel() for p in trainable),
        total=sum(p.numel() for p in parameters),
        adapter_bytes=sum(p.numel() * p.element_size() for p in trainable),
    )


def head_name(model: nn.Module) -> str:
    """Name of the classifier: what timm's `get_classifier()` returns."""
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()
        for name, module in model.named_modules():
            if module is head and next(head.parameters(), None) is not None:
                return name
    raise InputError(
        f"{type(model).__name__} has no classifier to train: give it a get_classifier() that returns "
        "its head, as timm models have."
    )


def target_pattern(model: nn.Module) -> str:
    """Anchored pattern of the layers that low-rank methods adapt: the linear layers in the blocks.

    Full names, not suffixes: the suffix `proj` of a ViT's attention also matches `patch_embed.proj`.
    """
    names = [
        f"{block_name}.{name}"
        for block_name, block in find_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layers in its blocks for LoRA to adapt.")
    return "|".join(re.escape(name) for name in names)


def _full(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)


def _linear(model: nn.Module) -> nn.Module:
    head = head_name(model)
    model.requires_grad_(False)
    model.get_submodule(head).requires_grad_(True)
    return model


# By type, not by the substring "bias" of a name: that also catches TinyViT's attention_biases, which
# are position tables and no bias terms.
_WITH_BIAS = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _bitfit(model: nn.Module) -> nn.Module:
    _linear(model)
    biased = [m for m in model.modules() if isinstance(m, _WITH_BIAS) and m.bias is not None]
    for module in biased:
        module.bias.requires_grad_(True)
    return model


def _lora(model: nn.Module, lora_rank: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.0) -> nn.Module:
    import peft  # here, because it brings transformers along: seconds that the other methods do without

    config = peft.LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_pattern(model),
        modules_to_save=[head_name(model)],
    )
    return peft.get_peft_model(model, config)


METHODS = {
    "linear": Method(_linear, (), default_lr=1e-2),
    "bitfit": Method(_bitfit, (), default_lr=5e-3),
    "lora": Method(_lora, ("lora_rank", "lora_alpha", "lora_dropout"), default_lr=3e-3),
    "full": Method(_full, (), default_lr=1e-3),
}
