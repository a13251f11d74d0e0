"""Which layers of a backbone get adapters, and whether these layers can have them.

A vision transformer's are the linear layers in its blocks.  Where the blocks hold none, as in a CNN, they
are all convolutions but the first, with those of squeeze-excite and downsampling.  A convolution with groups
has few weights and much structure: an adapter of low rank would be larger than it is (peft's LoRA of a
depthwise layer has more parameters than the layer and cannot be merged), so its own weights train beside the
adapters, or stay frozen; only IA3 and LoKr adapt it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from toolkit.budget import find_blocks
from toolkit.errors import InputError, check_name
from toolkit.methods.trainable import head_name

CONVOLUTIONAL = ("lora", "dora", "adalora", "ia3", "lokr")  # methods that can adapt a convolution
GROUPED = ("ia3", "lokr")  # and one with groups


@dataclass(frozen=True)
class Targets:
    """Whole names of layers, in the model's order."""

    adapted: tuple[str, ...]  # that get an adapter
    beside: tuple[str, ...]  # whose own weights train: the head, and convolutions with groups


def targets_of(model: nn.Module, method: str, lora_targets: str = "", depthwise: str = "freeze") -> Targets:
    """The layers that `method` adapts: those whose whole names the regular expression `lora_targets` matches,
    or the one that the model's class names so, or the usual ones (above); never the head, which trains.

    `depthwise`: "train" or "freeze" the convolutions with groups, all of the model, where a convolution is
    adapted.  Whole names, not suffixes: the suffix `proj` of a ViT's attention also matches
    `patch_embed.proj`.  Raises `InputError` where nothing can be adapted, or not what is asked for.
    """
    check_name("depthwise", depthwise, ("train", "freeze"))
    pattern = lora_targets or getattr(model, "lora_targets", "")
    layers = _layers(model)
    names = _matching(model, layers, pattern) if pattern else _usual(model, layers)
    convolutions = [n for n in names if isinstance(layers[n], nn.Conv2d)]
    if convolutions and method not in CONVOLUTIONAL:
        raise InputError(
            f"method {method!r} adapts linear layers only, and {convolutions[0]} is a convolution; choose "
            f"{' or '.join(CONVOLUTIONAL)}."
        )
    direct: list[str] = []
    if convolutions and method not in GROUPED:
        grouped = [n for n in convolutions if layers[n].groups > 1]
        if pattern and grouped and depthwise == "freeze":
            raise InputError(
                f"lora_targets matches {grouped[0]}, a convolution of {layers[grouped[0]].groups} groups, "
                f"which {method!r} cannot adapt; choose {' or '.join(GROUPED)}, or depthwise='train', which "
                "trains its own weights, or leave it out."
            )
        names = [n for n in names if n not in grouped]
        if depthwise == "train":
            direct = [n for n, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups > 1]
    if not names:
        raise InputError(
            f"all layers that {method!r} could adapt in {type(model).__name__} are convolutions with groups; "
            f"choose {' or '.join(GROUPED)}, which adapt them too."
        )
    for name in names:
        _check_convolution(name, layers[name], method)
    beside = (head_name(model), *direct)
    _check_endings(model, beside)
    return Targets(tuple(names), beside)


def narrow_layers(
    model: nn.Module, targets: Targets, rank: int, clip: bool, start: Callable[[int], int] = int
) -> dict[str, int]:
    """Layers that `start(rank)` ranks are too many for, with the most that each can have.

    A layer's update is a matrix (out, in), that of a convolution (out, in · height · width): a rank above
    its smaller side adds parameters and no freedom.  `start`: the ranks that the method begins with.
    Raises `InputError` if there are any and not `clip`.
    """
    most = {name: _most(model.get_submodule(name)) for name in targets.adapted}
    narrow = {name: limit for name, limit in most.items() if start(rank) > limit}
    if narrow and not clip:
        name = min(narrow, key=narrow.get)
        fitting = [r for r in range(1, narrow[name] + 1) if start(r) <= narrow[name]]
        lower = f"choose at most {fitting[-1]}, or " if fitting else ""
        begins = f" (begins with {start(rank)})" if start(rank) != rank else ""
        raise InputError(
            f"lora_rank {rank}{begins} is above the {narrow[name]} that {name} "
            f"({_size(model.get_submodule(name))}) allows; {lower}clip_rank=True, by which narrow layers "
            "take the most that they allow."
        )
    return narrow


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of the kinds that adapters are for, without those of the head."""
    head = head_name(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name != head and not name.startswith(f"{head}.")
    }


def _usual(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    try:
        inside = tuple(f"{name}." for name in find_blocks(model))
    except InputError:  # nothing repeats
        inside = ()
    linear = [n for n, m in layers.items() if isinstance(m, nn.Linear) and f"{n}.".startswith(inside)]
    convolutions = [n for n, m in layers.items() if isinstance(m, nn.Conv2d)]
    names = linear or convolutions[1:]
    if not names:
        raise InputError(
            f"{type(model).__name__} has neither linear layers in blocks nor convolutions behind its first "
            "one, so there is nothing that adapters are for; name layers by lora_targets, or choose method "
            "'full'."
        )
    return names


def _matching(model: nn.Module, layers: dict[str, nn.Module], pattern: str) -> list[str]:
    said = f"lora_targets {pattern!r}"
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{said} is no regular expression: {error}.") from error
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    matched = [name for name in kinds if expression.fullmatch(name)]
    names = [name for name in matched if name in layers]
    ending = [n for n in layers if n not in matched and re.fullmatch(rf"(.*\.)?(?:{pattern})", n)]
    if pattern in names and ending:
        raise InputError(
            f"{said} is the whole name of one layer and the end of {len(ending)} others ({_some(ending)}); "
            rf"write '^{pattern}$' for the one alone, '(.*\.)?{pattern}' for all."
        )
    if names:
        return names
    if matched:
        found = sorted({kinds[name] for name in matched})
        raise InputError(
            f"{said} matches no layer that adapters are for, linear or a convolution and not the head, only "
            f"{', '.join(found)} ({_some(matched)})."
        )
    remedy = rf"for these write '(.*\.)?(?:{pattern})'" if ending else f"names look like {_some([*layers])}"
    raise InputError(
        f"{said} matches no module's whole name in {type(model).__name__}; {len(ending)} layers end like it: "
        f"{remedy}."
    )


def _check_endings(model: nn.Module, beside: tuple[str, ...]) -> None:
    """peft finds adapted layers by pattern, but what trains beside them by the ends of names."""
    taken = [name for name, _ in model.named_modules() if name.endswith(beside)]
    if set(taken) != set(beside):
        raise InputError(
            f"peft takes {len(taken)} modules ({_some(taken)}) for the {len(beside)} that train beside the "
            f"adapters ({_some(list(beside))}), because it goes by the ends of names; rename what ends like "
            "another."
        )


def _check_convolution(name: str, layer: nn.Module, method: str) -> None:
    fault = _fault(layer, method)
    if fault:
        able = [other for other in CONVOLUTIONAL if not _fault(layer, other)]
        choose = " or ".join(able) if able else "a method without adapters"
        raise InputError(
            f"{name} {fault}, which {method!r} does not adapt; choose {choose}, or leave the layer out by "
            "lora_targets."
        )


def _fault(layer: nn.Module, method: str) -> str:
    """Why peft 0.21's adapter of `method` would compute something else than the convolution does."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    from timm.layers import Conv2dSame  # here: `Experiment` needs this module, and does without timm

    if layer.groups > 1 and method not in GROUPED:
        return f"has {layer.groups} groups"
    if type(layer) is Conv2dSame and method in ("lora", "ia3"):  # LoRA makes its own of the same class
        return ""
    if type(layer).forward is not nn.Conv2d.forward:
        return f"is a {type(layer).__name__} with arithmetic of its own"
    if layer.dilation != (1, 1) and method in ("lora", "dora"):
        return f"has dilation {layer.dilation[0]}"
    if layer.padding_mode != "zeros" and method != "ia3":
        return f"pads by {layer.padding_mode!r}"
    return ""


def _most(layer: nn.Module) -> int:
    if isinstance(layer, nn.Linear):
        return min(layer.in_features, layer.out_features)
    return min(layer.in_channels * math.prod(layer.kernel_size), layer.out_channels)


def _size(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} -> {layer.out_features}"
    kernel = "x".join(map(str, layer.kernel_size))
    return f"{layer.in_channels} -> {layer.out_channels}, {kernel}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
