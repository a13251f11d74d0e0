"""The declaration of a method.

One file declares one method (or one family): a function that adapts a model, a dataclass of options, learning
rates, and where needed an optimizer and hooks into the training loop.  `register` makes it known everywhere:
to `Experiment`, the command line, sweeps, forecasts and tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from toolkit.errors import Options
from toolkit.methods.optimizer import adamw

SCRIPTS = "training scripts of arXiv 2607.02158"
NOT_TRIED = "not searched here"
TUNED_ON = "searched here on the validation split of {}, as notebooks/3_methods.ipynb does"
# Where `searched` rates come from, by backbone.
_SEARCHED = {
    "demo_vit": "searched here on the validation splits of digits and textures, notebooks/3_methods.ipynb",
    "demo_swin": "tried on the validation split of mosaics, no other rate",
    "demo_cnn": TUNED_ON.format("digits"),
    "demo_cnn_digits": TUNED_ON.format("digits-c:mixed:3"),
    "demo_cnn_textures": TUNED_ON.format("textures-c:mixed:3"),
    "efficientnet_lite0": "searched here on the validation split of textures at 96 pixels",
}
TASKS = ("classification", "segmentation", "detection")


@dataclass(frozen=True)
class LearningRate:
    """Peak rate of AdamW with weight decay 0.05, warm-up over a tenth of the steps and a cosine to zero.

    Rates come from validation splits; nothing was chosen on a test split.
    """

    lr: float
    source: str


class Hooks:
    """The actions of a method around the steps of training; none by default."""

    held_bytes = 0  # of tensors that the method holds besides the model and the optimizer's state

    def __init__(self, model: nn.Module | None = None):
        pass

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        """Tensors counted in `held_bytes` that exist already."""
        return ()

    def begin(self, total_steps: int) -> None:
        """Prepare for `total_steps` optimizer steps; raise `InputError` if the method cannot train so few."""

    def penalty(self) -> torch.Tensor | None:
        """A term to add to the loss of each forward pass."""

    def after_step(self, step: int, *, finite: bool = True) -> None:
        """Act after optimizer step `step` (from 1), while the gradients are there.

        `finite`: False where a GradScaler skipped the step because of infinite gradients.
        """

    def step_kind(self, optimizer: torch.optim.Optimizer) -> object:
        """The kind of the next step: steps of one kind and batch size take equal memory."""

    def end(self, optimizer: torch.optim.Optimizer) -> None:
        """Release what the optimizer holds of the model, for whoever trains the model next."""

    def state(self) -> dict | None:
        """The state that an interrupted run needs to continue."""

    def load_state(self, state: dict | None) -> None:
        """Continue from `state()`."""


@dataclass(frozen=True)
class Method:
    """A way to adapt a model."""

    name: str
    adapt: Callable[[nn.Module, Any], nn.Module]  # (model, options) -> the model to train
    learning_rates: Mapping[str, LearningRate]  # by backbone; "default" serves all others
    options: type[Options] = Options
    tasks: tuple[str, ...] = TASKS
    batch_norm: str = "frozen"  # what "auto" means: frozen | updated
    frozen_backbone: bool = False  # always in evaluation mode, so batch norms cannot be updated
    frozen_features: bool = False  # trains on features that stay the same, which can be cached
    scales_gradients: bool = True  # works with the GradScaler of fp16
    # Which convolutions adapters can be added to, next to linear layers: plain | grouped | dilated | padded
    # (by other than zeros) | same (timm's `Conv2dSame`).
    convolutions: tuple[str, ...] = ()
    make_optimizer: Callable[..., torch.optim.Optimizer] = adamw  # (model, options, lr=, weight_decay=)
    hooks: Callable[[nn.Module], Hooks] = field(default=Hooks)

    def apply(self, model: nn.Module, options: Options | None = None) -> nn.Module:
        """Adapt `model`, which may be modified in place: use the model that is returned."""
        return self.adapt(model, self.options() if options is None else options)

    def learning_rate(self, backbone: str) -> LearningRate:
        """The rate for `backbone`, or the one for all backbones without their own."""
        return self.learning_rates.get(backbone) or self.learning_rates["default"]


METHODS: dict[str, Method] = {}  # in the order in which tables list them


def register(
    name: str,
    adapt: Callable[[nn.Module, Any], nn.Module],
    learning_rates: Mapping[str, LearningRate],
    options: type[Options] = Options,
    **declared: Any,
) -> Method:
    """Make a method known by its name; `declared`: further fields of `Method`."""
    METHODS[name] = Method(name, adapt, learning_rates, options, **declared)
    return METHODS[name]


def rates(source: str, **lrs: float) -> dict[str, LearningRate]:
    """Learning rates of one source, by backbone."""
    return {backbone: LearningRate(lr, source) for backbone, lr in lrs.items()}


def searched(**lrs: float) -> dict[str, LearningRate]:
    """Learning rates that were searched here, by backbone; `demo_cnn` without one has `demo_cnn_digits`'."""
    found = {backbone: LearningRate(lr, _SEARCHED[backbone]) for backbone, lr in lrs.items()}
    if "demo_cnn_digits" in lrs and "demo_cnn" not in lrs:
        found |= rates(f"as demo_cnn_digits; {NOT_TRIED}", demo_cnn=lrs["demo_cnn_digits"])
    return found
