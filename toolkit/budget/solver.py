"""Chooses the level of each segment: the least time such that no moment of the step exceeds the budget.

A step is a chain of segments, run forward and then backward.  While segment i runs, in either direction, the
tensors that the segments before it keep are alive, and those that later segments keep are not.  So the
highest moment of each level of i limits the sum of the bytes that the segments before it keep, and a dynamic
programme over that sum finds the optimum.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from toolkit.budget.levels import Level, Segment, menu, plain, segments_of
from toolkit.budget.profile import Profile
from toolkit.budget.step import AUTOCAST
from toolkit.budget.timeline import OpCost

_SEARCHES = 16  # limits tried for one budget
_CELLS = 8192  # resolution of the table: the bytes kept without recomputation, divided by this


@dataclass(frozen=True)
class DeviceSpeed:
    """A roofline: an operator takes its arithmetic or its traffic, whichever is longer, and a launch.

    The host needs time for each operator too, which limits small batches: `host_seconds` for its forward and
    backward pass, and `record_seconds` in segments that a tape records.  Both are assumed for a laptop; the
    ratio between them was measured on a CPU, with a tape that recorded every operator.
    """

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float
    name: str = ""
    host_seconds: float = 40e-6
    record_seconds: float = 30e-6

    def op_seconds(self, op: OpCost) -> float:
        """Estimated time of one operator."""
        work = max(op.flops / self.flops_per_second, op.bytes_moved / self.bytes_per_second)
        return work + self.launch_seconds

    def step_seconds(self, device_seconds: float, ops: int, recorded_ops: int = 0) -> float:
        """Estimated time of a forward and backward pass: the longer of device and host."""
        return max(device_seconds, ops * self.host_seconds + recorded_ops * self.record_seconds)


# Used if nothing is measured.  Its products are expensive (4.5 FLOP per byte), so its plans are close to
# those that recompute the fewest FLOPs.
REFERENCE = DeviceSpeed(1e12, 224e9, 5e-6, name="reference: 1 TFLOP/s, 224 GB/s, 5 us a launch")


def speed_of(device: torch.device, precision: str) -> DeviceSpeed:
    """Measured on CUDA, once per process; elsewhere the reference, so that plans are the same everywhere."""
    return measure_speed(device, precision) if device.type == "cuda" else REFERENCE


@functools.cache
def measure_speed(device: torch.device, precision: str, side: int = 4096) -> DeviceSpeed:
    """Time a product of `side` x `side` matrices, a copy of 16 times their size, and a tiny operator."""
    dtype = AUTOCAST[precision] or torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    block = torch.empty(16 * matrix.numel(), device=device, dtype=dtype)
    source = torch.empty_like(block)
    scalar = torch.zeros(1, device=device)
    return DeviceSpeed(
        2 * side**3 / _seconds(device, lambda: matrix @ matrix, 8),
        2 * block.nbytes / _seconds(device, lambda: block.copy_(source), 8),
        _seconds(device, lambda: scalar.add_(1), 1000),
        name=f"measured on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}",
    )


def _seconds(device: torch.device, run, times: int) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times


@dataclass(frozen=True, eq=False)
class Option:
    """A way to run a segment: a level, and the number of slices of the batch.

    Bytes: `kept` between its forward and its backward pass; `forward`, `backward`: its highest moments in
    them, in addition to the step's base when it begins.
    """

    segment: Segment
    slices: int
    level: Level
    seconds: float  # extra time, compared with running the segment whole and keeping everything
    kept: int
    forward: int
    backward: int
    kept_forward: int  # kept during the forward pass, which may hold a part of it anyway
    kept_loss: np.ndarray  # kept at each time between the passes

    @functools.cached_property
    def recorded(self) -> frozenset[int]:
        """The operators whose results may be recomputed."""
        return frozenset(self.segment.needs(self.level.decisions))

    @functools.cached_property
    def passing(self) -> tuple[str, ...]:
        """By operator: its name if nothing needs a record of it, else ""."""
        names = []
        for number, op in enumerate(self.segment.ops):
            # What is changed in place, now or later, has to be known as a result of the tape.
            changes = op.writes or self.segment.cannot_keep & set(map(self.segment.place, op.outputs))
            names.append("" if number in self.recorded or changes else op.name)
        return tuple(names)


@dataclass(frozen=True)
class Solution:
    """An option for each segment.  `bound_seconds`: a lower bound for all choices within the budget."""

    options: tuple[Option, ...]
    peak_bytes: int
    seconds: float
    bound_seconds: float


@dataclass(frozen=True)
class _Chunk:
    """A stretch of a profile's time: one segment forward or backward, the loss, or the optimizer."""

    direction: str  # forward, loss, backward, optimizer
    segment: int
    start: int
    end: int

    def of(self, values: np.ndarray) -> np.ndarray:
        return values[self.start : self.end + 1]

    def holds(self, segment: int) -> bool:
        """Whether the tensors that `segment` keeps are alive."""
        return self.direction != "optimizer" and segment < self.segment


def _chunks(profile: Profile) -> list[_Chunk]:
    count = len(profile.segments)
    starts = [*profile.entered, profile.forward_end]
    order = list(profile.backward_starts)
    begins = [profile.events[position][0] for position in profile.backward_starts.values()]
    begins.append(profile.optimizer_start)
    return [
        *(_Chunk("forward", i, starts[i], starts[i + 1]) for i in range(count)),
        _Chunk("loss", count, profile.forward_end, begins[0]),
        *(_Chunk("backward", i, begins[k], begins[k + 1]) for k, i in enumerate(order)),
        _Chunk("optimizer", -1, profile.optimizer_start, len(profile.base) - 1),
    ]


class Chain:
    """All plans of one profiled step.

    `sliced`: the profile of the same step in which some segments, one of each kind, run on slices of the
    batch, and the number of slices by segment.
    """

    def __init__(
        self,
        profile: Profile,
        op_seconds: Callable[[OpCost], float],
        sliced: tuple[Profile, dict[int, int]] | None = None,
    ):
        self.profile = profile
        self.segments = segments_of(profile)
        self.plain_seconds = sum(op_seconds(op) for op in profile.ops)  # of the forward pass
        self._chunks = _chunks(profile)
        self._curves: dict[tuple[int, Option], tuple[np.ndarray, np.ndarray]] = {}
        by_kind: dict[tuple, list[Option]] = {}
        for number, segment in enumerate(self.segments):
            if segment.kind not in by_kind:
                by_kind[segment.kind] = _options(profile, number, segment, 1, op_seconds)
        if sliced is not None:
            other, counts = sliced
            parts = segments_of(other)
            for number, slices in counts.items():
                whole = sum(op_seconds(op) for op in self.segments[number].ops)
                by_kind[self.segments[number].kind] += _options(
                    other, number, parts[number], slices, op_seconds, whole
                )
        self.options = [by_kind[segment.kind] for segment in self.segments]
        saved = {tensor.buffer for tensor in profile.saved}
        self._plain = tuple(
            _option(profile, number, segment, 1, plain(segment, saved, [0.0] * len(segment.ops)), 0.0)
            for number, segment in enumerate(self.segments)
        )
        # Per segment and option: the highest moment, without the bytes that earlier segments keep.
        starts: dict[int, dict[str, int]] = {i: {} for i in range(-1, len(self.segments) + 1)}
        for chunk in self._chunks:
            starts[chunk.segment][chunk.direction] = int(profile.base[chunk.start])
        self._found: list[Solution] = []
        self._smallest: int | None = None
        self._own = [
            [max(start + getattr(option, way) for way, start in starts[i].items()) for option in options]
            for i, options in enumerate(self.options)
        ]

    def memory(self, options: tuple[Option, ...]) -> np.ndarray:
        """Highest allocated bytes at each time of the profile under a plan.

        The profile lacks the times of slices: there it is the segment's highest moment.
        """
        base = self.profile.base
        held, spikes = np.zeros_like(base), np.zeros_like(base)
        for number, option in enumerate(options):
            after, highest = self._over_time(number, option)
            held += after
            np.maximum(spikes, highest - after, out=spikes)
        memory = base + held + spikes
        np.maximum(memory[1:], base[1:] + held[:-1], out=memory[1:])  # before the event at that time
        for chunk in self._chunks:
            if chunk.direction in ("forward", "backward") and options[chunk.segment].slices > 1:
                others = int(held[chunk.start : max(chunk.end, chunk.start + 1)].max())
                highest = int(base[chunk.start]) + getattr(options[chunk.segment], chunk.direction) + others
                memory[chunk.start + 1 : chunk.end] = highest
                if chunk.end <= chunk.start + 1:
                    memory[chunk.end] = max(memory[chunk.end], highest)
        return memory

    def peak_bytes(self, options: tuple[Option, ...]) -> int:
        """Highest allocated bytes of the step under a plan."""
        return int(self.memory(options).max())

    def _over_time(self, number: int, option: Option) -> tuple[np.ndarray, np.ndarray]:
        if (number, option) not in self._curves:
            times = len(self.profile.base)
            if option.slices == 1:
                curves = _over_time(self.segments[number], option.level, times)
            else:
                after = np.zeros(times, np.int64)
                for chunk in self._chunks:
                    if not chunk.holds(number):
                        continue
                    inside = slice(chunk.start, chunk.end)
                    if chunk.direction == "forward":
                        after[inside] = option.kept_forward
                    elif chunk.direction == "loss" and len(option.kept_loss) == chunk.end - chunk.start:
                        after[inside] = option.kept_loss
                    else:
                        after[inside] = option.kept
                curves = after, after
            self._curves[number, option] = curves
        return self._curves[number, option]

    def solve(self, budget_bytes: int) -> Solution | None:
        """The fastest plan whose peak is within the budget; None if there is none."""
        found, overshot = self._search(budget_bytes)
        if found is None and overshot:  # the search may have missed plans that exist
            self.smallest_peak()
            fitting = [plan for plan in self._found if plan.peak_bytes <= budget_bytes]
            found = min(fitting, key=lambda plan: plan.seconds, default=None)
        return found

    def _search(self, budget_bytes: int) -> tuple[Solution | None, bool]:
        """A plan within the budget, and whether some plan of `_best` turned out to be above it.

        Networks with branches hold more than `_best` assumes.  Then it is asked for a smaller limit, between
        the largest limit without a plan and the smallest whose plan exceeds the budget.
        """
        peak = self.peak_bytes(self._plain)
        if peak <= budget_bytes:
            return Solution(self._plain, peak, 0.0, 0.0), False
        limit = above = budget_bytes
        below, overshot = 0, False
        for _ in range(_SEARCHES):
            found = self._best(limit, np.ceil)
            if found is None:
                below, lower = limit, 0
            else:
                peak = self.peak_bytes(found)
                if peak <= budget_bytes:
                    seconds = sum(option.seconds for option in found)
                    bound = self._best(budget_bytes, np.floor)
                    bound_seconds = min(seconds, sum(option.seconds for option in bound))
                    self._found.append(Solution(found, peak, seconds, bound_seconds))
                    return self._found[-1], overshot
                above, overshot = limit, True
                lower = limit - (peak - budget_bytes)
            if not overshot or above - below <= 1:
                break
            limit = lower if lower > below else (below + above) // 2
        return None, overshot

    def smallest_peak(self) -> int:
        """The smallest budget with a plan, to one part in a thousand."""
        if self._smallest is None:
            low, high = 0, int(self.profile.base.max())
            while self._search(high)[0] is None:
                low, high = high, 2 * high
            while high - low > high / 1000:
                middle = (low + high) // 2
                if self._search(middle)[0] is None:
                    low = middle
                else:
                    high = middle
            self._smallest = high
        return self._smallest

    def _best(self, budget_bytes: int, rounding) -> tuple[Option, ...] | None:
        """Dynamic programme over the bytes that the segments so far keep, counted in cells."""
        most = sum(max(option.kept for option in options) for options in self.options)
        cell = max(1, most // _CELLS)
        for chunk in self._chunks:
            if chunk.direction == "optimizer" and chunk.of(self.profile.base).max() > budget_bytes:
                return None
        seconds = np.full(_CELLS + 2 * len(self.segments) + 1, np.inf)
        seconds[0] = 0.0
        choices = []
        for options, own in zip(self.options, self._own):
            best, choice = np.full_like(seconds, np.inf), np.zeros(len(seconds), np.int16)
            for number, option in enumerate(options):
                shift = int(rounding(option.kept / cell))
                count = min((budget_bytes - own[number]) // cell + 1, len(seconds) - shift)
                if count > 0:
                    reached = seconds[:count] + option.seconds
                    better = reached < best[shift : shift + count]
                    best[shift : shift + count][better] = reached[better]
                    choice[shift : shift + count][better] = number
            seconds = best
            choices.append(choice)
        loss = next(chunk for chunk in self._chunks if chunk.direction == "loss")
        count = (budget_bytes - int(loss.of(self.profile.base).max())) // cell + 1
        if count <= 0 or not np.isfinite(seconds[:count]).any():
            return None
        place = int(np.argmin(seconds[:count]))
        found: list[Option] = []
        for choice, options in zip(reversed(choices), reversed(self.options)):
            found.insert(0, options[int(choice[place])])
            place -= int(rounding(found[0].kept / cell))
        return tuple(found)


def _options(
    profile: Profile,
    number: int,
    segment: Segment,
    slices: int,
    op_seconds: Callable[[OpCost], float],
    whole_seconds: float | None = None,
) -> list[Option]:
    """The levels of one segment of a profile, with their memory."""
    seconds = [op_seconds(op) for op in segment.ops]
    # Operators on slices may be less efficient, in the forward pass and twice that in the backward pass.
    slower = 0.0 if whole_seconds is None else 3 * max(0.0, sum(seconds) - whole_seconds)
    return [
        _option(profile, number, segment, slices, level, level.seconds + slower)
        for level in menu(segment, seconds)
    ]


def _option(
    profile: Profile, number: int, segment: Segment, slices: int, level: Level, seconds: float
) -> Option:
    """One level with its memory."""
    chunks = _chunks(profile)
    forward = next(c for c in chunks if (c.direction, c.segment) == ("forward", number))
    backward = next((c for c in chunks if (c.direction, c.segment) == ("backward", number)), None)
    loss = next(c for c in chunks if c.direction == "loss")
    after, highest = _over_time(segment, level, len(profile.base))
    between = after[forward.end : (backward or loss).start]
    return Option(
        segment,
        slices,
        level,
        seconds,
        int(between.max(initial=int(after[forward.end]))),
        int((np.array(segment.before) + forward.of(highest)).max()),
        0 if backward is None else int((np.array(segment.during) + backward.of(highest)).max()),
        int(after[forward.end : loss.start + 1].max()),
        after[loss.start : loss.end].copy(),
    )


def _over_time(segment: Segment, level: Level, times: int) -> tuple[np.ndarray, np.ndarray]:
    """A level's bytes in addition to the base, after each time and at most during it."""
    if not segment.times:
        return np.zeros(times, np.int64), np.zeros(times, np.int64)
    last_event = np.searchsorted(segment.times, np.arange(times), side="right") - 1
    after = np.where(last_event >= 0, level.after[last_event], 0)
    highest = after.copy()
    np.maximum.at(highest, segment.times, level.highest)
    return after, highest
