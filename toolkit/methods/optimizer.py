"""The optimizer of a method, and what its step computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from toolkit.errors import InputError, check_name
from toolkit.methods import METHODS
from toolkit.methods.galore import GaLore, is_projected, matrix_shape

if TYPE_CHECKING:
    from toolkit.experiment import Experiment

# Operations per number of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2): first moment 3
# (two products, a sum), second 4, its root over the root of its bias correction plus epsilon 3, the quotient,
# its product with the step size and the difference 3.  Weight decay is one product more.
ADAM_FLOPS, DECAY_FLOPS = 13, 1


def optimizer_for(
    model: nn.Module, method: str, *, lr: float, weight_decay: float, **options: float
) -> torch.optim.Optimizer:
    """AdamW, or `GaLore` for "galore", on what trains of an adapted model.

    Norms, biases and what the backbone names in `no_weight_decay()` go without weight decay.  `options`: the
    `optimizer_options` of the method, `galore_rank`, `galore_gap`, `galore_scale` and `galore_spectrum`.
    Raises `InputError` for an unknown method or option.
    """
    known = METHODS[check_name("method", method, METHODS)].optimizer_options
    for name in options:
        check_name(f"optimizer option of method {method!r}", name, known or ["(it has none)"])
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=_without_weight_decay(model))
    if method == "galore":
        return GaLore(groups, lr=lr, **{k.removeprefix("galore_"): value for k, value in options.items()})
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def optimizer_of(model: nn.Module, experiment: Experiment) -> torch.optim.Optimizer:
    """`optimizer_for` as an experiment asks for it."""
    return optimizer_for(
        model, experiment.method, lr=experiment.lr, weight_decay=experiment.weight_decay,
        **experiment.optimizer_options,
    )  # fmt: skip


@contextmanager
def in_use(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Afterwards `optimizer` takes no gradients of its model any more, whoever still holds it."""
    try:
        yield
    finally:
        if isinstance(optimizer, GaLore):
            optimizer.close()


@dataclass(frozen=True)
class OptimizerFlops:
    """Floating-point operations of an optimizer's step."""

    adam: int  # per step
    projection: int = 0  # per step with one backward pass, to the subspaces and back
    svd_per_refresh: int = 0  # whenever the subspaces are chosen
    gap: int = 1  # steps from one choice to the next

    @property
    def per_step(self) -> float:
        """All of a step, with its share of the decompositions."""
        return self.adam + self.projection + self.svd_per_refresh / self.gap


def optimizer_flops(optimizer: torch.optim.Optimizer) -> OptimizerFlops:
    """Count a step of AdamW or `GaLore` by the shapes of the parameters, which may be fake or meta tensors.

    Two per multiply-add of a projection; 6 m n^2 + 20 n^3 for the singular vectors of (m, n), m >= n (Golub
    and Van Loan, Matrix Computations, 4th ed., fig. 8.6.1, R-SVD).  Ranks by spectrum count as the most that
    they may be until the first step has decided them.  Raises `InputError` for other optimizers.
    """
    if type(optimizer) not in (torch.optim.AdamW, GaLore):
        raise InputError(
            f"the operations of {type(optimizer).__name__} are not known; pass an AdamW or a GaLore."
        )
    adam = projection = svd = 0
    for group in optimizer.param_groups:
        decay = DECAY_FLOPS if group["weight_decay"] else 0
        for parameter in group["params"]:
            count = parameter.numel()
            if isinstance(optimizer, GaLore) and is_projected(parameter, group["rank"]):
                n, m = sorted(matrix_shape(parameter))
                projector = optimizer.state.get(parameter, {}).get("projector")
                rank = group["rank"] if projector is None else projector.shape[1]
                projection += 2 * 2 * rank * count
                svd += 6 * m * n**2 + 20 * n**3
                count = rank * m
            adam += ADAM_FLOPS * count + decay * parameter.numel()
    gap = optimizer.param_groups[0]["gap"] if isinstance(optimizer, GaLore) else 1
    return OptimizerFlops(adam, projection, svd, gap)


def _without_weight_decay(model: nn.Module) -> set[str]:
    """Names of parameters that the backbone wants no weight decay for, as they are called in `model`."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            names |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return names
