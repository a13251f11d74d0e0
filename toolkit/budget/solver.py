"""Which level each segment runs at: the least time for which no moment of the step exceeds the budget.

A step is a chain of segments, run forward and then backward.  While segment i runs, in either direction,
what the segments before it keep is there, and what those behind it kept is not, or not any more.  So a
level of i, by its own highest moment, limits the sum of the bytes that the segments before it keep, and a
dynamic programme over that sum finds the optimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from toolkit.budget.levels import Level, Segment, menu, segments_of
from toolkit.budget.profile import OpCost, Profile

_CELLS = 8192  # of the table; a cell is this share of what a plan that recomputes nothing keeps


@dataclass(frozen=True)
class Solution:
    """A level for each segment.  `bound_seconds`: no choice of levels within the budget takes less."""

    levels: tuple[int, ...]
    peak_bytes: int
    seconds: float  # of recomputation
    bound_seconds: float


class Chain:
    """All plans of one profiled step."""

    def __init__(self, profile: Profile, op_seconds: Callable[[OpCost], float]):
        self.profile = profile
        self.segments = segments_of(profile)
        menus: dict[tuple, list[Level]] = {}
        self.menus: list[list[Level]] = []
        for segment in self.segments:
            kind = segment.kind
            if kind not in menus:
                menus[kind] = menu(segment, [op_seconds(op) for op in segment.ops])
            self.menus.append(menus[kind])
        self._extras = [
            [_over_time(segment, level, len(profile.base)) for level in levels]
            for segment, levels in zip(self.segments, self.menus)
        ]
        self._summarize()

    def _summarize(self) -> None:
        """Per segment and level: bytes kept between its forward and backward pass, its highest moment."""
        base, profile = self.profile.base, self.profile
        starts = [*profile.entered, profile.forward_end]
        backward: dict[int, int] = {}  # segment -> when its backward pass begins
        for time, kind, index in profile.events:
            if kind == "unpack":
                backward.setdefault(profile.saved[index].segment, time)
        self._loss = slice(profile.forward_end, min(backward.values(), default=len(base)) + 1)
        ends = dict(zip(sorted(backward.values()), [*sorted(backward.values())[1:], len(base)]))
        self._kept, self._own = [], []
        for number, extras in enumerate(self._extras):
            own = [slice(starts[number], starts[number + 1] + 1)]
            if number in backward:
                own.append(slice(backward[number], ends[backward[number]] + 1))
            between = slice(starts[number + 1], backward.get(number, profile.forward_end + 1))
            self._kept.append([int(after[between].max()) for after, _ in extras])
            self._own.append([max(int((base[s] + high[s]).max()) for s in own) for _, high in extras])

    def memory(self, levels: tuple[int, ...]) -> np.ndarray:
        """Highest allocated bytes at each time of the step under a plan."""
        return self.profile.base + sum(extra[level][1] for extra, level in zip(self._extras, levels))

    def seconds(self, levels: tuple[int, ...]) -> float:
        """Time of recomputation under a plan."""
        return sum(menu[level].seconds for menu, level in zip(self.menus, levels))

    def solve(self, budget_bytes: int) -> Solution | None:
        """The fastest plan whose peak is within the budget; None if there is none."""
        limit = budget_bytes
        for _ in range(8):
            found = self._best(limit, rounding=np.ceil)
            if found is None:
                return None
            levels, seconds = found
            peak = int(self.memory(levels).max())
            if peak <= budget_bytes:
                bound = self._best(budget_bytes, rounding=np.floor)[1]
                return Solution(levels, peak, seconds, min(bound, seconds))
            limit -= peak - budget_bytes  # branches that are no chain keep longer than assumed
        return None

    def smallest_budget(self, within_bytes: int = 1 << 16) -> int:
        """The smallest budget, up to `within_bytes`, that a plan exists for."""
        low, high = 0, int(self.memory(tuple(len(menu) - 1 for menu in self.menus)).max())
        while self.solve(high) is None:
            low, high = high, 2 * high
        while high - low > within_bytes:
            middle = (low + high) // 2
            solution = self.solve(middle)
            if solution is None:
                low = middle
            else:
                high = solution.peak_bytes
        return high

    def _best(self, budget_bytes: int, rounding) -> tuple[tuple[int, ...], float] | None:
        cell = max(1, sum(max(kept) for kept in self._kept) // _CELLS)
        if int(self.profile.base[self.profile.optimizer_start :].max()) > budget_bytes:
            return None
        seconds = np.full(_CELLS + 2 * len(self.segments), np.inf)
        seconds[0] = 0.0
        came_from = []
        for menu, kept, own in zip(self.menus, self._kept, self._own):
            best, choice = np.full_like(seconds, np.inf), np.zeros(len(seconds), np.int16)
            for number, level in enumerate(menu):
                allowed = (budget_bytes - own[number]) // cell + 1  # cells that earlier segments may fill
                shift = int(rounding(kept[number] / cell))
                count = min(allowed, len(seconds) - shift)
                if count <= 0:
                    continue
                reached = seconds[:count] + level.seconds
                better = reached < best[shift : shift + count]
                best[shift : shift + count][better] = reached[better]
                choice[shift : shift + count][better] = number
            seconds = best
            came_from.append(choice)
        allowed = (budget_bytes - int(self.profile.base[self._loss].max())) // cell + 1
        if allowed <= 0 or not np.isfinite(seconds[:allowed]).any():
            return None
        place = int(np.argmin(seconds[:allowed]))
        total = float(seconds[place])
        levels = []
        for choice, kept in zip(reversed(came_from), reversed(self._kept)):
            number = int(choice[place])
            levels.append(number)
            place -= int(rounding(kept[number] / cell))
        return tuple(reversed(levels)), total


def _over_time(segment: Segment, level: Level, times: int) -> tuple[np.ndarray, np.ndarray]:
    """A level's bytes beyond the base at every time: at its end, and at most."""
    if not segment.times:
        return np.zeros(times, np.int64), np.zeros(times, np.int64)
    last_event = np.searchsorted(segment.times, np.arange(times), side="right") - 1
    after = np.where(last_event >= 0, level.after[last_event], 0)
    highest = after.copy()
    np.maximum.at(highest, segment.times, level.highest)
    return after, highest
