"""A memory budget for a loop of accelerate."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from toolkit.budget import AutoCheckpoint
from toolkit.methods.lean import auto_checkpoint


def keep_budget(
    accelerator: Accelerator, model: nn.Module, budget: int | str, *, optimizer=None, **settings
) -> AutoCheckpoint:
    """Keep the training of `model`, as `accelerator.prepare` returned it, within `budget` until `.remove()`.

    `settings`: those of `auto_checkpoint`, which says what is raised.
    """
    settings = {"accumulate": accelerator.gradient_accumulation_steps, **settings}
    return auto_checkpoint(model, budget, optimizer=optimizer, **settings)
