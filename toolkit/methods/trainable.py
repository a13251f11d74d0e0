"""Methods that add nothing to a model and train a few of its own parameters: head, bias terms, norms."""

from __future__ import annotations

from torch import nn

from toolkit.errors import InputError, Options
from toolkit.methods.registry import NOT_TRIED, SCRIPTS, rates, register, searched

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# By type, not by the substring "bias" of a name: that also matches TinyViT's attention_biases, which are
# position tables.
_WITH_BIAS = (nn.Linear, nn.modules.conv._ConvNd, *NORMS)
_HEADS = ("classifier", "fc", "head", "heads")  # in torchvision and transformers


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers: what timm's `get_classifier()` returns, one or several; without it the last
    layer of a child that is named as in torchvision."""
    if hasattr(model, "get_classifier"):
        found = _single(model.get_classifier())
    else:
        found = [_last(child) for name, child in model.named_children() if name in _HEADS]
    heads = {head for head in found if next(head.parameters(), None) is not None}
    names = tuple(name for name, module in model.named_modules() if module in heads)
    if not names:
        raise InputError(
            f"{type(model).__name__} has no classifier to train: give it a get_classifier() that returns "
            "its head, as timm models have."
        )
    return names


def head_name(model: nn.Module) -> str:
    """Name of the classifier, where there must be one: its input is cached."""
    names = head_names(model)
    if len(names) > 1:
        raise InputError(
            f"features are cached for one classifier, and {type(model).__name__} has several "
            f"({', '.join(names)}); set feature_cache to 0."
        )
    return names[0]


def _single(heads) -> list[nn.Module]:
    """The modules in a tuple or `ModuleList` of heads, which is not called itself."""
    if isinstance(heads, tuple | list | nn.ModuleList):
        return [module for head in heads for module in _single(head)]
    return [heads]


def _last(module: nn.Module) -> nn.Module:
    """The last layer with parameters of a (nested) `nn.Sequential`."""
    if type(module) is not nn.Sequential:
        return module
    holding = [child for child in module if next(child.parameters(), None) is not None]
    return _last(holding[-1]) if holding else module


def linear(model: nn.Module, options: Options | None = None) -> nn.Module:
    """Train the head alone."""
    heads = head_names(model)
    model.requires_grad_(False)
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    return model


def bitfit(model: nn.Module, options: Options | None = None) -> nn.Module:
    """Train head and bias terms (Ben Zaken et al. 2022, arXiv 2106.10199)."""
    linear(model)
    for module in model.modules():
        if isinstance(module, _WITH_BIAS) and getattr(module, "bias", None) is not None:
            module.bias.requires_grad_(True)
    return model


def norm(model: nn.Module, options: Options | None = None) -> nn.Module:
    """Train the head, and weights and biases of norms (Frankle et al. 2021, arXiv 2003.00152)."""
    linear(model)
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
    return model


register(
    "linear",
    linear,
    searched(
        demo_vit=1e-2,
        demo_swin=1e-2,
        demo_cnn=5e-2,
        demo_cnn_digits=2e-2,
        demo_cnn_textures=1e-2,
        efficientnet_lite0=3e-2,
    )
    | rates(NOT_TRIED, default=1e-3),
    frozen_features=True,
)
register(
    "bitfit",
    bitfit,
    searched(demo_vit=5e-3, demo_cnn_digits=5e-2, demo_cnn_textures=2e-2)
    | rates(f"as linear; {NOT_TRIED}", demo_swin=1e-2)
    | rates(f"{NOT_TRIED}; 5e-4 in the {SCRIPTS}", default=1e-3),
)
register(
    "norm",
    norm,
    searched(demo_vit=2e-2, demo_cnn_digits=2e-2, demo_cnn_textures=1e-2) | rates(NOT_TRIED, default=1e-3),
)
