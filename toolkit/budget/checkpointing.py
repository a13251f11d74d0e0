"""Which blocks drop their activations and compute them again in the backward pass.

* `none`: no block.
* `static`: every block, what `set_grad_checkpointing(True)` of the model libraries does.
* `threshold`: the adaptive rule of arXiv 2607.02158, read off its code.  On entering a block, if the
  bytes allocated right then reach `threshold * budget`, this block is checkpointed, otherwise not.
  Kept faithful, with its weakness: it looks at memory before the block and never at what backward
  will need, so **nothing guarantees the budget**.

Recomputation is torch's non-reentrant `checkpoint`: equal losses and gradients, frozen parameters
and autocast included.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.budget.blocks import find_blocks
from toolkit.budget.memory import DeviceMemory
from toolkit.errors import check_name

STRATEGIES = ("none", "static", "threshold")


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
        self.strategy = check_name("checkpointing strategy", strategy, STRATEGIES)
        self.memory = memory
        self.threshold_bytes = threshold * budget_bytes
        self.checkpointed: set[str] = set()
        self.blocks = {} if strategy == "none" else find_blocks(model)
        for name, block in self.blocks.items():
            block.forward = functools.partial(self._run, name, block.forward)

    def _run(self, name: str, forward, *args, **kwargs):
        self.checkpointed.discard(name)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self.strategy == "threshold" and self.memory.allocated_bytes < self.threshold_bytes:
            return forward(*args, **kwargs)
        self.checkpointed.add(name)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def remove(self) -> None:
        """Give every block its own forward back."""
        for block in self.blocks.values():
            block.__dict__.pop("forward", None)
        self.blocks = {}

    def __enter__(self) -> Checkpointing:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()
