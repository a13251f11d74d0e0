"""A memory budget for the `Trainer` of transformers, and for those of TRL."""

from __future__ import annotations

from transformers import TrainerCallback

from toolkit.budget import AutoCheckpoint
from toolkit.methods.lean import auto_checkpoint


class BudgetCallback(TrainerCallback):
    """Keeps training within `budget`: `Trainer(..., callbacks=[BudgetCallback("2GB")])`.

    `settings`: those of `auto_checkpoint`, which says what is raised.  `handle` tells what was planned and
    what ran, also after the training.
    """

    def __init__(self, budget: int | str, **settings):
        self.budget, self.settings = budget, settings
        self.handle: AutoCheckpoint | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        settings = {"accumulate": args.gradient_accumulation_steps, **self.settings}
        self.handle = auto_checkpoint(model, self.budget, optimizer=optimizer, **settings)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.handle.remove()
