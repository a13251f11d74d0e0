"""The chain of blocks that peers checkpoint, steps of it under a plan, and its profile.

A cell (`cell_of`) runs the steps of one model on one batch and remembers them for the next peer.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch._functorch.config
from functorch.compile import aot_function, min_cut_rematerialization_partition
from peers_step import CPU, Mark, Trace, Training, fake_training
from timm.models.vision_transformer import Block
from torch import nn
from torch._dynamo.backends.debugging import boxed_nop
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint, noop_context_fn

from toolkit.budget import find_blocks
from toolkit.budget.step import autocast

# A plan: stages by index; a tuple is a group that runs under one checkpoint, groups may be nested.
Plan = tuple["int | Plan", ...]
KEPT, DROPPED = 0, 1  # rows of a profile's arrays


# Chains of stages and plans for them


@dataclass(frozen=True)
class _Chain:
    """Stages in the order in which they run; each belongs to one block."""

    blocks: list[nn.Module]
    stages: list[Callable]
    owners: list[int]  # of each stage: index of its block
    linked: list[bool]  # of each stage: its output, and nothing else, enters the next stage
    context_fn: Callable = noop_context_fn  # of torch's checkpoint

    @property
    def kept(self) -> Plan:
        """The plan that checkpoints nothing."""
        return tuple(range(len(self.stages)))

    @property
    def dropped(self) -> Plan:
        """The plan that checkpoints each stage by itself."""
        return tuple((stage,) for stage in range(len(self.stages)))

    @contextlib.contextmanager
    def running(self, plan: Plan, trace: Trace | None = None) -> Iterator[None]:
        """The blocks run as `plan` says: a group runs whole in the block of its first stage."""
        items: list[list[tuple[int, int | Plan]]] = [[] for _ in self.blocks]
        for position, item in enumerate(plan):
            items[self.owners[_first(item)]].append((position, item))
        for block, own_items in zip(self.blocks, items):
            block.forward = partial(self._run_block, own_items, trace)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _run_block(self, items: list[tuple[int, int | Plan]], trace: Trace | None, *args, **kwargs):
        for position, item in items:
            if trace:
                trace.mark(f"enter {position}")
            output = self._run_item(item, *args, **kwargs)
            if trace:
                trace.mark(f"leave {position}")
                _mark_backward(trace, position, output)
            args, kwargs = (output,), {}
            del output
        return args[0]

    def _run_item(self, item: int | Plan, *args, **kwargs):
        if isinstance(item, int):
            return self.stages[item](*args, **kwargs)
        return checkpoint(
            self._run_group, item, *args, use_reentrant=False, context_fn=self.context_fn, **kwargs
        )

    def _run_group(self, items: Plan, *args, **kwargs):
        for item in items:
            args, kwargs = (self._run_item(item, *args, **kwargs),), {}
        return args[0]


def _first(item: int | Plan) -> int:
    return item if isinstance(item, int) else _first(item[0])


def _mark_backward(trace: Trace, position: int, output) -> None:
    """Mark the moment when the backward pass reaches `output`, a nest of tensors."""
    name = f"back {position}"

    def reached(gradient: torch.Tensor) -> None:
        if all(mark.name != name for mark in trace.marks):
            trace.mark(name)

    for tensor in tree_iter(output):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(reached)


def _block_chain(training: Training) -> _Chain:
    """The blocks that `find_blocks` names, in the order of a forward pass."""
    calls = []
    blocks = list(find_blocks(training.model).values())
    hooks = [
        block.register_forward_hook(
            lambda block, args, kwargs, output: calls.append((block, args, kwargs, output)), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad(), autocast(CPU, training.precision):
        training.model(training.images)
    for hook in hooks:
        hook.remove()
    order = [block for block, *_ in calls]
    if len(set(order)) < len(order):
        raise NotImplementedError("a block that runs twice in a step is not a stage of a chain.")
    linked = [
        len(args) == 1 and args[0] is output and not kwargs
        for (*_, output), (_, args, kwargs, _) in itertools.pairwise(calls)
    ]
    return _Chain(order, [b.forward for b in order], list(range(len(order))), [*linked, False])


def _half_block_chain(chain: _Chain) -> _Chain:
    """timm's transformer blocks cut into their attention and MLP halves, other blocks left whole."""
    stages, owners, linked = [], [], []
    for index, block in enumerate(chain.blocks):
        halves = [partial(_attention_half, block), partial(_mlp_half, block)]
        own = halves if type(block) is Block else [chain.stages[index]]
        stages += own
        owners += [index] * len(own)
        linked += [True] * (len(own) - 1) + [chain.linked[index]]
    return _Chain(chain.blocks, stages, owners, linked)


def _attention_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def _mlp_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


@dataclass(frozen=True)
class Profile:
    """Bytes and FLOPs of each stage, from a step that keeps all activations and one that drops all.

    Arrays (2, stages): with every stage kept, with every stage checkpointed.
    """

    enter: np.ndarray  # live bytes on entering; (2, stages + 1), the last at the loss
    forward_peak: np.ndarray  # from entering until the next stage is entered
    back: np.ndarray  # live bytes when the backward pass arrives; 0 where it never does
    backward_peak: np.ndarray  # from then until it arrives at the stage before; 0 where it never does
    stem_peak: int  # before the first stage
    head_peak: np.ndarray  # (2,), from the loss until the backward pass arrives at the last stage
    forward_flops: np.ndarray  # (stages,)
    recompute_flops: np.ndarray  # (stages,); fewer: torch stops at the last tensor that was saved
    kept_peak: int  # of the whole step with every stage kept


def _profile(kept: Trace, dropped: Trace, stages: range) -> Profile:
    runs = [_Stretches(kept.marks), _Stretches(dropped.marks)]
    return Profile(
        enter=np.array([[*(run.live(f"enter {i}") for i in stages), run.live("loss")] for run in runs]),
        forward_peak=np.array(
            [[max(run.peak(f"enter {i}"), run.peak(f"leave {i}")) for i in stages] for run in runs]
        ),
        back=np.array([[run.live(f"back {i}") for i in stages] for run in runs]),
        backward_peak=np.array([[run.peak(f"back {i}") for i in stages] for run in runs]),
        stem_peak=runs[KEPT].marks[0].peak_bytes,
        head_peak=np.array([run.peak("backward") for run in runs]),
        forward_flops=np.array([runs[KEPT].flops(f"enter {i}")[0] for i in stages]),
        recompute_flops=np.array([runs[DROPPED].flops(f"back {i}")[1] for i in stages]),
        kept_peak=kept.cost.peak_bytes,
    )


class _Stretches:
    """A step's stretches between marks, by the mark that begins them."""

    def __init__(self, marks: list[Mark]):
        self.marks = marks
        self.ends = {begin.name: (begin, end) for begin, end in itertools.pairwise(marks)}

    def live(self, name: str) -> int:
        """Bytes at this mark; 0 if the step never reached it."""
        return self.ends[name][0].live_bytes if name in self.ends else 0

    def peak(self, name: str) -> int:
        """Highest bytes of a stretch; 0 if the step never came there."""
        return self.ends[name][1].peak_bytes if name in self.ends else 0

    def flops(self, name: str) -> tuple[int, int]:
        """Forward and recomputed FLOPs of a stretch; 0 if the step never came there."""
        if name not in self.ends:
            return 0, 0
        begin, end = self.ends[name]
        return end.forward_flops - begin.forward_flops, end.recompute_flops - begin.recompute_flops


# What was measured for a model, batch and precision


class _Cell:
    """Fake steps of one model on one batch in a steady state (the optimizer has its moments)."""

    def __init__(self, known: dict, training: Training):
        self._known, self._training = known, training  # `known` outlives the fake tensors

    def _once(self, key: object, compute: Callable):
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def chain(self, *, halves: bool) -> _Chain:
        """Blocks as stages, or transformer blocks in halves."""
        if halves:
            return self._once("halves", lambda: _half_block_chain(self.chain(halves=False)))
        return self._once("blocks", lambda: _block_chain(self._training))

    def run(self, chain: _Chain, plan: Plan) -> Trace:
        """A step under `plan`."""
        key = len(chain.stages), chain.context_fn, plan
        return self._once(key, lambda: self._training.step(partial(chain.running, plan)))

    def profile(self, chain: _Chain) -> Profile:
        """From two steps."""
        runs = self.run(chain, chain.kept), self.run(chain, chain.dropped)
        return _profile(*runs, range(len(chain.stages)))

    def step(self, key: object, **how) -> Trace:
        """A step as `Training.step` takes it, remembered as `key`."""
        return self._once(key, lambda: self._training.step(**how))

    def compiled_step(self, ratio: float) -> Trace:
        """A step through AOTAutograd with min-cut partitioning under `activation_memory_budget`."""
        return self._once(("compiled", ratio), partial(self._compiled_step, ratio))

    def _compiled_step(self, ratio: float) -> Trace:
        model = self._training.model
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        network = aot_function(
            lambda tensors, x: torch.func.functional_call(model, tensors, (x,)),
            fw_compiler=boxed_nop,
            bw_compiler=boxed_nop,
            partition_fn=min_cut_rematerialization_partition,
        )
        with torch._functorch.config.patch(activation_memory_budget=ratio):
            self._training.step(forward=partial(network, tensors))  # traces
            return self._training.step(forward=partial(network, tensors))


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def cell_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Iterator[_Cell]:
    """Steps that an earlier peer ran are not run again: the model must not change between peers."""
    known = _KNOWN.setdefault(model, {}).setdefault((precision, images.shape), {})
    with fake_training(model, images, labels, precision) as training:
        training.step()
        yield _Cell(known, training)
