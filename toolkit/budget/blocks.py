"""The blocks of a network: the repeated units at whose boundaries activations may be dropped."""

from __future__ import annotations

from collections import Counter

from torch import nn

from toolkit.errors import InputError


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks of `model` by name, in the order of `model.named_modules()`.

    A block is a composite element of an `nn.Sequential` or `nn.ModuleList`, the innermost such, of a
    type that occurs at least twice: the transformer blocks of a ViT, the MBConv and attention blocks of a
    TinyViT rather than whole stages, the residual blocks of a ResNet.  Adapter layers (modules with a
    `base_layer`) are not blocks, so an adapted model has the blocks of the model inside.

    Raises `InputError` if nothing repeats.
    """
    candidates: dict[str, nn.Module] = {}
    for name, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        for child_name, child in container.named_children():
            composite = next(child.children(), None) is not None
            if composite and not _is_container(child) and not hasattr(child, "base_layer"):
                candidates[f"{name}.{child_name}" if name else child_name] = child
    innermost = {
        name: block
        for name, block in candidates.items()
        if not any(other.startswith(f"{name}.") for other in candidates)
    }
    repeats = Counter(type(block) for block in innermost.values())
    blocks = {name: block for name, block in innermost.items() if repeats[type(block)] > 1}
    if not blocks:
        raise InputError(
            f"{type(model).__name__} has no repeated composite modules in an nn.Sequential or "
            "nn.ModuleList, so nothing can be checkpointed block by block; use checkpointing 'none'."
        )
    return blocks


def find_segments(model: nn.Module, names: list[str] | None = None) -> dict[str, nn.Module]:
    """Modules at whose ends a plan may cut a model: those in `names`, or its blocks, or if nothing repeats,
    modules with at most an eighth of the parameters.

    Raises `InputError` for a name that is not a module of the model.
    """
    if names is not None:
        modules = dict(model.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise InputError(
                f"{type(model).__name__} has no module {unknown[0]!r}; see model.named_modules()."
            )
        return {name: modules[name] for name in names}
    try:
        return find_blocks(model)
    except InputError:
        largest = sum(p.numel() for p in model.parameters()) / 8
        segments: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if not name or any(name.startswith(f"{other}.") for other in segments) or _is_container(module):
                continue
            size = sum(p.numel() for p in module.parameters())
            if 0 < size <= largest or next(module.children(), None) is None:
                segments[name] = module
        return segments


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
