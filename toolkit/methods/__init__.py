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
from toolkit.methods.batch_norms import (
    BATCH_NORMS,
    check_batch_norms,
    freeze_statistics,
    set_train_mode,
)
from toolkit.methods.dtl import dtl
from toolkit.methods.e3va import e3va
from toolkit.methods.losa import losa
from toolkit.methods.low_rank import adalora, dora, ia3, lokr, lora, merge, qlora
from toolkit.methods.lst import lst
from toolkit.methods.trainable import bitfit, full, head_name, linear, norm

__all__ = [
    "BATCH_NORMS",
    "CACHEABLE",
    "DENSE_METHODS",
    "METHODS",
    "SIDE_METHODS",
    "Summary",
    "adapt",
    "check_batch_norms",
    "head_name",
    "merge",
    "set_train_mode",
    "summarize",
]

_TARGETS = ("lora_targets", "clip_rank")
_LOW_RANK = ("lora_rank", "lora_alpha", "lora_dropout", *_TARGETS)
_GALORE = ("galore_rank", "galore_gap", "galore_scale", "galore_spectrum")


@dataclass(frozen=True)
class Method:
    """A way to adapt: `apply(model, **options)` returns the model to train."""

    apply: Callable[..., nn.Module]
    apply_options: tuple[str, ...] = ()  # that `apply` understands
    optimizer_options: tuple[str, ...] = ()  # that `optimizer_for` understands
    batch_norm: str = "frozen"  # what "auto" means: frozen | updated

    @property
    def options(self) -> tuple[str, ...]:
        """The options that `adapt` takes."""
        return (*self.apply_options, "batch_norm")


METHODS = {
    "linear": Method(linear),
    "bitfit": Method(bitfit),
    "norm": Method(norm),
    "lora": Method(lora, (*_LOW_RANK, "depthwise")),
    "dora": Method(dora, (*_LOW_RANK, "depthwise")),
    "adalora": Method(adalora, (*_LOW_RANK, "depthwise")),
    "qlora": Method(qlora, (*_LOW_RANK, "double_quantisation")),
    "ia3": Method(ia3, ("lora_targets",)),
    "lokr": Method(lokr, ("lora_rank", "lora_alpha", "lora_targets")),
    "losa": Method(losa, ("side_rank", "side_taps", "losa_start", "losa_mixer", "four_bit_backbone")),
    "lst": Method(lst, ("side_reduction", "side_taps", "lst_init", "four_bit_backbone")),
    "dtl": Method(dtl, ("side_rank", "dtl_feedback", "dtl_backprop", "four_bit_backbone")),
    "e3va": Method(e3va, ("side_rank", "side_reduction")),
    "galore": Method(full, (), _GALORE, batch_norm="updated"),
    "full": Method(full, batch_norm="updated"),
}
SIDE_METHODS = ("losa", "lst", "dtl")  # of classifiers only
DENSE_METHODS = ("e3va",)  # of models for dense tasks only
CACHEABLE = ("linear", "losa", "lst")  # read frozen features only, which do not change as they train


def check_statistics(method: str, batch_norm: str) -> None:
    """Raise `InputError` for statistics that would have to follow a backbone which always evaluates."""
    if batch_norm == "updated" and method in (*SIDE_METHODS, *DENSE_METHODS):
        raise InputError(
            f"batch_norm 'updated' is not for method {method!r}, whose backbone is frozen as it is; choose "
            "'frozen'."
        )


def options_not_of(method: str) -> set[str]:
    """Options of other methods that `method` does not have."""
    own = METHODS[method]
    every = set().union(*(m.options + m.optimizer_options for m in METHODS.values()))
    return every - {*own.options, *own.optimizer_options}


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
    2106.10199).  `norm`: weights and biases of norms (Frankle et al. 2021, arXiv 2003.00152).  `galore`:
    everything, by an optimizer that works in subspaces of the gradients, see `optimizer_for` (Zhao et al.
    2024, arXiv 2403.03507).

    Adapters, of the layers that `targets.targets_of` says, linear ones or convolutions.  `lora`: low-rank
    updates (Hu et al. 2022, arXiv 2106.09685); `dora`: with magnitudes apart from directions (Liu et al.
    2024, arXiv 2402.09353); `adalora`: with ranks that move between layers, see `allocation` (Zhang et al.
    2023, arXiv 2303.10512); `qlora`: on weights of four bits, of linear layers (Dettmers et al. 2023, arXiv
    2305.14314); `ia3`: a factor for each output channel (Liu et al. 2022, arXiv 2205.05638); `lokr`:
    Kronecker products (LyCORIS, Yeh et al. 2023, arXiv 2309.14859).

    Side networks, which read a frozen backbone's features, so that no gradient runs through it.  `losa`:
    low-rank mixers refine them (Mercea et al. 2024, arXiv 2402.02887); `lst`: a narrow transformer beside
    the backbone (Sung et al. 2022, arXiv 2206.06522); `dtl`: a low-rank path that feeds back into later
    blocks (Fu et al. 2024, arXiv 2312.07856); `e3va`: a highway of adapters into a pyramid, of dense models
    (Yin et al. 2023, arXiv 2306.09729).

    Options, `METHODS[method].options`, say which of them a method takes:
    `batch_norm`: "frozen", batch norms normalise by their running statistics and keep them; "updated", by the
    batch, and the statistics follow; "auto", updated where everything trains, else frozen.
    `lora_rank`, `lora_alpha`, `lora_dropout`: updates are scaled by alpha / rank.
    `lora_targets`: regular expression of the whole names of the layers to adapt; "": the backbone's own.
    `clip_rank`: layers too narrow for `lora_rank` take the most that they allow, at the same scale.
    `depthwise`: "train" or "freeze" convolutions with groups beside adapters of convolutions.
    `double_quantisation`: the scales of weights of four bits are packed too.
    Those of side networks: see the modules named like the methods.

    Works in place; the returned module is the one to train (peft wraps).  Raises `InputError`, before
    anything is changed, for an unknown method or option, a rank that a layer cannot have, a layer that the
    method cannot adapt, and a model without a head or layers that can be found.
    """
    chosen = METHODS[check_name("method", method, METHODS)]
    if hasattr(model, "peft_config"):
        raise InputError(
            "the model carries adapters already; take a fresh backbone, or methods.merge(model) first."
        )
    for name in options:
        check_name(f"option of method {method!r}", name, chosen.options)
    kept = check_name("batch_norm", str(options.pop("batch_norm", "auto")), BATCH_NORMS)
    check_statistics(method, kept)
    model = chosen.apply(model, **options)
    freeze_statistics(model, (chosen.batch_norm if kept == "auto" else kept) == "frozen")
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
    )


def _count(parameter: torch.Tensor) -> int:
    """Numbers in a parameter, of which a byte may hold two."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()
