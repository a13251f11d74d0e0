"""The layers of a backbone that get adapters, and checks that they can have them.

In a vision transformer: the linear layers in its blocks.  Where the blocks hold none, as in a CNN: all
convolutions but the first, with those of squeeze-excite and downsampling.  A convolution with groups has few
weights: a low-rank adapter would be larger than the layer (peft's LoRA of a depthwise layer has more
parameters than the layer and cannot be merged), so its own weights train next to the adapters, or stay
frozen; only IA3 and LoKr adapt it.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from toolkit.budget import find_blocks
from toolkit.errors import InputError, some
from toolkit.methods.registry import METHODS
from toolkit.methods.trainable import head_names

MATCH_SECONDS = 10
_MATCH = """import re, sys
pattern, *names = sys.stdin.read().split("\\0")
sys.stdout.write("\\0".join(filter(re.compile(pattern).fullmatch, names)))"""


@dataclass(frozen=True)
class Targets:
    """Whole names of layers, in the model's order."""

    adapted: tuple[str, ...]  # that get an adapter
    own: tuple[str, ...]  # whose own weights train: the head, and maybe convolutions with groups


def targets_of(model: nn.Module, method: str, pattern: str = "", depthwise: str = "freeze") -> Targets:
    """The layers that `method` adapts: those whose whole names match the regular expression `pattern`, or the
    `lora_targets` of the model's class, or the usual ones (see above); never the head, which trains.

    `depthwise`: "train" or "freeze" all convolutions with groups, where a convolution is adapted.  Whole
    names, not suffixes: the suffix `proj` of a ViT's attention also matches `patch_embed.proj`.  Raises
    `InputError` where nothing can be adapted, or not what is asked for.
    """
    adapts = METHODS[method].convolutions
    grouping = " or ".join(_able("grouped"))
    pattern = pattern or getattr(model, "lora_targets", "")
    layers = _layers(model)
    names = _matching(model, layers, pattern) if pattern else _usual(model, layers)
    convolutions = [n for n in names if isinstance(layers[n], nn.Conv2d)]
    if convolutions and not adapts:
        raise InputError(
            f"method {method!r} adapts linear layers only, and {convolutions[0]} is a convolution; choose "
            f"{' or '.join(_able('plain'))}."
        )
    direct: list[str] = []
    if convolutions and "grouped" not in adapts:
        grouped = [n for n in convolutions if layers[n].groups > 1]
        if pattern and grouped and depthwise == "freeze":
            raise InputError(
                f"targets match {grouped[0]}, a convolution of {layers[grouped[0]].groups} groups, which "
                f"{method!r} cannot adapt; choose {grouping}, or depthwise='train', which trains its own "
                "weights, or leave it out."
            )
        names = [n for n in names if n not in grouped]
        if depthwise == "train":
            direct = [n for n, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups > 1]
    if not names:
        raise InputError(
            f"all layers that {method!r} could adapt in {type(model).__name__} are convolutions with groups; "
            f"choose {grouping}, which adapt them too."
        )
    for name in names:
        _check_convolution(name, layers[name], method)
    heads = [part for head in head_names(model) for part in _apart(model, head)]
    return Targets(tuple(names), (*heads, *direct))


def narrow_layers(
    model: nn.Module, targets: Targets, rank: int, clip: bool, start: Callable[[int], int] = int
) -> dict[str, int]:
    """Layers too narrow for `start(rank)` ranks, with the highest rank of each.

    A layer's update is a matrix (out, in), that of a convolution (out, in · height · width): a rank above
    its smaller side adds parameters and no freedom.  `start`: the rank that the method starts with.
    Raises `InputError` if there are such layers and not `clip`.
    """
    most = {name: _most(model.get_submodule(name)) for name in targets.adapted}
    narrow = {name: limit for name, limit in most.items() if start(rank) > limit}
    if narrow and not clip:
        name = min(narrow, key=narrow.get)
        fitting = [r for r in range(1, narrow[name] + 1) if start(r) <= narrow[name]]
        lower = f"choose at most {fitting[-1]}, or " if fitting else ""
        starts = f" (starts with {start(rank)})" if start(rank) != rank else ""
        raise InputError(
            f"rank {rank}{starts} is above the {narrow[name]} that {name} "
            f"({_size(model.get_submodule(name))}) allows; {lower}clip_rank=True, which gives "
            "narrow layers the highest rank that they allow."
        )
    return narrow


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions outside the head."""
    inside = tuple(f"{name}." for name in head_names(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not f"{name}.".startswith(inside)
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
            "one, so nothing can have adapters; name layers by targets, or choose method 'full'."
        )
    return names


def full_matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that match a regular expression from anywhere, which may take for ever.

    Raises `InputError` for what is not one, and for one that takes longer than `MATCH_SECONDS`.
    """
    try:
        re.compile(pattern)
        found = subprocess.run(
            [sys.executable, "-IS", "-Xutf8", "-c", _MATCH], input="\0".join([pattern, *names]),
            capture_output=True, encoding="utf-8", timeout=MATCH_SECONDS, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputError(
            f"targets {pattern[:100]!r} takes more than {MATCH_SECONDS} s: its repetitions can match one "
            "text in too many ways; simplify them."
        ) from None
    except (re.error, RecursionError, OverflowError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"targets {pattern[:100]!r} is not a regular expression: {error}.") from error
    return [name for name in found.stdout.split("\0") if name]


def _matching(model: nn.Module, layers: dict[str, nn.Module], pattern: str) -> list[str]:
    said = f"targets {pattern!r}"
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    matched = full_matches(pattern, kinds)
    names = [name for name in matched if name in layers]
    ending = [n for n in full_matches(rf"(.*\.)?(?:{pattern})", layers) if n not in matched]
    if pattern in names and ending:
        raise InputError(
            f"{said} is the whole name of one layer and the end of {len(ending)} others ({some(ending)}); "
            rf"write '^{pattern}$' for the one alone, '(.*\.)?{pattern}' for all."
        )
    if names:
        return names
    if matched:
        found = sorted({kinds[name] for name in matched})
        raise InputError(
            f"{said} matches neither a linear layer nor a convolution outside the head, only "
            f"{', '.join(found)} ({some(matched)})."
        )
    remedy = rf"for these write '(.*\.)?(?:{pattern})'" if ending else f"names look like {some([*layers])}"
    raise InputError(
        f"{said} matches no module's whole name in {type(model).__name__}; {len(ending)} layers end like it: "
        f"{remedy}."
    )


def _apart(model: nn.Module, name: str) -> list[str]:
    """`name`, or its children if a module inside has a name that ends like it: peft, which compares the ends
    of names, would wrap both."""
    inside = model.get_submodule(name)
    if not any(f"{name}.{inner}".endswith(name) for inner, _ in inside.named_modules() if inner):
        return [name]
    children = [n for n, child in inside.named_children() if next(child.parameters(), None) is not None]
    return [part for child in children for part in _apart(model, f"{name}.{child}")]


def _check_convolution(name: str, layer: nn.Module, method: str) -> None:
    fault = _fault(layer, METHODS[method].convolutions)
    if fault:
        able = [other for other in _able("plain") if not _fault(layer, METHODS[other].convolutions)]
        choose = " or ".join(able) if able else "a method without adapters"
        raise InputError(
            f"{name} {fault}, which {method!r} does not adapt; choose {choose}, or leave the layer out by "
            "targets."
        )


def _able(kind: str) -> list[str]:
    """Methods that adapt convolutions of this kind."""
    return [name for name, method in METHODS.items() if kind in method.convolutions]


def _fault(layer: nn.Module, adapts: tuple[str, ...]) -> str:
    """Why a layer is not a convolution of a kind in `adapts`; "" if it is one, or not a convolution."""
    if not isinstance(layer, nn.Conv2d):
        return ""
    from timm.layers import Conv2dSame  # timm takes seconds to import

    if layer.groups > 1 and "grouped" not in adapts:
        return f"has {layer.groups} groups"
    if type(layer) is Conv2dSame and "same" in adapts:
        return ""
    if type(layer).forward is not nn.Conv2d.forward:
        return f"is a {type(layer).__name__} with arithmetic of its own"
    if layer.dilation != (1, 1) and "dilated" not in adapts:
        return f"has dilation {layer.dilation[0]}"
    if layer.padding_mode != "zeros" and "padded" not in adapts:
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
