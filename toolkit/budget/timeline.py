"""What happens in a training step: its operators, saved tensors, allocations and releases, in order."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_iter

from toolkit.budget.flops import operator_flops
from toolkit.budget.memory import StorageRef, TensorMemory, workspace_bytes
from toolkit.budget.step import tensors_in
from toolkit.budget.tape import (
    CACHE,
    DROP,
    Buffer,
    External,
    Handle,
    Op,
    Tape,
    View,
    compute,
    couples_samples,
    draws_random_numbers,
    operator_name,
    storage_key,
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


class Timeline(TensorMemory):
    """Logs every allocation and release, except inside `unseen()`.

    After `again()` it logs another micro-batch of the same step, and assumes between two events at least the
    memory that the earlier micro-batch took there.

    `counts`: whether what happens now belongs to the step, if it runs in somebody's loop.  Tensors that its
    operators read and that nobody has tracked (targets, another model) were there from the start;
    `found` has their sizes.
    """

    def __init__(self, device: torch.device, counts: Callable[[], bool] | None = None):
        super().__init__(device)
        self.counts = counts
        self.found: list[int] = []  # bytes
        self.born: dict[int, int] = {}  # live storage -> place of its allocation in `deltas`
        self.deltas: list[int] = []
        self.events: list[tuple[int, str, int]] = []
        self.contents: dict[int, int] = {}  # storage -> index of its buffer in `Profile.buffers`
        self._unseen = False
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

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Count no tensors that are made inside the with statement, until they are freed."""
        self._unseen = True
        try:
            yield
        finally:
            self._unseen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counts is not None and not self._unseen:
            if not self.counts():
                return func(*args, **(kwargs or {}))
            for leaf in tree_iter((args, kwargs)):
                if isinstance(leaf, torch.Tensor) and storage_key(leaf) not in self._live:
                    before = self.allocated_bytes
                    super()._count(leaf)
                    self.found.append(self.allocated_bytes - before)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def begin(self) -> None:
        """Discard the log."""
        self.before = []
        self.born.clear()
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
        if self._unseen:  # registered with no bytes, so that its views are not counted either
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live:
                self._live[storage._cdata] = StorageRef(storage, self._freed, storage._cdata, 0)
            return
        before = self.allocated_bytes
        super()._count(tensor)
        self.highest[-1] = max(self.highest[-1], self.allocated_bytes)
        if self.allocated_bytes != before:
            if self.at_next_allocation:
                self.at_next_allocation()
                self.at_next_allocation = None
            self.born[storage_key(tensor)] = len(self.deltas)
            self.deltas.append(self.allocated_bytes - before)

    def _take_for_a_moment(self, nbytes: int) -> None:
        if not self.ended and not self._unseen:
            self.highest[-1] = max(self.highest[-1], self.allocated_bytes + nbytes)
            self.deltas += [nbytes, -nbytes]

    def _freed(self, reference) -> None:
        if self.ended:
            return
        before = self.allocated_bytes
        super()._freed(reference)
        if self.allocated_bytes != before:
            self.born.pop(reference.key, None)
            self.deltas.append(self.allocated_bytes - before)
            if reference.key in self.contents:
                self.note("died", self.contents.pop(reference.key))


class _Ghost(Handle):
    """Placeholder for a saved tensor, which logs when autograd releases it."""

    def __init__(self, view: View, index: int, tape: ProfilingTape, like: torch.Tensor):
        super().__init__(view)
        self.index, self.tape = index, tape
        self.made = (like.dtype, like.device)

    def stand_in(self) -> torch.Tensor:
        """A tensor of the saved one's shape."""
        dtype, device = self.made
        return torch.empty_strided(self.view.size, self.view.stride, dtype=dtype, device=device)

    def __del__(self):
        self.tape.open -= 1
        self.tape.timeline.note("release", self.index)


class ProfilingTape(Tape):
    """A tape that keeps nothing and logs everything, over one or several forward passes of a step.

    On fake tensors backward gets placeholders.  On `real` ones it gets what it asks for, computed from copies
    of the blocks' outputs, which the timeline does not see: both log the same.
    """

    def __init__(self, timeline: Timeline, real: bool = False):
        super().__init__(self._decide_and_note)
        self.timeline, self.real = timeline, real
        self.ops: list[OpCost] = []
        self.buffers: list[BufferCost] = []
        self.saved: list[SavedCost] = []
        self.segments: list[str] = []
        self.entered: list[int] = []
        self.inputs: dict[str, torch.Size] = {}
        self.tails: list[int] = []  # the last segment of each forward pass
        self.forward_end = 0
        self.open = 0  # saved tensors that no backward pass has released
        self._numbers: weakref.WeakKeyDictionary[Buffer, int] = weakref.WeakKeyDictionary()
        # Storage from outside -> the operators that have read it, and their outputs.
        self._readers: dict[int, list[tuple[OpCost, tuple[weakref.ref[Buffer], ...]]]] = {}
        self._begun: set[int] = set()  # segments whose backward pass has begun
        self._copying = False
        self._call: tuple | None = None
        self._out = None

    def __enter__(self) -> ProfilingTape:
        self.segments.append("")
        self.entered.append(self.timeline.time)
        return super().__enter__()

    def forward_ended(self, outputs) -> None:
        """End a forward pass, after leaving this tape."""
        if self.timeline.at_next_allocation:  # nothing runs after the last block
            self.timeline.at_next_allocation()
            self.timeline.at_next_allocation = None
        self.tails.append(len(self.segments) - 1)
        self.timeline.note("end", self.tails[-1])
        self.forward_end = self.timeline.time
        self._watch(outputs, self.tails[-1])

    def forget(self) -> None:
        """Free the graph: its hooks reference this tape, in a cycle that is never collected."""
        self._readers.clear()

    def backward_begins(self, number: int) -> None:
        """Note that the backward pass of a segment begins; that of the code after its forward's last block
        has begun before."""
        tail = next((tail for tail in self.tails if tail >= number), number)
        for segment in (tail, number):
            if segment not in self._begun:
                self._begun.add(segment)
                self.timeline.note("backward", segment)

    def _watch(self, outputs, number: int) -> None:
        """Call `backward_begins` when the gradient of a segment's output is there."""
        for tensor in tensors_in(outputs):
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda grad: self.backward_begins(number))

    def block_ended(self, name: str, args: tuple, kwargs: dict, output) -> None:
        """End the segment of block `name`; releases by its caller still belong to it."""
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if len(args) == len(tensors) == 1 and args[0] is tensors[0] and isinstance(output, torch.Tensor):
            (x,) = args
            if x.dim() > 1 and len(x) == len(output):
                self.inputs[name] = x.shape
        number = len(self.segments) - 1
        self.segments[-1] = name
        self._watch(output, number)
        if self.real:
            for tensor in tensors_in(output):
                self._copy(tensor)
        self.segments.append("")
        if self.timeline.at_next_allocation:  # the block has allocated nothing: it begins where it ends
            self.timeline.at_next_allocation()
        self.timeline.at_next_allocation = lambda: self.entered.append(self.timeline.time)

    def _copy(self, tensor: torch.Tensor) -> None:
        """Let what comes after `tensor` be computed from a copy: the forward pass frees it as ever."""
        view = self._view(tensor)
        if view is None or view.buffer.tensor is not None:
            return
        self._copying = True
        try:
            with self.timeline.unseen(), torch.no_grad():
                count = tensor.untyped_storage().nbytes() // tensor.element_size()
                view.buffer.tensor = tensor.as_strided((count,), (1,), 0).clone()
        finally:
            self._copying = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._copying:
            return func(*args, **(kwargs or {}))
        self._call = (func, args, kwargs or {})
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._call = self._out = None  # they would keep tensors that the step releases

    def _record(self, func, args: tuple, kwargs: dict, written: list[torch.Tensor]) -> Op:
        """Before a tensor from outside changes: what was computed from it cannot be repeated later."""
        for tensor in written:
            for cost, outputs in self._readers.pop(storage_key(tensor), ()):
                cost.repeatable = False
                for buffer in filter(None, (reference() for reference in outputs if self.real)):
                    with self.timeline.unseen():
                        buffer.tensor = compute(buffer)
        return super()._record(func, args, kwargs, written)

    def _note_outputs(self, op: Op, written: list[torch.Tensor], out) -> None:
        self._out = out
        super()._note_outputs(op, written, out)

    def _decide_and_note(self, op: Op, contents: dict[int, torch.Tensor]) -> list[str]:
        func, args, kwargs = self._call
        segment, number = len(self.segments) - 1, len(self.ops)
        outputs = []
        for reference, key in zip(op.outputs, contents):
            buffer = reference()
            self._numbers[buffer] = len(self.buffers)
            outputs.append(len(self.buffers))
            self.timeline.contents[key] = len(self.buffers)
            self.buffers.append(BufferCost(segment, number, self.timeline.size_of(key)))
        writes = tuple(self._numbers[buffer] for buffer in op.writes)
        for old, buffer in zip(writes, op.writes):
            if buffer.blank and not op.repeatable:
                self.ops[self.buffers[old].op].repeatable = False
            else:
                self.buffers[old].overwritten = True
        tensors = [t for t in tree_iter((args, kwargs, self._out)) if isinstance(t, torch.Tensor)]
        cost = OpCost(
            segment,
            operator_name(op.func),
            tuple(self._numbers[buffer] for buffer in op.inputs),
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
                self._readers.setdefault(storage_key(value.tensor), []).append((cost, op.outputs))
        self.timeline.note("op", number)
        return [CACHE if self.real else DROP] * len(outputs)

    def pack(self, tensor: torch.Tensor) -> External | Handle:
        view = self._view(tensor)
        if view is None or view.buffer.op is None:
            return super().pack(tensor)
        index = len(self.saved)
        self.timeline.note("pack", index)
        self.saved.append(SavedCost(len(self.segments) - 1, self._numbers[view.buffer]))
        self.open += 1
        return _Ghost(view, index, self, tensor)

    def unpack(self, held: External | Handle) -> torch.Tensor:
        if not isinstance(held, _Ghost):
            return super().unpack(held)
        self.timeline.note("unpack", held.index)
        with self.timeline.unseen():
            return super().unpack(held) if self.real else held.stand_in()
