"""A memory budget for the `Trainer` of Lightning."""

from __future__ import annotations

import functools

import lightning
from torch import nn

from toolkit.budget import AutoCheckpoint
from toolkit.methods.lean import auto_checkpoint


class _Step(nn.Module):
    """The `training_step` of a module as the forward of another, so that it is planned whatever it calls."""

    def __init__(self, module: lightning.LightningModule):
        super().__init__()
        self.module, self._run = module, module.training_step

    def forward(self, *args, **kwargs):
        return self._run(*args, **kwargs)


class BudgetCallback(lightning.Callback):
    """Keeps training within `budget`: `Trainer(..., callbacks=[BudgetCallback("2GB")])`.

    `settings`: those of `auto_checkpoint`, which says what is raised.  `handle` tells what was planned and
    what ran, also after the training.
    """

    def __init__(self, budget: int | str, **settings):
        self.budget, self.settings = budget, settings
        self.handle: AutoCheckpoint | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        settings = {"accumulate": trainer.accumulate_grad_batches, **self.settings}
        if trainer.optimizers:
            settings.setdefault("optimizer", trainer.optimizers[0])
        step = _Step(pl_module)
        self.handle = auto_checkpoint(step, self.budget, **settings)

        @functools.wraps(pl_module.training_step)
        def training_step(*args, **kwargs):
            return step(*args, **kwargs)

        self._own_step = vars(pl_module).get("training_step")  # one that was set on the object, if any
        pl_module.training_step = training_step

    def on_train_end(self, trainer, pl_module) -> None:
        if self.handle is not None:
            self.handle.remove()
            vars(pl_module).pop("training_step", None)
            if self._own_step is not None:
                pl_module.training_step = self._own_step

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.on_train_end(trainer, pl_module)
