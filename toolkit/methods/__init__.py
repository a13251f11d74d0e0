"""How a backbone is adapted: which parameters train, and what is added.

`adapt(model, "lora")` returns the model to train, `summarize(model)` counts it.  peft does what it
can; what it lacks (BitFit by module type, training AdaLoRA) is here.  The classifier head trains under
every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.errors import InputError, check_name
from toolkit.methods.low_rank import adalora, dora, lora, merge, qlora
from toolkit.methods.trainable import bitfit, full, head_name, linear, norm, set_train_mode

__all__ = ["METHODS", "Summary", "adapt", "head_name", "merge", "set_train_mode", "summarize"]

_LOW_RANK = ("lora_rank", "lora_alpha", "lora_dropout")


@dataclass(frozen=True)
class Method:
    """A way to adapt: `apply(model, **options)` returns the model to train."""

    apply: Callable[..., nn.Module]
    options: tuple[str, ...]  # the options that `apply` understands


METHODS = {
    "linear": Method(linear, ()),
    "bitfit": Method(bitfit, ()),
    "norm": Method(norm, ()),
    "lora": Method(lora, _LOW_RANK),
    "dora": Method(dora, _LOW_RANK),
    "adalora": Method(adalora, _LOW_RANK),
    "qlora": Method(qlora, (*_LOW_RANK, "double_quantisation")),
    "full": Method(full, ()),
}


@dataclass(frozen=True)
class Summary:
    """Sizes of an adapted model."""

    trainable: int  # parameters that receive gradients
    total: int  # all parameters; peft's untouched copy of the head is not counted twice
    adapter_bytes: int  # what has to be stored per task: the trainable parameters
    names: tuple[str, ...]  # of the parameters that receive gradients

    def __str__(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.trainable / self.total:.2f} %), adapter {self.adapter_bytes:,} bytes"
        )


def adapt(model: nn.Module, method: str, **options: object) -> nn.Module:
    """Prepare `model` for training by `method`; the head trains under each.

    `full`: everything.  `linear`: nothing else.  `bitfit`: bias terms (Ben Zaken et al. 2022, arXiv
    2106.10199).  `norm`: weights and biases of norms (Frankle et al. 2021, arXiv 2003.00152).  `lora`:
    low-rank updates of the linear layers in the blocks (Hu et al. 2022, arXiv 2106.09685); `dora`: with
    magnitudes apart from directions (Liu et al. 2024, arXiv 2402.09353); `adalora`: with ranks that move
    between layers, see `allocation` (Zhang et al. 2023, arXiv 2303.10512); `qlora`: on weights of four bits
    (Dettmers et al. 2023, arXiv 2305.14314).  Options of these four: `lora_rank`, `lora_alpha`,
    `lora_dropout`; of `qlora` also `double_quantisation`.

    Under all but `full` batch norms keep their statistics.  Works in place; the returned module is the one
    to train (peft wraps).  Raises `InputError` for an unknown method or option, a rank that a layer
    cannot have, and a model without a head or layers that can be found.
    """
    chosen = METHODS[check_name("method", method, METHODS)]
    if hasattr(model, "peft_config"):
        raise InputError(
            "the model carries adapters already; take a fresh backbone, or methods.merge(model) first."
        )
    for name in options:
        check_name(f"option of method {method!r}", name, chosen.options or ["(it has none)"])
    return chosen.apply(model, **options)


def summarize(model: nn.Module) -> Summary:
    """Count the parameters of an adapted model."""
    parameters = {name: p for name, p in model.named_parameters() if ".original_module." not in name}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    return Summary(
        trainable=sum(p.numel() for p in trainable.values()),
        total=sum(map(_count, parameters.values())),
        adapter_bytes=sum(p.numel() * p.element_size() for p in trainable.values()),
        names=tuple(trainable),
    )


def _count(parameter: torch.Tensor) -> int:
    """Numbers in a parameter, of which a byte may hold two."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
