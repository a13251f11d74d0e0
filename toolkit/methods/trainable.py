"""Which of a model's own parameters train, for methods that add nothing to it."""

from __future__ import annotations

from torch import nn

from toolkit.errors import InputError

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# By type, not by the substring "bias" of a name: that also catches TinyViT's attention_biases, which
# are position tables and no bias terms.
_WITH_BIAS = (nn.Linear, nn.modules.conv._ConvNd, *NORMS)


def head_name(model: nn.Module) -> str:
    """Name of the classifier: what timm's `get_classifier()` returns."""
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()
        for name, module in model.named_modules():
            if module is head and next(head.parameters(), None) is not None:
                return name
    raise InputError(
        f"{type(model).__name__} has no classifier to train: give it a get_classifier() that returns "
        "its head, as timm models have."
    )


def full(model: nn.Module) -> nn.Module:
    freeze_statistics(model, False)
    return model.requires_grad_(True)


def linear(model: nn.Module) -> nn.Module:
    head = head_name(model)
    model.requires_grad_(False)
    model.get_submodule(head).requires_grad_(True)
    freeze_statistics(model)
    return model


def bitfit(model: nn.Module) -> nn.Module:
    linear(model)
    for module in model.modules():
        if isinstance(module, _WITH_BIAS) and getattr(module, "bias", None) is not None:
            module.bias.requires_grad_(True)
    return model


def norm(model: nn.Module) -> nn.Module:
    linear(model)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
    return model


def freeze_statistics(model: nn.Module, frozen: bool = True) -> None:
    """Let the batch norms of `model` normalise by the statistics that they have, in training too, or not.

    They are no parameters, so no adapter would carry them, and small batches make them drift.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.frozen_statistics = frozen


def set_train_mode(model: nn.Module) -> None:
    """`model.train()`, but batch norms with frozen statistics or parameters keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            parameters = list(module.parameters(recurse=False))
            frozen = parameters and not any(p.requires_grad for p in parameters)
            if frozen or getattr(module, "frozen_statistics", False):
                module.eval()
