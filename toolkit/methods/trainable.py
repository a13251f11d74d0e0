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
    return model.requires_grad_(True)


def linear(model: nn.Module) -> nn.Module:
    head = head_name(model)
    model.requires_grad_(False)
    model.get_submodule(head).requires_grad_(True)
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
