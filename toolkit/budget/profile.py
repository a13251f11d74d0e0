"""Profiles one training step on fake tensors: its allocations over time, and the costs of each operator.

The step runs under a tape that keeps nothing, with placeholders where backward asks for a saved tensor, so
its memory over time (`Profile.base`) excludes all activations that backward needs.  `levels.simulate` adds
the activations that a plan keeps or recomputes: one profile serves all plans.  No memory is taken on the
device, nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_iter, tree_map_only

from toolkit.budget.flops import operator_flops
from toolkit.budget.memory import StorageRef, TensorMemory, tensors_of, workspace_bytes
from toolkit.budget.step import (
    autocast,
    call,
    deposit_gradients,
    loss_of,
    on_fake_tensors,
    optimizer_like,
    segmented,
    split_batch,
)
from toolkit.budget.tape import (
    DROP,
    External,
    Handle,
    Op,
    Tape,
    View,
    couples_samples,
    draws_random_numbers,
    operator_name,
)


@dataclass(slots=True)
class BufferCost:
    """A buffer of the forward pass; see `tape.Buffer`."""

    segment: int
    op: int  # index in `Profile.ops` of the operator that made it
    nbytes: int
    overwritten: bool = False


@dataclass(slots=True)
class OpCost:
    """An operator of the forward pass; buffers are indices into `Profile.buffers`."""

    segment: int
    name: str
    inputs: tuple[int, ...]
    writes: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: int
    bytes_moved: int  # read and written
    workspace_bytes: int  # memory that it takes while it runs
    repeatable: bool
    coupled: bool  # computes across samples or draws random numbers, so slicing changes its results


@dataclass(slots=True)
class SavedCost:
    """A tensor that autograd asked to save."""

    segment: int  # the segment that saved it
    buffer: int


@dataclass
class Profile:
    """One training step.  Times are indices into `base`: the number of allocations and releases before them.

    `events`, in order: (time, kind, index) with the kinds "op" (an operator has run), "died" (the forward
    pass released a buffer), "pack", "unpack", "release" (of a saved tensor), "end" (of the forward pass),
    "backward" (a segment's backward pass begins).
    """

    deltas: list[int]  # bytes, one per allocation or release
    events: list[tuple[int, str, int]]
    start_bytes: int  # parameters, buffers, optimizer state and batch, as the step begins
    ops: list[OpCost]
    buffers: list[BufferCost]
    saved: list[SavedCost]
    segments: list[str]  # named after the block that ends each; the last ends with no block: ""
    entered: list[int]  # when each segment began
    forward_end: int
    optimizer_start: int
    fixed: dict[str, int]  # bytes by kind
    inputs: dict[str, torch.Size]  # input shapes of blocks that map one tensor (batch, ...) to another

    @property
    def batch_statistics(self) -> bool:
        """Whether a batch norm normalises by the statistics of the batch."""
        return any(op.coupled and "batch_norm" in op.name for op in self.ops)

    @cached_property
    def backward_starts(self) -> dict[int, int]:
        """Segment -> position in `events` where its backward pass begins, in the order of that pass."""
        starts: dict[int, int] = {}
        for position, (_, kind, index) in enumerate(self.events):
            if kind == "backward":
                starts.setdefault(index, position)
        return starts

    @cached_property
    def base(self) -> np.ndarray:
        """Allocated bytes over the step, without saved activations."""
        return self.start_bytes + np.concatenate([[0], np.cumsum(self.deltas)])


class _Timeline(TensorMemory):
    """Logs every allocation and release, except of `ghosts`.

    After `again()` it logs another micro-batch of the same step, and assumes between two events at least the
    memory that the earlier micro-batch took there.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.deltas: list[int] = []
        self.events: list[tuple[int, str, int]] = []
        self.contents: dict[int, int] = {}  # storage -> index of its buffer in `Profile.buffers`
        self.ghosts = False
        self.ended = False
        self.at_next_allocation: Callable[[], None] | None = None
        self.highest: list[int] = [0]  # highest bytes between two events, and after the last
        self.before: list[int] = []  # the same for the earlier micro-batch

    @property
    def time(self) -> int:
        return len(self.deltas)

    def note(self, kind: str, index: int) -> None:
        """Add an event that happens now."""
        if self.ended:
            return
        if kind != "died":  # autograd frees buffers in any order
            self.take_as_before()
            self.highest.append(self.allocated_bytes)
        self.events.append((self.time, kind, index))

    def begin(self) -> None:
        """Discard the log."""
        self.before = []
        self.contents.clear()
        self.deltas.clear()
        self.events.clear()
        self.highest = [self.allocated_bytes]

    def again(self) -> None:
        """Begin another micro-batch."""
        highest = self.highest
        self.begin()
        self.before = highest

    def take_as_before(self) -> None:
        """Count for a moment the memory that the earlier micro-batch took since the same event."""
        place = len(self.highest) - 1
        if place < len(self.before) and self.before[place] > self.highest[-1]:
            self._take_for_a_moment(self.before[place] - self.allocated_bytes)

    def size_of(self, key: int) -> int:
        """Bytes of a live storage; 0 if it is not counted."""
        return self._live[key].nbytes if key in self._live else 0

    def _count(self, tensor: torch.Tensor) -> None:
        if self.ghosts:  # registered with no bytes, so that its views are not counted either
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = StorageRef(storage, self._freed, storage._cdata, 0)
            return
        before = self.allocated_bytes
        super()._count(tensor)
        self.highest[-1] = max(self.highest[-1], self.allocated_bytes)
        if self.allocated_bytes != before:
            if self.at_next_allocation:
                self.at_next_allocation()
                self.at_next_allocation = None
            self.deltas.append(self.allocated_bytes - before)

    def _take_for_a_moment(self, nbytes: int) -> None:
        if not self.ended:
            self.highest[-1] = max(self.highest[-1], self.allocated_bytes + nbytes)
            self.deltas += [nbytes, -nbytes]

    def _freed(self, reference) -> None:
        if self.ended:
            return
        before = self.allocated_bytes
        super()._freed(reference)
        if self.allocated_bytes != before:
            self.deltas.append(self.allocated_bytes - before)
            if reference.key in self.contents:
                self.note("died", self.contents.pop(reference.key))


class _Ghost(Handle):
    """Placeholder for a saved tensor, which logs when autograd releases it."""

    def __init__(self, view: View, index: int, timeline: _Timeline, like: torch.Tensor):
        super().__init__(view)
        self.index, self.timeline = index, timeline
        self.made = (like.dtype, like.device)

    def stand_in(self) -> torch.Tensor:
        """A tensor of the saved one's shape that is not counted."""
        dtype, device = self.made
        self.timeline.ghosts = True
        try:
            return torch.empty_strided(self.view.size, self.view.stride, dtype=dtype, device=device)
        finally:
            self.timeline.ghosts = False

    def __del__(self):
        self.timeline.note("release", self.index)


class _ProfilingTape(Tape):
    """A tape that keeps nothing and logs everything."""

    def __init__(self, timeline: _Timeline):
        super().__init__(self._decide_and_note)
        self.timeline = timeline
        self.ops: list[OpCost] = []
        self.buffers: list[BufferCost] = []
        self.saved: list[SavedCost] = []
        self.segments: list[str] = [""]
        self.entered: list[int] = [timeline.time]
        self.inputs: dict[str, torch.Size] = {}
        self._numbers: dict[int, int] = {}  # id(tape.Buffer) -> index of `buffers`
        self._read: list[tuple[OpCost, External]] = []
        self._held: list = []  # keeps these ids unique
        self._call: tuple | None = None
        self._out = None

    def forward_ended(self) -> None:
        """Mark operators as not repeatable whose outside inputs the forward pass has changed since."""
        for cost, external in self._read:
            if external.tensor._version != external.version:
                cost.repeatable = False
        self.timeline.note("end", 0)

    def forget(self) -> None:
        """Free the graph: its hooks reference this tape, in a cycle that is never collected."""
        self._held.clear()
        self._read.clear()
        self._call = self._out = None

    def block_ended(self, name: str, args: tuple, kwargs: dict, output) -> None:
        """End the segment of block `name`; releases by its caller still belong to it."""
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(args) == len(tensors) == 1 and args[0] is tensors[0] and isinstance(output, torch.Tensor):
            (x,) = args
            if x.dim() > 1 and len(x) == len(output):
                self.inputs[name] = x.shape
        number = len(self.segments) - 1
        self.segments[-1] = name
        for leaf in tree_iter(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda grad: self.timeline.note("backward", number))
        self.segments.append("")
        if self.timeline.at_next_allocation:  # the block has allocated nothing: it begins where it ends
            self.timeline.at_next_allocation()
        self.timeline.at_next_allocation = lambda: self.entered.append(self.timeline.time)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._call = (func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _note_outputs(self, op: Op, written: list[torch.Tensor], out) -> None:
        self._out = out
        super()._note_outputs(op, written, out)

    def _decide_and_note(self, op: Op, contents: dict[int, torch.Tensor]) -> list[str]:
        func, args, kwargs = self._call
        segment, number = len(self.segments) - 1, len(self.ops)
        outputs = []
        for reference, key in zip(op.outputs, contents):
            buffer = reference()
            self._held.append(buffer)
            self._numbers[id(buffer)] = len(self.buffers)
            outputs.append(len(self.buffers))
            self.timeline.contents[key] = len(self.buffers)
            self.buffers.append(BufferCost(segment, number, self.timeline.size_of(key)))
        writes = tuple(self._numbers[id(buffer)] for buffer in op.writes)
        for old, buffer in zip(writes, op.writes):
            if buffer.blank and not op.repeatable:
                self.ops[self.buffers[old].op].repeatable = False
            else:
                self.buffers[old].overwritten = True
        tensors = [t for t in tree_iter((args, kwargs, self._out)) if isinstance(t, torch.Tensor)]
        cost = OpCost(
            segment,
            operator_name(op.func),
            tuple(self._numbers[id(buffer)] for buffer in op.inputs),
            writes,
            tuple(outputs),
            operator_flops(func, args, kwargs, self._out),
            sum(t.numel() * t.element_size() for t in tensors),
            workspace_bytes(func, args, kwargs),
            op.repeatable,
            couples_samples(func, args) or draws_random_numbers(func, args, kwargs),
        )
        self.ops.append(cost)
        for value in tree_iter((op.args, op.kwargs)):
            if isinstance(value, External):
                self._read.append((cost, value))
        self.timeline.note("op", number)
        return [DROP] * len(outputs)

    def pack(self, tensor: torch.Tensor) -> External | Handle:
        held = super().pack(tensor)
        if isinstance(held, Handle):
            self.timeline.note("pack", len(self.saved))
            held = _Ghost(held.view, len(self.saved), self.timeline, tensor)
            self.saved.append(SavedCost(len(self.segments) - 1, self._numbers[id(held.view.buffer)]))
        return held

    def unpack(self, held: External | Handle) -> torch.Tensor:
        if not isinstance(held, _Ghost):
            return super().unpack(held)
        self.timeline.note("unpack", held.index)
        return held.stand_in()


def profile(
    model: nn.Module,
    batch,
    blocks: dict[str, nn.Module],
    *,
    loss: Callable | None = None,
    optimizer="adamw",
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    slices: dict[str, int] | None = None,
    held_bytes: int = 0,
) -> Profile:
    """Profile one training step of `model` in its present mode.

    `batch`: inputs or (inputs, targets), of the shapes and on the device that training will use.
    `micro_batch_size`: profile only the first samples, with the gradients of earlier micro-batches if the
    batch has more.  The optimizer always has its state.  `slices`: block -> number of slices that its batch
    runs in. `held_bytes`: other tensors that exist all the time.  Raises `InputError` if the model cannot run
    on fake tensors.
    """
    make_optimizer = optimizer_like(optimizer, model)
    with on_fake_tensors(model, batch) as fake_batch:
        inputs, targets, accumulates = _first_samples(fake_batch, micro_batch_size)
        device = next(model.parameters()).device
        timeline = _Timeline(device)
        timeline.track(tensors_of(model))
        weights_bytes = timeline.allocated_bytes
        timeline.track(t for t in tree_iter(fake_batch) if isinstance(t, torch.Tensor))
        batch_bytes = timeline.allocated_bytes - weights_bytes
        trained = [p for p in model.parameters() if p.requires_grad]
        with timeline:
            stepper = make_optimizer(model)
            deposit_gradients(trained)
            in_hooks = any(parameter.grad is None for parameter in trained)  # an optimizer took them
            stepper.step()
            with_gradients = timeline.allocated_bytes
            stepper.zero_grad(set_to_none=True)
            grad_bytes = with_gradients - timeline.allocated_bytes
            state_bytes = timeline.allocated_bytes - weights_bytes - batch_bytes

            def run_passes() -> tuple[_ProfilingTape, int]:
                """Run a forward and a backward pass; returns the tape and the time between the passes."""
                tape = _ProfilingTape(timeline)
                with autocast(device, precision):
                    with tape, segmented(blocks, tape.block_ended, slices):
                        outputs = call(model, inputs)
                    tape.forward_ended()
                    forward_end = timeline.time
                    if timeline.at_next_allocation:  # nothing runs after the last block
                        timeline.at_next_allocation()
                        timeline.at_next_allocation = None
                    value = loss_of(outputs, targets, loss)
                timeline.note("backward", len(tape.segments) - 1)
                value.backward()
                return tape, forward_end

            timeline.begin()
            if accumulates and in_hooks:  # hooks may behave differently in the first micro-batch
                run_passes()[0].forget()
                timeline.again()
            elif accumulates:
                deposit_gradients(trained)
                timeline.begin()
            start_bytes = timeline.allocated_bytes + held_bytes
            tape, forward_end = run_passes()
            timeline.take_as_before()
            optimizer_start = timeline.time
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            timeline.ended = True
            tape.forget()
    return Profile(
        deltas=timeline.deltas,
        events=timeline.events,
        start_bytes=start_bytes,
        ops=tape.ops,
        buffers=tape.buffers,
        saved=tape.saved,
        segments=tape.segments,
        entered=tape.entered,
        forward_end=forward_end,
        optimizer_start=optimizer_start,
        fixed={
            "weights": weights_bytes,
            "batch": batch_bytes,
            "gradients": grad_bytes,
            "optimizer": state_bytes,
            **({"other": held_bytes} if held_bytes else {}),
        },
        inputs=tape.inputs,
    )


def _first_samples(batch, count: int | None) -> tuple:
    """Inputs and targets of the first `count` samples, and whether the batch has more."""
    total = next(len(leaf) for leaf in tree_iter(batch) if isinstance(leaf, torch.Tensor))
    if count is None or count >= total:
        return *split_batch(batch), False
    first = tree_map_only(
        torch.Tensor, lambda t: t[:count] if t.dim() and len(t) == total else t, split_batch(batch)
    )
    return *first, True
