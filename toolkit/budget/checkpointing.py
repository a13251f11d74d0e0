"""Which blocks drop their activations and compute them again in the backward pass.

* `none`: no block.
* `static`: every block, what `set_grad_checkpointing(True)` of the model libraries does.
* `threshold`: the adaptive rule of arXiv 2607.02158, read off its code.  On entering a block, if the
  bytes allocated right then reach `threshold * budget`, this block is checkpointed, otherwise not.
  Kept faithful, with its weakness: it looks at memory before the block and never at what backward
  will need, so **nothing guarantees the budget**.

The fourth strategy, `planned`, is ours: see `plan` and `auto`.

Recomputation is torch's non-reentrant `checkpoint`: equal losses and gradients, frozen parameters
and autocast included.  Batch norms update their running statistics in the first pass only; torch alone
would do it again in the second.
"""

from __future__ import annotations

import contextlib
import functools
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.budget.blocks import find_blocks
from toolkit.budget.memory import DeviceMemory
from toolkit.errors import check_name

RULES = ("none", "static", "threshold")
STRATEGIES = (*RULES, "planned")


class Checkpointing:
    """Wraps the blocks of `model` until `remove()`, or as a context manager.

    `budget_bytes`, `threshold` and `memory` matter to the strategy `threshold` only.
    `checkpointed` holds the names of the blocks that the latest forward pass checkpointed.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: str,
        *,
        memory: DeviceMemory,
        budget_bytes: int,
        threshold: float = 0.55,
    ):
        self.strategy = check_name("checkpointing strategy", strategy, RULES)
        self.memory = memory
        self.threshold_bytes = threshold * budget_bytes
        self.checkpointed: set[str] = set()
        self.blocks = {} if strategy == "none" else find_blocks(model)
        _warn_if_few(model, self.blocks)
        for name, block in self.blocks.items():
            block.forward = functools.partial(self._run, name, block, block.forward)

    def _run(self, name: str, block: nn.Module, forward, *args, **kwargs):
        self.checkpointed.discard(name)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self.strategy == "threshold" and self.memory.allocated_bytes < self.threshold_bytes:
            return forward(*args, **kwargs)
        self.checkpointed.add(name)
        contexts = functools.partial(_first_pass_and_recomputation, block)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def remove(self) -> None:
        """Give every block its own forward back."""
        for block in self.blocks.values():
            block.__dict__.pop("forward", None)
        self.blocks = {}

    def __enter__(self) -> Checkpointing:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def _first_pass_and_recomputation(block: nn.Module):
    return contextlib.nullcontext(), _running_statistics_kept(block)


@contextlib.contextmanager
def _running_statistics_kept(block: nn.Module):
    """Batch norms normalise by the batch as before, but leave their running statistics alone.

    A momentum of 0 does that and, unlike `track_running_stats = False`, saves the same tensors for
    backward, which `checkpoint` insists on.
    """
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    updating = [norm for norm in norms if norm.training and norm.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in updating]
    for norm in updating:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(updating, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def _warn_if_few(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Say so where the blocks are a small part of the model: little can be saved then."""
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for block in blocks.values() for p in block.parameters())
    if blocks and inside < total / 2:
        warnings.warn(
            f"the {len(blocks)} blocks found in {type(model).__name__} hold {100 * inside / total:.0f} % "
            "of its parameters; checkpointing them will save little memory.",
            stacklevel=3,
        )
