"""The training step of an experiment, before anything is downloaded or trained: what plans are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.backbones import build_backbone, data_config
from toolkit.experiment import Experiment
from toolkit.methods import adapt, set_train_mode
from toolkit.methods.allocation import allocation_of
from toolkit.methods.optimizer import optimizer_of


@dataclass(frozen=True)
class Step:
    """An adapted model with random weights in training mode, a batch of zeros, `fit`'s loss and optimizer."""

    model: nn.Module
    batch: tuple[torch.Tensor, torch.Tensor]  # images (B, C, H, W), labels (B,)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of logits and labels
    optimizer: torch.optim.Optimizer


def step_of(experiment: Experiment, num_classes: int) -> Step:
    """The step of `experiment` on images of `num_classes` classes, on its device.

    Raises `InputError` for a model that cannot be built or adapted.
    """
    model = build_backbone(experiment.backbone, num_classes, pretrained=False)
    model = adapt(model, experiment.method, **experiment.method_options).to(experiment.device)
    set_train_mode(model)
    size, device = experiment.batch_size, experiment.device
    images = torch.zeros(size, *data_config(model)["input_size"], device=device)
    labels = torch.zeros(size, dtype=torch.long, device=device)
    allocation = allocation_of(model)

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits, labels)
        return loss + allocation.penalty() if allocation else loss

    return Step(model, (images, labels), loss, optimizer_of(model, experiment))
