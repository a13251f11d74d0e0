"""Blocks of a model, and strategies that decide which of them recompute their activations in backward.

A block is a repeated unit at whose boundaries activations may be dropped.

A strategy is one class: its fields are its options, and it decides on entering a block.  `register_strategy`
makes it known by its name to `Experiment`, forecasts, the training loop and plots.  "planned" is ours; it
does not decide block by block, see `plan` and `auto`.

Recomputation is torch's non-reentrant `checkpoint`: losses and gradients stay equal, with frozen parameters
and under autocast.  It starts from the buffers, attributes and random numbers of the first pass, and changes
none of them; torch alone would update running statistics twice.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.budget.found import contents_of, random_states
from toolkit.budget.memory import DeviceMemory
from toolkit.budget.wrapping import Wrapping, own_class
from toolkit.errors import InputError, Options, check_name, option


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks of `model` by name, in the order of `model.named_modules()`.

    A block is a composite element of an `nn.Sequential` or `nn.ModuleList`, the innermost such, of a
    type that occurs at least twice: the transformer blocks of a ViT, the MBConv and attention blocks of a
    TinyViT rather than whole stages, the residual blocks of a ResNet.  Adapter layers (peft's, which have a
    `get_base_layer`) are not blocks, so an adapted model has the blocks of the model inside.

    Raises `InputError` if nothing repeats.
    """
    candidates: dict[str, nn.Module] = {}
    for name, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        for child_name, child in container.named_children():
            composite = next(child.children(), None) is not None
            if composite and not _is_container(child) and not hasattr(child, "get_base_layer"):
                candidates[f"{name}.{child_name}" if name else child_name] = child
    innermost = {
        name: block
        for name, block in candidates.items()
        if not any(other.startswith(f"{name}.") for other in candidates)
    }
    repeats = Counter(own_class(block) for block in innermost.values())
    blocks = {name: block for name, block in innermost.items() if repeats[own_class(block)] > 1}
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


@dataclass(frozen=True)
class Strategy(Options):
    """Decides which blocks are checkpointed; the fields of a subclass are its options."""

    name: ClassVar[str] = ""
    label: ClassVar[str] = ""  # in figures and tables
    marker: ClassVar[str] = "o"  # of matplotlib
    plans: ClassVar[bool] = False  # keeps the budget by a plan, and decides nothing block by block
    reads_memory: ClassVar[bool] = False  # the decision needs the allocated bytes at every block

    def limit_bytes(self, budget_bytes: int) -> float | None:
        """Blocks that start with this many bytes allocated, or more, are checkpointed.

        None for a strategy that decides otherwise, by its own `checkpoints`.
        """
        return None

    def checkpoints(self, block: str, allocated_bytes: int, budget_bytes: int) -> bool:
        """Whether the block of this name, entered with so much memory allocated, is checkpointed."""
        return allocated_bytes >= self.limit_bytes(budget_bytes)


@dataclass(frozen=True)
class NoCheckpointing(Strategy):
    """Keep all activations."""

    name, label, marker = "none", "none", "o"

    def limit_bytes(self, budget_bytes: int) -> float:
        return math.inf


@dataclass(frozen=True)
class Static(Strategy):
    """Checkpoint every block, as `set_grad_checkpointing(True)` of the model libraries does."""

    name, label, marker = "static", "static", "s"

    def limit_bytes(self, budget_bytes: int) -> float:
        return 0


@dataclass(frozen=True)
class Threshold(Strategy):
    """The adaptive rule of arXiv 2607.02158, read off its code.

    A block is checkpointed if `tau * budget` bytes or more are allocated on entering it.  Reproduced with its
    weakness: it looks at memory before the block and never at what backward will need, so nothing guarantees
    the budget.
    """

    name, label, marker = "threshold", "threshold", "^"
    reads_memory = True

    tau: float = option(0.55, "fraction of the budget from which on blocks are checkpointed", between=(0, 1))

    def limit_bytes(self, budget_bytes: int) -> float:
        return self.tau * budget_bytes


@dataclass(frozen=True)
class Planned(Strategy):
    """The fastest plan whose peak stays below the budget at every moment of the step."""

    name, label, marker = "planned", "planned", "D"
    plans = True


STRATEGIES: dict[str, type[Strategy]] = {}


def register_strategy(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy known by its name; also as a decorator."""
    STRATEGIES[strategy.name] = strategy
    return strategy


for _strategy in (NoCheckpointing, Static, Threshold, Planned):
    register_strategy(_strategy)


class Checkpointing:
    """Wraps the blocks of `model` until `remove()`, or as a context manager.

    `strategy`: a name, or a `Strategy` with its options.  `checkpointed` holds the names of the blocks that
    the latest forward pass checkpointed.
    """

    def __init__(
        self, model: nn.Module, strategy: str | Strategy, *, memory: DeviceMemory, budget_bytes: int
    ):
        if isinstance(strategy, str):
            names = [name for name, known in STRATEGIES.items() if not known.plans]
            strategy = STRATEGIES[check_name("checkpointing strategy", strategy, names)]()
        self.strategy = strategy
        self.memory = memory
        self.budget_bytes = budget_bytes
        self.checkpointed: set[str] = set()
        # Some models have no blocks, and without checkpointing none are needed.
        never = strategy.limit_bytes(budget_bytes) == math.inf
        self.blocks = {} if never else find_blocks(model)
        _warn_if_few(model, self.blocks)
        self._wrappings = [
            Wrapping(block, functools.partial(self._run, name, block)) for name, block in self.blocks.items()
        ]

    def _run(self, name: str, block: nn.Module, forward, *args, **kwargs):
        self.checkpointed.discard(name)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if not self.strategy.checkpoints(name, self.memory.allocated_bytes, self.budget_bytes):
            return forward(*args, **kwargs)
        self.checkpointed.add(name)
        contexts = functools.partial(_first_pass_and_recomputation, block)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    def remove(self) -> None:
        """Let every block run its own forward."""
        for wrapping in self._wrappings:
            wrapping.remove()
        self.blocks = {}

    def __enter__(self) -> Checkpointing:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def _first_pass_and_recomputation(block: nn.Module):
    start = _Start(block)
    return start, _Recomputation(start)


_STATISTICS = 2**15  # elements that a buffer of statistics may have


class _Start:
    """The state that the first pass of a block starts from, as far as that pass changes it.

    Buffers (statistics, spectral norms, observers), attributes, and random numbers of Python and numpy;
    torch's own are `checkpoint`'s business.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __enter__(self) -> None:
        self.contents = contents_of(self.block)
        tensors = {id(v): v for part in self.contents for v in part.before if isinstance(v, torch.Tensor)}
        self.tensors = [
            (tensor, tensor._version, tensor.detach().clone())
            for tensor in tensors.values()
            if not isinstance(tensor, nn.Parameter) and not tensor.requires_grad and not tensor.is_inference()
        ]
        self.random = random_states()

    def __exit__(self, *exc) -> None:
        # The clones of what has not changed are freed here.  Small ones are kept: running statistics move
        # without a new version.
        self.moved = {
            id(tensor): then
            for tensor, version, then in self.tensors
            if tensor._version != version or (then.is_floating_point() and then.numel() < _STATISTICS)
        }
        self.tensors = [tensor for tensor, *_ in self.tensors if id(tensor) in self.moved]  # keeps ids unique
        self.contents = [part for part in self.contents if part.changed or self.moved.keys() & part.ids]
        self.random = [state for state in self.random if state.changed]


class _Recomputation:
    """Runs a block from the state that its first pass started from, and leaves that of the present."""

    def __init__(self, start: _Start):
        self.start = start

    def __enter__(self) -> None:
        start = self.start
        self.now = [(part, part.read()) for part in (*start.contents, *start.random)]
        copies = {key: then.clone() for key, then in start.moved.items()}
        for part in start.contents:
            part.write([copies.get(id(value), value) for value in part.before])
        for state in start.random:
            state.write(state.before)

    def __exit__(self, *exc) -> None:
        for part, contents in self.now:
            part.write(contents)


def _warn_if_few(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Warn where the blocks are a small part of the model, so that little can be saved."""
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for block in blocks.values() for p in block.parameters())
    if blocks and inside < total / 2:
        warnings.warn(
            f"the {len(blocks)} blocks found in {type(model).__name__} hold {100 * inside / total:.0f} % "
            "of its parameters; checkpointing them will save little memory.",
            stacklevel=3,
        )
