"""AdamW with weight decay where a backbone wants it, and what an optimizer's step computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from toolkit.errors import InputError, Options

# Operations per number of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2): first moment 3
# (two products, a sum), second 4, its root over the root of its bias correction plus epsilon 3, the quotient,
# its product with the step size and the difference 3.  Weight decay is one product more.
ADAM_FLOPS, DECAY_FLOPS = 13, 1


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters of `model` with and without weight decay.

    Norms, biases and what the backbone names in `no_weight_decay()` go without.
    """
    from timm.optim import param_groups_weight_decay  # timm takes seconds to import

    names: set[str] = set()
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):
            names |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)


def adamw(model: nn.Module, options: Options, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on what trains of an adapted model."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=lr, fused=True)


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
    """Count a step by the shapes of the parameters, which may be fake or meta tensors.

    An optimizer that is not AdamW counts itself by a method `step_flops()`.  Raises `InputError` for others.
    """
    if hasattr(optimizer, "step_flops"):
        return optimizer.step_flops()
    if type(optimizer) is not torch.optim.AdamW:
        raise InputError(
            f"the operations of {type(optimizer).__name__} are not known: it has no step_flops()."
        )
    total = 0
    for group in optimizer.param_groups:
        per_number = ADAM_FLOPS + (DECAY_FLOPS if group["weight_decay"] else 0)
        total += per_number * sum(parameter.numel() for parameter in group["params"])
    return OptimizerFlops(total)
