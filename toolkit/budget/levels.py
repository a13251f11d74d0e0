"""What a part of the forward pass can keep: its levels, each with bytes over time, seconds and FLOPs.

For each segment (a block, or what lies between two) the levels are the corners of the trade-off between
the bytes that are kept and the time that computing the rest again takes.  Each is a minimum cut of the
segment's graph of operators at one price of a byte (Eisner and Severance 1976 visit all corners): where
bytes are cheap nothing is recomputed, then norms, activations, casts and dropout are, then products, down
to the level that keeps the segment's input alone.

Bytes over time come from replaying the profile through the code that runs in training
(`tape.materialize`), on counters instead of tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from toolkit.budget.memory import ROUNDING_BYTES
from toolkit.budget.profile import OpCost, Profile
from toolkit.budget.tape import CACHE, DROP, KEEP, Buffer, materialize

_NEVER = 1 << 29  # a capacity that no cut contains


@dataclass(frozen=True)
class Level:
    """One way to run a segment."""

    decisions: tuple[str, ...]  # KEEP, CACHE or DROP, for each buffer of the segment
    after: np.ndarray  # bytes beyond `Profile.base` after each event of the segment
    highest: np.ndarray  # and at most, during it
    seconds: float  # that computing again takes
    flops: int  # of products that are computed again
    recomputed: tuple[str, ...]  # names of the operators that run again, one per run


@dataclass
class Segment:
    """A part of the forward pass.  Buffers and operators are numbered from 0 within it."""

    name: str
    ops: list[OpCost] = field(default_factory=list)  # of the profile, with its numbers
    first_op: int = 0
    first_buffer: int = 0
    sizes: list[int] = field(default_factory=list)  # bytes of its buffers
    events: list[tuple[str, int]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)  # of the events
    saved: dict[int, int] = field(default_factory=dict)  # saved tensor -> buffer
    must_keep: set[int] = field(default_factory=set)
    cannot_keep: set[int] = field(default_factory=set)

    def own(self, buffer: int) -> int | None:
        """Number of a buffer of the profile in this segment; None if it is another's."""
        place = buffer - self.first_buffer
        return place if 0 <= place < len(self.sizes) else None

    @property
    def kind(self) -> tuple:
        """Equal for segments that have the same levels."""
        places: dict[int, int] = {}

        def place(buffer: int) -> tuple:
            own = self.own(buffer)
            return ("own", own) if own is not None else ("other", places.setdefault(buffer, len(places)))

        ops = tuple(
            (op.name, *map(place, op.inputs), "w", *map(place, op.writes), op.flops, op.bytes_moved)
            for op in self.ops
        )
        return (
            ops,
            tuple(self.sizes),
            tuple(self.events),
            tuple(sorted(self.must_keep)),
            tuple(sorted(self.cannot_keep)),
        )


def segments_of(profile: Profile) -> list[Segment]:
    """The profile's forward pass, part by part in the order in which they run."""
    segments = [Segment(name) for name in profile.segments]
    for number, op in enumerate(profile.ops):
        segment = segments[op.segment]
        if not segment.ops:
            segment.first_op, segment.first_buffer = number, op.outputs[0]
        segment.ops.append(op)
        segment.sizes += [profile.buffers[b].nbytes for b in op.outputs]
    _bind_neighbours(profile, segments)
    last_reader = _last_foreign_release(profile, segments)
    saved_numbers: dict[int, int] = {}
    for position, (time, kind, index) in enumerate(profile.events):
        if kind == "end":
            for segment in segments:
                segment.events.append(("end", 0))
                segment.times.append(time)
            continue
        buffer = {"op": None, "died": index}.get(kind, profile.saved[index].buffer if kind in _SAVED else None)
        owner = profile.ops[index].segment if kind == "op" else profile.buffers[buffer].segment
        segment = segments[owner]
        if kind == "op":
            number = index - segment.first_op
        elif kind == "died":
            number = index - segment.first_buffer
        else:
            if kind == "pack":
                saved_numbers[index] = len(segment.saved)
                segment.saved[saved_numbers[index]] = buffer - segment.first_buffer
            number = saved_numbers[index]
        segment.events.append((kind, number))
        segment.times.append(time)
        for read in last_reader.get(position, ()):
            segment = segments[profile.buffers[read].segment]
            segment.events.append(("let_go", read - segment.first_buffer))
            segment.times.append(time)
    return segments


_SAVED = ("pack", "unpack", "release")


def _bind_neighbours(profile: Profile, segments: list[Segment]) -> None:
    """A buffer that recomputation in another segment reads is kept, what cannot be repeated too."""
    for op in profile.ops:
        segment = segments[op.segment]
        repeatable = op.repeatable and all(segment.own(b) is not None for b in op.writes)
        for read in op.inputs:
            if segment.own(read) is None:
                if profile.buffers[read].overwritten:
                    repeatable = False
                else:
                    owner = segments[profile.buffers[read].segment]
                    owner.must_keep.add(read - owner.first_buffer)
        if not repeatable:
            segment.must_keep.update(b - segment.first_buffer for b in op.outputs)
    for number, buffer in enumerate(profile.buffers):
        if buffer.overwritten:
            segment = segments[buffer.segment]
            segment.cannot_keep.add(number - segment.first_buffer)
            segment.must_keep.discard(number - segment.first_buffer)


def _last_foreign_release(profile: Profile, segments: list[Segment]) -> dict[int, list[int]]:
    """Event -> buffers of other segments that recomputation may need until then, and not longer."""
    ancestors: dict[int, frozenset[int]] = {}
    for op in profile.ops:
        segment, read = segments[op.segment], set()
        for buffer in (*op.inputs, *op.writes):
            read |= ancestors[buffer] if segment.own(buffer) is not None else {buffer}
        for output in op.outputs:
            ancestors[output] = frozenset(read)
    last: dict[int, int] = {}
    for position, (_, kind, index) in enumerate(profile.events):
        if kind == "release":
            last.update(dict.fromkeys(ancestors[profile.saved[index].buffer], position))
    positions = defaultdict(list)
    for buffer, position in last.items():
        positions[position].append(buffer)
    return positions


class _Bytes:
    """Stands for a tensor while a plan is simulated; counts as long as somebody holds it."""

    __slots__ = ("counted", "meter", "nbytes")

    def __init__(self, nbytes: int, meter: _Meter, counted: bool = True):
        self.nbytes, self.meter, self.counted = nbytes, meter, counted
        if counted:
            meter.add(nbytes)

    def count(self) -> None:
        """From now on the profile's base does not hold it any more."""
        self.counted = True
        self.meter.add(self.nbytes)

    def __del__(self):
        if self.counted:
            self.meter.add(-self.nbytes)


class _Meter:
    def __init__(self):
        self.now = self.highest = 0

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        self.highest = max(self.highest, self.now)


@dataclass(slots=True, eq=False)
class _SimulatedOp:
    number: int
    inputs: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    fresh_sizes: list[int]
    outputs: tuple[weakref.ref, ...] = ()


def simulate(segment: Segment, decisions: Sequence[str], seconds: Sequence[float]) -> Level:
    """Run the segment's events under `decisions`; `seconds` is what each of its operators takes."""
    meter = _Meter()
    runs: list[int] = []
    buffers: dict[int, Buffer] = {}
    contents: dict[int, _Bytes] = {}  # as long as the forward pass holds them
    handles: dict[int, object] = {}
    unpacked: dict[int, object] = {}
    lent: dict[int, Buffer] = {}  # what other segments need
    lendable = {event for event in segment.events if event[0] == "let_go"}

    elsewhere = Buffer(None)
    elsewhere.tensor = _Bytes(0, meter)

    def execute(op: _SimulatedOp, present: dict) -> list[_Bytes]:
        runs.append(op.number)
        return [present[b] for b in op.writes] + [_Bytes(size, meter) for size in op.fresh_sizes]

    def copy(content: _Bytes) -> _Bytes:
        return _Bytes(content.nbytes, meter)

    def buffer_of(number: int) -> Buffer:
        own = segment.own(number)
        return elsewhere if own is None else buffers[own]

    def run(number: int) -> None:
        cost = segment.ops[number]
        outputs = [segment.own(b) for b in cost.outputs]
        fresh = outputs[len(cost.writes) :]
        op = _SimulatedOp(
            number,
            tuple(map(buffer_of, cost.inputs)),
            tuple(map(buffer_of, cost.writes)),
            [segment.sizes[b] for b in fresh],
        )
        for output, written, old in zip(outputs, cost.writes, op.writes):
            own = segment.own(written)
            if own is None:
                fresh.append(output)
            else:
                contents[output], old.tensor = contents.pop(own), None
        for output in fresh:
            contents[output] = _Bytes(segment.sizes[output], meter, counted=False)
        made = []
        for output in outputs:
            buffers[output] = buffer = Buffer(op)
            buffer.cached = decisions[output] == CACHE
            if decisions[output] == KEEP:
                buffer.tensor, buffer.op = contents[output], None
            if ("let_go", output) in lendable:
                lent[output] = buffer
            made.append(weakref.ref(buffer))
        op.outputs = tuple(made)

    after, highest = [], []
    for kind, number in segment.events:
        meter.highest = meter.now
        if kind == "op":
            run(number)
        elif kind == "died":
            content = contents.pop(number)
            if sys.getrefcount(content) > 2:  # somebody else holds it
                content.count()
            del content
        elif kind == "pack":
            buffer = buffers[segment.saved[number]]
            handles[number] = buffer if buffer.tensor is None else buffer.tensor
            del buffer
        elif kind == "end":
            buffers.clear()
        elif kind == "unpack":
            if isinstance(handles[number], Buffer):
                unpacked[number] = materialize(handles[number], execute, copy)
        elif kind == "release":
            handles.pop(number, None)
            unpacked.pop(number, None)
        elif kind == "let_go":
            lent.pop(number, None)
        after.append(meter.now)
        highest.append(meter.highest)
    return Level(
        tuple(decisions),
        np.array(after, dtype=np.int64),
        np.array(highest, dtype=np.int64),
        sum(seconds[run] for run in runs),
        sum(segment.ops[run].flops for run in runs),
        tuple(segment.ops[run].name for run in runs),
    )


def menu(segment: Segment, seconds: Sequence[float]) -> list[Level]:
    """The segment's levels, from the one that keeps most to the one that keeps least."""
    cuts = _Cuts(segment, seconds)
    total_seconds, total_bytes = sum(seconds), sum(segment.sizes)
    if not segment.saved or not total_bytes:
        return [simulate(segment, cuts.decisions(_Cut(frozenset(), frozenset(), 0, 0.0)), seconds)]
    most = cuts.at(min(s for s in seconds if s > 0) / (2 * total_bytes))
    least = cuts.at(2 * total_seconds / ROUNDING_BYTES)
    corners = {most, least}

    def add_between(more: _Cut, less: _Cut) -> None:
        if more.nbytes - less.nbytes > total_bytes / 1000 and less.seconds > more.seconds:
            corner = cuts.at((less.seconds - more.seconds) / (more.nbytes - less.nbytes))
            if more.nbytes > corner.nbytes > less.nbytes:
                corners.add(corner)
                add_between(more, corner)
                add_between(corner, less)

    add_between(most, least)
    ordered = sorted(corners, key=lambda cut: (-cut.nbytes, cut.seconds))
    return [simulate(segment, cuts.decisions(cut), seconds) for cut in ordered]


@dataclass(frozen=True)
class _Cut:
    kept: frozenset[int]
    recomputed: frozenset[int]  # operators
    nbytes: int
    seconds: float


class _Cuts:
    """Minimum cuts of a segment's graph of buffers and operators."""

    def __init__(self, segment: Segment, seconds: Sequence[float]):
        self.segment, self.seconds = segment, seconds
        lent = {number for kind, number in segment.events if kind == "let_go"}
        self.needed = set(segment.saved.values()) | lent
        self.maker = {segment.own(b): number for number, op in enumerate(segment.ops) for b in op.outputs}
        self.inputs = [
            {own for b in (*op.inputs, *op.writes) if (own := segment.own(b)) is not None}
            for op in segment.ops
        ]

    def at(self, price: float) -> _Cut:
        """What to keep if a byte costs `price` seconds."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        # A buffer on the source's side of the cut is needed in backward, an operator there runs again:
        # paid are the edges from needed buffers to operators that do not run, and from those that do.
        source, sink, first_buffer = 0, 1, 2
        first_op = first_buffer + len(self.segment.sizes)
        scale = _NEVER / (price * sum(self.segment.sizes) + sum(self.seconds))
        edges: dict[tuple[int, int], int] = {}
        for buffer, maker in self.maker.items():
            if buffer in self.segment.must_keep:
                continue
            node, op = first_buffer + buffer, first_op + maker
            if buffer in self.needed:
                edges[source, node] = 2 * _NEVER
            keeping = round(scale * price * self.segment.sizes[buffer])
            edges[node, op] = 2 * _NEVER if buffer in self.segment.cannot_keep else keeping
        for number, inputs in enumerate(self.inputs):
            op = first_op + number
            edges[op, sink] = max(1, round(scale * self.seconds[number]))
            for buffer in inputs - self.segment.must_keep:
                edges[op, first_buffer + buffer] = 2 * _NEVER
        size = first_op + len(self.inputs)
        rows, columns = np.array(list(edges)).T
        graph = coo_array((np.array(list(edges.values()), np.int32), (rows, columns)), (size, size)).tocsr()
        residual = graph - maximum_flow(graph, source, sink).flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reached = set(breadth_first_order(residual, source, return_predecessors=False).tolist())
        recomputed = frozenset(n for n in range(len(self.inputs)) if first_op + n in reached)
        kept = {
            buffer
            for buffer, maker in self.maker.items()
            if maker not in recomputed and first_buffer + buffer in reached
        }
        read = set().union(*(self.inputs[op] for op in recomputed)) | self.needed
        kept |= self.segment.must_keep & read
        return _Cut(
            frozenset(kept),
            recomputed,
            sum(self.segment.sizes[buffer] for buffer in kept),
            sum(self.seconds[op] for op in recomputed),
        )

    def decisions(self, cut: _Cut) -> list[str]:
        """KEEP what the cut keeps; CACHE what takes a product to compute and is needed more than once."""
        readers = Counter(buffer for op in cut.recomputed for buffer in self.inputs[op])
        readers.update(self.segment.saved.values())
        heavy: set[int] = set()
        decisions = [DROP] * len(self.segment.sizes)
        for buffer in sorted(self.maker):
            op = self.maker[buffer]
            if buffer in cut.kept:
                decisions[buffer] = KEEP
            elif op in cut.recomputed and (self.segment.ops[op].flops or heavy & self.inputs[op]):
                together = map(self.segment.own, self.segment.ops[op].outputs)
                if sum(readers[output] for output in together) > 1:
                    decisions[buffer] = CACHE
                else:
                    heavy.add(buffer)
        return decisions
