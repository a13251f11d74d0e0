"""The model of an experiment, and its training step before anything is downloaded or trained: what plans are
made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from toolkit.backbones import data_config
from toolkit.datasets import task_of
from toolkit.experiment import Experiment
from toolkit.methods import METHODS, Hooks, adapt, set_train_mode
from toolkit.model import build_model, optimizer_of
from toolkit.training.feature_cache import FeatureModel, layout_of


@dataclass(frozen=True)
class Step:
    """An adapted model with random weights in training mode, a batch of zeros, `fit`'s loss and optimizer."""

    model: nn.Module
    whole: nn.Module  # the same, or with the backbone that cached features go without
    batch: tuple[Any, Any]  # what the model takes, of images (B, C, H, W), and targets
    loss: Callable[[Any, Any], torch.Tensor]  # of outputs and targets
    optimizer: torch.optim.Optimizer
    hooks: Hooks = field(default_factory=Hooks)


def step_of(experiment: Experiment, num_classes: int) -> Step:
    """The step of `experiment` on images of `num_classes` classes, on its device.

    Raises `InputError` for a model that cannot be built or adapted.
    """
    model = build_model(experiment, num_classes, pretrained=False)
    model = adapt(model, experiment.method, **experiment.method_options).to(experiment.device)
    whole, task, size = model, task_of(experiment.dataset), experiment.batch_size
    _, *sides = shape = data_config(model)["input_size"]
    dtype = torch.float32
    if experiment.feature_cache:
        layout = layout_of(model, experiment.precision)
        model, shape, dtype = FeatureModel(model, layout), (sum(layout.sizes),), layout.dtype
    set_train_mode(model)
    images = torch.zeros(size, *shape, dtype=dtype, device=experiment.device)
    targets = tree_map(lambda t: t.to(experiment.device), task.zeros(size, *sides))
    hooks = METHODS[experiment.method].hooks(whole)

    def loss(outputs: Any, targets: Any) -> torch.Tensor:
        loss, penalty = task.loss(outputs, targets), hooks.penalty()
        return loss if penalty is None else loss + penalty

    batch = task.inputs(images, targets), targets
    return Step(model, whole, batch, loss, optimizer_of(model, experiment), hooks)
