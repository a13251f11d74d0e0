"""Methods of adaptation: which parameters of a backbone train, and what is added to it.

`adapt(model, "lora", rank=4)` returns the model to train, `summarize(model)` counts its parameters.  The
classifier head trains under every method.  Each method is declared in a file of its own, see `registry`:
function, options, learning rates, optimizer and hooks.

To add one, write `methods/<name>.py` and add it to `_DECLARING` (or `register` it from your own code).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.errors import InputError, check_name
from toolkit.methods.batch_norms import (
    BATCH_NORMS,
    check_batch_norms,
    freeze_statistics,
    set_train_mode,
)
from toolkit.methods.gradients import check_gradients
from toolkit.methods.low_rank import merge
from toolkit.methods.registry import (
    METHODS,
    Hooks,
    LearningRate,
    Method,
    rates,
    register,
)
from toolkit.methods.trainable import head_name

__all__ = [
    "BATCH_NORMS",
    "METHODS",
    "Hooks",
    "LearningRate",
    "Method",
    "Summary",
    "adapt",
    "check_batch_norms",
    "check_statistics",
    "head_name",
    "merge",
    "rates",
    "register",
    "set_train_mode",
    "summarize",
]

# Modules that declare methods, in the order in which tables list them.
_DECLARING = "trainable low_rank adalora qlora factors losa lst dtl e3va galore full"
for _name in _DECLARING.split():
    importlib.import_module(f"toolkit.methods.{_name}")


def check_statistics(method: str, batch_norm: str) -> None:
    """Raise `InputError` if batch norms would have to follow a backbone that is always evaluating."""
    if batch_norm == "updated" and METHODS[method].frozen_backbone:
        raise InputError(
            f"batch_norm 'updated' is not for method {method!r}, whose backbone stays as it is; choose "
            "'frozen'."
        )


@dataclass(frozen=True)
class Summary:
    """Sizes of an adapted model."""

    trainable: int  # parameters that receive gradients
    total: int  # all parameters; peft's untouched copy of the head is not counted twice
    adapter_bytes: int  # what has to be stored per task: the trainable parameters
    names: tuple[str, ...]  # of the parameters that receive gradients
    unchecked: str  # why `adapt` could not check on fake tensors that they do; "" if it could

    def __str__(self) -> str:
        unchecked = f"; not checked that all get a gradient: {self.unchecked}" if self.unchecked else ""
        return (
            f"{self.trainable:,} of {self.total:,} parameters train "
            f"({100 * self.trainable / self.total:.2f} %), adapter {self.adapter_bytes:,} bytes{unchecked}"
        )


def adapt(model: nn.Module, method: str, **options: object) -> nn.Module:
    """Prepare `model` for training by `method`, one of `METHODS`; the head trains under each.

    `options`: fields of `METHODS[method].options`, such as `rank`, and `batch_norm`: "frozen", batch norms
    normalise by their running statistics and keep them; "updated", by the batch, and the statistics follow;
    "auto", updated where everything trains, else frozen.

    Works in place; the returned module is the one to train (peft wraps).  A model without `pretrained_cfg`
    that cannot read images of 224 pixels gets one with a size that it can.  Raises `InputError`, before
    anything is changed, for an unknown method or option, a rank that a layer cannot have, a layer that the
    method cannot adapt, and a model without a head or layers that can be found.
    """
    chosen = METHODS[check_name("method", method, METHODS)]
    if hasattr(model, "peft_config"):
        raise InputError(
            "the model carries adapters already; take a fresh backbone, or methods.merge(model) first."
        )
    for name in options:
        check_name(f"option of method {method!r}", name, (*chosen.options.names(), "batch_norm"))
    statistics = check_name("batch_norm", str(options.pop("batch_norm", "auto")), BATCH_NORMS)
    check_statistics(method, statistics)
    model = chosen.apply(model, chosen.options(**options))
    freeze_statistics(model, (chosen.batch_norm if statistics == "auto" else statistics) == "frozen")
    model.unchecked = check_gradients(model)
    return model


def summarize(model: nn.Module) -> Summary:
    """Count the parameters of an adapted model."""
    parameters = {name: p for name, p in model.named_parameters() if ".original_module." not in name}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    return Summary(
        trainable=sum(p.numel() for p in trainable.values()),
        total=sum(map(_count, parameters.values())),
        adapter_bytes=sum(p.numel() * p.element_size() for p in trainable.values()),
        names=tuple(trainable),
        unchecked=getattr(model, "unchecked", ""),
    )


def _count(parameter: torch.Tensor) -> int:
    """Number of elements (4-bit weights pack two per byte)."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
