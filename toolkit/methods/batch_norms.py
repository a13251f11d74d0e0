"""The mean and variance by which batch norms normalise in training.

They are the running statistics, as the backbone brought them ("frozen"), or the batch's, which the running
statistics then follow ("updated").  The statistics are not parameters, so no method trains them, but moving
them alone adapts a network to shifted data, and small batches make them drift: so the choice is recorded with
each run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from toolkit.budget.fakes import on_fake_tensors
from toolkit.errors import InputError

BATCH_NORMS = ("auto", "frozen", "updated")


def freeze_statistics(model: nn.Module, frozen: bool = True) -> None:
    """Let the batch norms of `model` keep their statistics in training, or not."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.frozen_statistics = frozen


def set_train_mode(model: nn.Module) -> None:
    """`model.train()`, but batch norms with frozen statistics stay in evaluation mode.

    In a model that was not adapted, batch norms with no trained parameter do.  So do modules that a method
    marked `always_evaluates`.
    """
    model.train()
    for module in model.modules():
        if getattr(module, "always_evaluates", False):
            module.training = False
        elif isinstance(module, _NormBase):
            parameters = list(module.parameters(recurse=False))
            untrained = bool(parameters) and not any(p.requires_grad for p in parameters)
            if getattr(module, "frozen_statistics", untrained):
                module.eval()


def check_batch_norms(model: nn.Module, batch_sizes: Iterable[int], input_size: tuple[int, int, int]) -> None:
    """Raise `InputError` if a batch of one image gives a batch norm in training one value per channel, which
    has no variance.

    `batch_sizes`: of all batches that training will meet, in images; `input_size`: (channels, height, width)
    in pixels.  Computes nothing and does not change the model.
    """
    sizes = sorted(set(batch_sizes))
    if 1 not in sizes:
        return
    parameter = next(model.parameters())
    images = torch.zeros(1, *input_size, device=parameter.device)

    def check(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training and inputs[0].numel() == inputs[0].shape[1]:
            more = f" ({sizes[-1]} does)" if len(sizes) > 1 else ""
            raise InputError(
                f"{name} normalises by the statistics of the batch, and one image of {input_size[1]} x "
                f"{input_size[2]} pixels gives it a single value per channel; choose a batch_size (and "
                f"micro_batch_size) above 1 that leaves no single image over{more}, larger images, or "
                "batch_norm='frozen'."
            )

    # The real model gets neither the mode nor the hooks.
    with on_fake_tensors(model, images) as fake, torch.no_grad():
        set_train_mode(model)
        norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training}
        for name, module in norms.items():
            module.register_forward_pre_hook(partial(check, name))
        if norms:
            model(fake)
