"""The model of an experiment, a seeded backbone with a fresh head for its task, and its optimizer."""

from __future__ import annotations

import torch
from timm.utils import random_seed
from torch import nn

from toolkit.backbones import build_backbone, data_config, resize
from toolkit.backbones.dense import build_dense
from toolkit.budget import format_bytes, tensors_of
from toolkit.datasets import find_dataset
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.methods import METHODS


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random: call it before the model is built (its head is random)."""
    random_seed(seed)


def check_fits_weights(model: nn.Module, budget_bytes: int) -> None:
    """Raise `InputError` if the weights alone exceed the budget."""
    weights = sum(t.numel() * t.element_size() for t in tensors_of(model))
    if weights > budget_bytes:
        raise InputError(
            f"budget {format_bytes(budget_bytes)} is smaller than the weights alone "
            f"({format_bytes(weights)}); raise the budget or choose a smaller backbone."
        )


def build_model(experiment: Experiment, num_classes: int, pretrained: bool | None = None) -> nn.Module:
    """The backbone of `experiment` with a fresh head for its task, not adapted yet.

    `pretrained`: as the experiment says if None.  Raises `InputError` for a model that cannot be built.
    """
    e = experiment
    pixels = e.resolution or find_dataset(e.dataset).image_pixels
    pretrained = e.pretrained if pretrained is None else pretrained
    return build_network(e.backbone, e.head, e.task, num_classes, pretrained, pixels)


def build_network(
    backbone: str, head: str, task: str, num_classes: int, pretrained: bool, pixels: int | None
) -> nn.Module:
    """A classifier, or with a `head` a dense model, for square images of `pixels` a side; None or 0: the
    backbone's own size."""
    if head:
        return build_dense(backbone, head, num_classes, pretrained, task, image_size=pixels or None)
    model = build_backbone(backbone, num_classes, pretrained)
    if pixels and (3, pixels, pixels) != tuple(data_config(model)["input_size"]):
        resize(model, backbone, pixels)
    return model


def optimizer_of(model: nn.Module, experiment: Experiment) -> torch.optim.Optimizer:
    """The optimizer of the experiment's method, on what trains of the adapted `model`."""
    method = METHODS[experiment.method]
    options = method.options(**{name: experiment.options[name] for name in method.options.names()})
    return method.make_optimizer(model, options, lr=experiment.lr, weight_decay=experiment.weight_decay)
