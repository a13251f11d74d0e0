"""Peers that search for the chain's plan with the fewest recomputed FLOPs: `whole_blocks` and `rotor`.

Both predict peaks from the chain's profile and give only plans that a step confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from peers_chains import DROPPED, KEPT, Plan, Profile, cell_of
from peers_step import PeerResult, StepCost, nothing, result_of, smallest_note

VERIFICATIONS = 4  # runs that a search may spend on one budget
ROTOR_SLOTS = 16384  # of the dynamic programme's byte grid


def whole_blocks(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """The set of checkpointed blocks with the fewest recomputed FLOPs, from a model of the peak."""
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        find = _BlockSets(cell.profile(chain))
        return _verified("whole_blocks", budgets, find, lambda plan: cell.run(chain, plan).cost)


def rotor(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Optimal nested checkpoints of a chain, after Beaumont et al. 2019 (arXiv 1911.13214).

    Stages are blocks, of timm's ViTs half blocks.  A group of stages may share a checkpoint where their
    blocks follow each other with nothing in between.
    """
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=True)
        find = _NestedGroups(cell.profile(chain), chain.linked)
        return _verified("rotor", budgets, find, lambda plan: cell.run(chain, plan).cost)


def _verified(
    peer: str,
    budgets: Sequence[int],
    find: _BlockSets | _NestedGroups,
    measure: Callable[[Plan], StepCost],
) -> list[PeerResult]:
    """The best plan for each budget that a step confirmed.

    Where a step shows more than the search foresaw, the search gets that much less until it finds
    something else, for at most `VERIFICATIONS` plans.
    """
    results = []
    for budget in budgets:
        cost = _first_that_holds(budget, find, measure)
        results += (
            [result_of(peer, budget, cost)]
            if cost
            else nothing(peer, [budget], smallest_note(measure(find.smallest())))
        )
    return results


def _first_that_holds(
    budget: int, find: _BlockSets | _NestedGroups, measure: Callable[[Plan], StepCost]
) -> StepCost | None:
    target, tried = budget, set()
    while len(tried) < VERIFICATIONS and (plan := find(target)):
        tried.add(plan)
        cost = measure(plan)
        if cost.peak_bytes <= budget:
            return cost
        while find(target) in tried:
            target -= cost.peak_bytes - budget
    return None


class _BlockSets:
    """Which blocks to checkpoint one by one.

    Before block i runs, in either direction, a step holds what blocks 0..i-1 keep; the rest is as in
    whichever of the profile's two steps treats block i alike.  So both peaks of block i are known for
    any plan from the kept bytes before it.  Those differ between the directions: under autocast the
    forward pass also holds the cast weights of checkpointed blocks.

    Exact for all 16 plans of demo_vit (full, bitfit, lora, linear; fp32, bf16); up to 3 % off for
    resnet18 (whose blocks end in an activation that the next block saves too: likely the cause).
    """

    def __init__(self, profile: Profile):
        self.profile = profile
        self.forward_savings = np.diff(profile.enter[KEPT] - profile.enter[DROPPED])
        self.backward_savings = np.diff(profile.back[KEPT] - profile.back[DROPPED], prepend=0)
        # Peaks at block i if every block before it is checkpointed.
        before = np.cumsum(self.forward_savings) - self.forward_savings
        self.forward_needs = profile.forward_peak - np.outer([1, 0], before)
        before = np.cumsum(self.backward_savings) - self.backward_savings
        self.backward_needs = profile.backward_peak - np.outer([1, 0], before)

    def __call__(self, budget: int) -> Plan | None:
        """The plan with the fewest recomputed FLOPs; None if none fits."""
        if self.profile.stem_peak > budget:
            return None
        # Recomputed FLOPs, kept bytes in the forward and in the backward pass -> plan.
        states: dict[tuple[int, int, int], Plan] = {(0, 0, 0): ()}
        for i, recomputed in enumerate(self.profile.recompute_flops):
            following = {}
            for (flops, forward, backward), plan in states.items():
                for way, item in ((KEPT, i), (DROPPED, (i,))):
                    if forward + self.forward_needs[way, i] > budget:
                        continue
                    if backward + self.backward_needs[way, i] > budget:
                        continue
                    if way == KEPT:
                        kept = self.forward_savings[i], self.backward_savings[i]
                        state = flops, forward + kept[0], backward + kept[1]
                    else:
                        state = flops + recomputed, forward, backward
                    following[state] = (*plan, item)
            states = _undominated(following)
        head = self.profile.head_peak[DROPPED]
        return next((plan for (_, _, kept), plan in states.items() if kept + head <= budget), None)

    def smallest(self) -> Plan:
        """The plan with the lowest peak."""
        low, high = 0, self.profile.kept_peak
        while high - low > 512:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle) else (middle, high)
        return self(high)


def _undominated(states: dict[tuple[int, int, int], Plan]) -> dict[tuple[int, int, int], Plan]:
    """Sorted, without states that another, cheaper in FLOPs, also undercuts in bytes."""
    left, leanest = {}, (math.inf, math.inf)
    for state in sorted(states):
        _, forward, backward = state
        if forward >= leanest[0] and backward >= leanest[1]:
            continue
        left[state] = states[state]
        if backward < leanest[1]:
            leanest = forward, backward
    return left


class _NestedGroups:
    """Which groups of stages to checkpoint, and which groups inside them when they run again.

    `C(s, end)[m]` is the least recomputation, in FLOPs, for stages s..end-1 with m slots of memory above
    what is live when stage s is entered: either stage s is kept, or stages s..r are dropped and later
    run again by the best plan for them (Beaumont et al. 2019, theorem 1; here transient bytes are
    measured).  The outermost chain ends in the head and runs for the first time, which is no
    recomputation; within a group, gradients are alive while stages run again.
    """

    def __init__(self, profile: Profile, linked: list[bool]):
        self.profile, self.linked = profile, linked
        self.stages = len(linked)
        self.top = self.stages + 1  # as `end`: the whole chain with the head
        self.base = int(profile.enter[DROPPED, 0])
        self.slot_bytes = math.ceil(1.25 * (profile.kept_peak - self.base) / ROTOR_SLOTS)
        self.slots = np.arange(ROTOR_SLOTS + 1)
        self.tables: dict[tuple[int, int], np.ndarray] = {}
        for length in range(1, self.stages + 1):
            for s in range(self.stages - length + 1):
                if all(linked[s : s + length - 1]):
                    self.tables[s, s + length] = self._table(s, s + length)
        head = self._in_slots(profile.head_peak[DROPPED] - profile.enter[DROPPED, -1])
        self.tables[self.stages, self.top] = np.where(self.slots >= head, 0.0, np.inf)
        for s in reversed(range(self.stages)):
            self.tables[s, self.top] = self._table(s, self.top)

    def __call__(self, budget: int) -> Plan | None:
        """The plan with the fewest recomputed FLOPs in this model; None if none fits."""
        slots = min((budget - self.base) // self.slot_bytes, ROTOR_SLOTS)
        if self.profile.stem_peak > budget or slots < 0 or np.isinf(self.tables[0, self.top][slots]):
            return None
        return self._plan(0, self.top, slots)

    def smallest(self) -> Plan:
        """The plan with the lowest peak in this model."""
        return self._plan(0, self.top, int(np.isfinite(self.tables[0, self.top]).argmax()))

    def _in_slots(self, count: float) -> int:
        return math.ceil(count / self.slot_bytes)

    def _options(self, s: int, end: int) -> Iterator[tuple[int | None, np.ndarray, int]]:
        """(last stage of a dropped group, or None; FLOPs by slots; slots that stay occupied after it)."""
        p, first_run = self.profile, end == self.top
        enter, rerun = p.enter[DROPPED], 0 if first_run else 1
        gradients = 0 if first_run else p.back[DROPPED, end - 1] - enter[end - 1]
        if not first_run and end - s == 1:
            need = max(p.forward_peak[DROPPED, s], p.backward_peak[DROPPED, s]) - enter[s]
            yield None, self._flops(need, p.recompute_flops[s]), 0
            return
        need = max(p.forward_peak[KEPT, s] + gradients, p.backward_peak[KEPT, s]) - p.enter[KEPT, s]
        stays = self._in_slots(p.enter[KEPT, s + 1] - p.enter[KEPT, s])
        yield None, self._flops(need, rerun * p.forward_flops[s]) + self._less(s + 1, end, stays), stays
        need, flops, held = 0.0, 0, 0
        for r in range(s, self.stages if first_run else end - 1):
            need = max(need, p.forward_peak[DROPPED, r] - enter[r] + held + gradients)
            flops += rerun * p.forward_flops[r]
            held = enter[r + 1] - enter[r]
            stays = self._in_slots(held)
            again = self.tables[s, r + 1]
            yield r, self._flops(need, flops) + self._less(r + 1, end, stays) + again, stays
            if not self.linked[r]:
                return

    def _flops(self, need_bytes: float, flops: int) -> np.ndarray:
        return np.where(self.slots >= self._in_slots(need_bytes), float(flops), np.inf)

    def _less(self, s: int, end: int, occupied: int) -> np.ndarray:
        """C(s, end) by the slots there were before `occupied` of them were filled."""
        left = self.slots - occupied
        return np.where(left < 0, np.inf, self.tables[s, end][np.clip(left, 0, ROTOR_SLOTS)])

    def _table(self, s: int, end: int) -> np.ndarray:
        return np.min([flops for _, flops, _ in self._options(s, end)], axis=0)

    def _plan(self, s: int, end: int, slots: int) -> Plan:
        plan = []
        while s < min(end, self.stages):
            last, _, occupied = min(self._options(s, end), key=lambda option: option[1][slots])
            plan.append(s if last is None else self._plan(s, last + 1, slots))
            s = s + 1 if last is None else last + 1
            slots = min(slots - occupied, ROTOR_SLOTS)
        return tuple(plan)
