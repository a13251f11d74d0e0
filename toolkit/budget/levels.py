"""The levels of a part of the forward pass: which tensors it keeps, with bytes over time, seconds and FLOPs.

For each segment (a block, or the code between two blocks) the levels are the corners of the trade-off between
kept bytes and recomputation time.  Each is a minimum cut of the segment's graph of operators at one price of
a byte (Eisner and Severance 1976 visit all corners).  With rising price nothing is recomputed, then norms,
activations, casts and dropout, then products, down to the level that keeps the segment's input alone.

Bytes over time come from replaying the profile through the code that runs in training
(`tape.materialize`), on counters instead of tensors.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from toolkit.budget.memory import ROUNDING_BYTES
from toolkit.budget.profile import Profile
from toolkit.budget.tape import CACHE, DROP, KEEP, Buffer, materialize
from toolkit.budget.timeline import OpCost

_NEVER = 1 << 29  # a capacity too large for any cut


@dataclass(frozen=True)
class Level:
    """One way to run a segment."""

    decisions: tuple[str, ...]  # KEEP, CACHE or DROP for each buffer of the segment
    after: np.ndarray  # bytes in addition to `Profile.base`, after each event of the segment
    highest: np.ndarray  # the same, at most during each event
    seconds: float  # recomputation time
    flops: int  # recomputed products
    recomputed: tuple[str, ...]  # names of the operators that run again, one per run


@dataclass
class Segment:
    """A part of the forward pass, and of the backward pass.

    Its buffers are numbered from 0: first its own, then those that it borrows from the segment before it.
    A borrowed buffer is counted here from the moment when the forward pass releases it.
    """

    name: str
    ops: list[OpCost] = field(default_factory=list)  # operators of the profile, with its numbering
    first_op: int = 0
    first_buffer: int = 0
    own: int = 0  # number of own buffers
    sizes: list[int] = field(default_factory=list)  # bytes of its buffers
    borrowed: dict[int, int] = field(default_factory=dict)  # number in the profile -> here
    events: list[tuple[str, int]] = field(default_factory=list)
    times: list[int] = field(default_factory=list)  # times of the events
    saved: dict[int, int] = field(default_factory=dict)  # saved tensor -> buffer
    wanted: set[int] = field(default_factory=set)  # buffers that other segments need in backward
    must_keep: set[int] = field(default_factory=set)
    cannot_keep: set[int] = field(default_factory=set)
    before: tuple[int, ...] = ()  # the profile's base during its forward pass, relative to its start
    during: tuple[int, ...] = ()  # the same during its backward pass

    def place(self, buffer: int) -> int | None:
        """The number here of a buffer of the profile; None if it is neither own nor borrowed."""
        place = buffer - self.first_buffer
        return place if 0 <= place < self.own else self.borrowed.get(buffer)

    @functools.cached_property
    def writes_elsewhere(self) -> bool:
        """Whether it changes buffers of other segments in place."""
        places = [self.place(buffer) for op in self.ops for buffer in op.writes]
        return any(place is None or place >= self.own for place in places)

    def needs(self, decisions: Sequence[str]) -> set[int]:
        """The operators whose results may be recomputed in backward under these decisions."""
        maker = {self.place(buffer): n for n, op in enumerate(self.ops) for buffer in op.outputs}
        found: set[int] = set()
        stack = list(self.saved.values())
        while stack:
            buffer = stack.pop()
            if buffer not in maker or decisions[buffer] == KEEP or maker[buffer] in found:
                continue
            op = self.ops[maker[buffer]]
            found.add(maker[buffer])
            stack += [place for b in (*op.inputs, *op.writes) if (place := self.place(b)) is not None]
        return found

    @property
    def kind(self) -> tuple:
        """Equal for segments that have the same levels."""
        others: dict[int, int] = {}

        def place(buffer: int) -> tuple:
            here = self.place(buffer)
            return (here,) if here is not None else (-1, others.setdefault(buffer, len(others)))

        ops = tuple(
            (
                op.name,
                tuple(map(place, op.inputs)),
                tuple(map(place, op.writes)),
                op.flops,
                op.bytes_moved,
                op.workspace_bytes,
            )
            for op in self.ops
        )
        fixed = (frozenset(self.wanted), frozenset(self.must_keep), frozenset(self.cannot_keep))
        return (ops, self.own, tuple(self.sizes), tuple(self.events), fixed, self.before, self.during)


def segments_of(profile: Profile) -> list[Segment]:
    """The parts of a profile, in the order of the forward pass."""
    segments = [Segment(name) for name in profile.segments]
    for number, op in enumerate(profile.ops):
        segment = segments[op.segment]
        if not segment.ops:
            segment.first_op, segment.first_buffer = number, op.outputs[0]
        segment.ops.append(op)
        segment.sizes += [profile.buffers[b].nbytes for b in op.outputs]
        segment.own = len(segment.sizes)
    extra = _bind_neighbours(profile, segments)
    saved_numbers: dict[int, int] = {}
    positioned: list[list[tuple]] = [[] for _ in segments]
    ended = 0  # segments of the forward passes so far
    for position, (time, kind, index) in enumerate(profile.events):
        if kind == "end":
            for events in positioned[ended : index + 1]:
                events.append((position, time, "end", 0))
            ended = index + 1
            continue
        if kind == "backward":
            continue
        if kind == "op":
            number = profile.ops[index].segment
            positioned[number].append((position, time, "op", index - segments[number].first_op))
            continue
        buffer = index if kind == "died" else profile.saved[index].buffer
        owner = profile.buffers[buffer].segment
        if kind == "died":
            borrower = owner + 1 if owner + 1 < len(segments) else owner
            number = borrower if buffer in segments[borrower].borrowed else owner
            positioned[number].append((position, time, kind, segments[number].place(buffer)))
            continue
        packer = profile.saved[index].segment
        number = packer if buffer in segments[packer].borrowed else owner
        if kind == "pack":
            saved_numbers[index] = len(segments[number].saved)
            segments[number].saved[saved_numbers[index]] = segments[number].place(buffer)
        positioned[number].append((position, time, kind, saved_numbers[index]))
    for number, position, kind, buffer in extra:
        time = profile.events[position][0] if position < len(profile.events) else profile.optimizer_start
        before = kind in ("hand_back", "take_back")
        place = segments[number].place(buffer)
        positioned[number].append((position - before * 0.5, time, kind, place))
    starts = [*profile.entered, profile.forward_end]
    backward = list(profile.backward_starts.items())
    ends = [profile.events[position][0] for _, position in backward[1:]] + [profile.optimizer_start]
    during = {segment: (profile.events[position][0], end) for (segment, position), end in zip(backward, ends)}
    for number, (segment, events) in enumerate(zip(segments, positioned)):
        events.sort(key=lambda event: event[0])
        segment.times = [time for _, time, _, _ in events]
        segment.events = _in_fixed_order([(kind, index) for _, _, kind, index in events])
        segment.before = _relative(profile, starts[number], starts[number + 1])
        segment.during = _relative(profile, *during[number]) if number in during else ()
    return segments


def _in_fixed_order(events: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Sort the buffers that die between the passes: autocast frees them at its end, in any order."""
    end = events.index(("end", 0)) + 1
    after = next((i for i in range(end, len(events)) if events[i][0] != "died"), len(events))
    return events[:end] + sorted(events[end:after]) + events[after:]


def _relative(profile: Profile, start: int, end: int) -> tuple[int, ...]:
    return tuple((profile.base[start : end + 1] - profile.base[start]).tolist())


def _bind_neighbours(profile: Profile, segments: list[Segment]) -> list[tuple[int, int, str, int]]:
    """Decide which segment counts a buffer that other segments need; such a buffer is kept.

    The next segment borrows a buffer that only it needs.  If the maker needs it in backward too, the borrower
    holds it to the end of its own backward pass ("hand_back"), and from there on the maker counts it
    ("take_back").  Buffers needed elsewhere are lent: the maker counts them until the last use ("let_go").
    Returns these events: (segment, position in the profile's events, kind, buffer).
    """
    readers: dict[int, set[int]] = defaultdict(set)  # buffer -> other segments whose operators read it
    ancestors: dict[int, frozenset[int]] = {}  # buffer -> foreign buffers that it is computed from
    for op in profile.ops:
        segment = segments[op.segment]
        repeatable, read = op.repeatable, set()
        for buffer in (*op.inputs, *op.writes):
            if profile.buffers[buffer].segment == op.segment:
                read |= ancestors[buffer]
            else:
                read.add(buffer)
                readers[buffer].add(op.segment)
                repeatable &= not profile.buffers[buffer].overwritten
        for output in op.outputs:
            ancestors[output] = frozenset(read)
        if not repeatable:
            segment.must_keep.update(b - segment.first_buffer for b in op.outputs)
    last: dict[int, int] = {}  # buffer -> position of the last release that needs it elsewhere
    needers: dict[int, set[int]] = defaultdict(set)
    own_saved: set[int] = set()
    for position, (_, kind, index) in enumerate(profile.events):
        if kind != "release":
            continue
        saved = profile.saved[index]
        owner = profile.buffers[saved.buffer].segment
        if owner == saved.segment:
            own_saved.add(saved.buffer)
        for buffer in ancestors[saved.buffer] | ({saved.buffer} if owner != saved.segment else set()):
            last[buffer] = position
            needers[buffer].add(saved.segment if buffer == saved.buffer else owner)
    order = list(profile.backward_starts)
    extra = []
    for buffer, needing in needers.items():
        if profile.buffers[buffer].overwritten:
            continue
        maker = profile.buffers[buffer].segment
        segments[maker].wanted.add(buffer - segments[maker].first_buffer)
        next_one = maker + 1
        shared = buffer in own_saved
        follows = (next_one, maker) in itertools.pairwise(order) if shared else next_one in order
        if needing | readers[buffer] == {next_one} and follows:
            borrower = segments[next_one]
            borrower.borrowed[buffer] = len(borrower.sizes)
            borrower.sizes.append(profile.buffers[buffer].nbytes)
            if shared:
                extra.append((next_one, profile.backward_starts[maker], "hand_back", buffer))
                extra.append((maker, profile.backward_starts[maker], "take_back", buffer))
        else:
            extra.append((maker, last[buffer], "let_go", buffer))
    for number, buffer in enumerate(profile.buffers):
        if buffer.overwritten:
            segment = segments[buffer.segment]
            segment.cannot_keep.add(number - segment.first_buffer)
            segment.must_keep.discard(number - segment.first_buffer)
    for segment in segments:
        segment.must_keep |= segment.wanted
    return extra


class _Bytes:
    """Replaces a tensor while a plan is simulated; it is counted as long as it is referenced."""

    __slots__ = ("counted", "meter", "nbytes")

    def __init__(self, nbytes: int, meter: _Meter, counted: bool = True):
        self.nbytes, self.meter, self.counted = nbytes, meter, counted
        if counted:
            meter.add(nbytes)

    def count(self) -> None:
        """Count it from now on: the profile's base no longer includes it."""
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


def simulate(
    segment: Segment, decisions: Sequence[str], seconds: Sequence[float], taped: bool = True
) -> Level:
    """Run the segment's events under `decisions`; `seconds`: the time of each of its operators.

    If not `taped`, only autograd holds the tensors that the forward pass has released.
    """
    meter = _Meter()
    runs: list[int] = []
    buffers: dict[int, Buffer] = {}
    contents: dict[int, _Bytes] = {}  # while the forward pass holds them
    handles: dict[int, object] = {}
    unpacked: dict[int, object] = {}
    lent: dict[int, Buffer] = {}  # buffers that other segments need
    ends = ("let_go", "hand_back", "take_back")[0 if taped else 1 :]
    until = {number for kind, number in segment.events if kind in ends}

    elsewhere = Buffer(None)
    elsewhere.tensor = _Bytes(0, meter)
    for number in segment.borrowed.values():
        contents[number] = _Bytes(segment.sizes[number], meter, counted=False)
        buffers[number] = Buffer(None)
        buffers[number].tensor = contents[number]
        if number in until:
            lent[number] = buffers[number]

    def execute(op: _SimulatedOp, present: dict) -> list[_Bytes]:
        runs.append(op.number)
        made = [present[b] for b in op.writes] + [_Bytes(size, meter) for size in op.fresh_sizes]
        workspace = segment.ops[op.number].workspace_bytes
        meter.add(workspace)
        meter.add(-workspace)
        return made

    def copy(content: _Bytes) -> _Bytes:
        return _Bytes(content.nbytes, meter)

    def buffer_of(number: int) -> Buffer:
        place = segment.place(number)
        return elsewhere if place is None else buffers[place]

    def run(number: int) -> None:
        cost = segment.ops[number]
        outputs = [segment.place(b) for b in cost.outputs]
        fresh = outputs[len(cost.writes) :]
        op = _SimulatedOp(
            number,
            tuple(map(buffer_of, cost.inputs)),
            tuple(map(buffer_of, cost.writes)),
            [segment.sizes[b] for b in fresh],
        )
        for output, written, old in zip(outputs, cost.writes, op.writes):
            place = segment.place(written)
            if place is None:
                fresh.append(output)
            else:
                contents[output], old.tensor = contents.pop(place), None
        for output in fresh:
            contents[output] = _Bytes(segment.sizes[output], meter, counted=False)
        made = []
        for output in outputs:
            buffers[output] = buffer = Buffer(op)
            buffer.cached = decisions[output] == CACHE
            if decisions[output] == KEEP:
                buffer.tensor, buffer.op = contents[output], None
            if output in until:
                lent[output] = buffer
            made.append(weakref.ref(buffer))
        op.outputs = tuple(made)

    after, highest = [], []
    for kind, number in segment.events:
        meter.highest = 0
        if kind == "op":
            run(number)
        elif kind == "died":
            content = contents.pop(number)
            if not taped and number in buffers.keys() - lent.keys():
                buffers[number].tensor = None
            if sys.getrefcount(content) > 2:  # something else holds it
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
        elif kind in ("let_go", "hand_back"):
            lent.pop(number, None)
        elif kind == "take_back":
            contents.pop(number).count()
            lent.pop(number)
        after.append(meter.now)
        highest.append(max(meter.now, meter.highest))
    return Level(
        tuple(decisions),
        np.array(after, dtype=np.int64),
        np.array(highest, dtype=np.int64),
        sum(seconds[run] for run in runs),
        sum(segment.ops[run].flops for run in runs),
        tuple(segment.ops[run].name for run in runs),
    )


def menu(segment: Segment, seconds: Sequence[float]) -> list[Level]:
    """The segment's levels, from most kept bytes to least."""
    cuts = _Cuts(segment, seconds)
    total_seconds, total_bytes = sum(seconds), sum(segment.sizes)
    if cuts.needed <= segment.must_keep or not total_bytes:  # for example without a graph
        only = _Cut(frozenset(cuts.needed), frozenset(), 0, 0.0)
        return [simulate(segment, cuts.decisions(only), seconds)]
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


def plain(segment: Segment, saved: set[int], seconds: Sequence[float]) -> Level:
    """The level that keeps what autograd saves and nothing for other segments, as without recomputation.

    `saved`: all buffers of the profile that autograd saves.
    """
    kept = [segment.first_buffer + place in saved for place in range(segment.own)]
    return simulate(segment, [KEEP if keep else DROP for keep in kept], seconds, taped=False)


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
        needed = {*segment.saved.values(), *segment.wanted}
        self.needed = {buffer for buffer in needed if buffer < segment.own}
        self.maker = {segment.place(b): number for number, op in enumerate(segment.ops) for b in op.outputs}
        places = [map(segment.place, (*op.inputs, *op.writes)) for op in segment.ops]
        self.inputs = [{p for p in inputs if p is not None and p < segment.own} for inputs in places]

    def at(self, price: float) -> _Cut:
        """The cut with the least cost if a byte costs `price` seconds."""
        # On the source's side of the cut buffers are needed in backward and operators run again.  The cut
        # pays for needed buffers whose operator does not run again (they are kept), and for operators that
        # do.
        source, sink, first_buffer = 0, 1, 2
        first_op = first_buffer + self.segment.own
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
        """KEEP what the cut keeps; CACHE what needs a product to compute and is used more than once."""
        readers = Counter(buffer for op in cut.recomputed for buffer in self.inputs[op])
        readers.update(self.segment.saved.values())
        heavy: set[int] = set()
        decisions = [DROP] * self.segment.own
        for buffer in sorted(self.maker):
            op = self.maker[buffer]
            if buffer in cut.kept:
                decisions[buffer] = KEEP
            elif op in cut.recomputed and (self.segment.ops[op].flops or heavy & self.inputs[op]):
                together = map(self.segment.place, self.segment.ops[op].outputs)
                if sum(readers[output] for output in together) > 1:
                    decisions[buffer] = CACHE
                else:
                    heavy.add(buffer)
        return decisions
