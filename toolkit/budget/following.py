"""Following a plan through a step of a training loop, which may have several forward passes."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch.utils._pytree import tree_iter

from toolkit.budget.own_checkpoints import NOTE, own_checkpoints_off
from toolkit.budget.plan import Plan, Planner
from toolkit.budget.recording import Watch, modes_left
from toolkit.budget.tape import Op, Tape, operator_name
from toolkit.errors import InputError

_GROWTH = 1.25  # sizes that keep growing are planned for in advance


@dataclass(frozen=True)
class Call:
    """What the profile of a forward pass depends on: shapes, and all else.

    `accumulates`: whether there are gradients, to which the backward pass adds.
    """

    state: tuple
    accumulates: bool
    shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    @staticmethod
    def of(state: tuple, accumulates: bool, inputs) -> Call:
        """The call of a model in this state on a nest of tensors and other arguments."""
        leaves = list(tree_iter(inputs))
        flags = tuple(leaf for leaf in leaves if isinstance(leaf, bool | str | None))
        shapes = tuple((t.dtype, tuple(t.shape)) for t in leaves if isinstance(t, torch.Tensor))
        return Call((*state, flags), accumulates, shapes)

    def like(self, other: Call) -> bool:
        """Whether the same operators run, as far as can be told: only sizes differ."""
        return (
            self.state == other.state
            and len(self.shapes) == len(other.shapes)
            and all(
                dtype == kind and len(shape) == len(size)
                for (dtype, shape), (kind, size) in zip(self.shapes, other.shapes)
            )
        )

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def grown(self, others: Iterable[Call]) -> Call:
        """A call that also covers somewhat larger ones: of sizes that exceed those of all the others."""
        known = [other.shapes for other in others]

        def size(tensor: int, dim: int, now: int) -> int:
            exceeds = dim > 0 and all(now > shapes[tensor][1][dim] for shapes in known)
            return math.ceil(_GROWTH * now) if exceeds else now

        shapes = tuple(
            (dtype, tuple(size(tensor, dim, now) for dim, now in enumerate(shape)))
            for tensor, (dtype, shape) in enumerate(self.shapes)
        )
        return replace(self, shapes=shapes)

    def covers(self, other: Call) -> bool:
        """Whether a plan for this call holds for the other one, whose tensors are no larger."""
        return (
            self.like(other)
            and self.accumulates >= other.accumulates
            and all(
                n >= m
                for (_, shape), (_, size) in zip(self.shapes, other.shapes)
                for n, m in zip(shape, size)
            )
        )


class PlannedStep:
    """A step with these forward passes, and its plans.

    In its profile are `state_bytes` of optimizers, and tensors of the loop of the sizes `seen`;
    `outside_bytes` are known to be there besides.  `ran`: it has begun under a plan.
    """

    def __init__(
        self,
        calls: tuple[Call, ...],
        planner: Planner,
        state_bytes: int,
        micro_batches: bool | int = False,
        seen: Iterable[int] = (),
    ):
        self.calls, self.planner = calls, planner
        self.state_bytes, self.micro_batches = state_bytes, micro_batches
        self.seen, self.outside_bytes = list(seen), 0
        self.ran = False
        self._least: Plan | None = None
        self._inside: dict[tuple[int, int, int], Plan] = {}
        self._plans: dict[tuple[int, int], Plan | str] = {}  # the latest few, or why there is none

    def plan(self, budget_bytes: int, reserve_bytes: int) -> Plan:
        """The fastest plan.  Raises `InputError` if there is none."""
        key = budget_bytes, reserve_bytes
        if key not in self._plans:
            try:
                with modes_left():
                    made = self.planner.plan(*key, micro_batches=self.micro_batches)
            except InputError as error:
                made = str(error)  # the error itself would keep all that its callers hold, such as the batch
            self._plans = {**dict(list(self._plans.items())[-3:]), key: made}
        if isinstance(self._plans[key], str):
            raise InputError(self._plans[key])
        return self._plans[key]

    def least(self, budget_bytes: int, reserve_bytes: int) -> Plan:
        """The plan that keeps the least, whether or not it fits."""
        key = budget_bytes, reserve_bytes
        if self._least is None or (self._least.budget_bytes, self._least.reserve_bytes) != key:
            with modes_left():
                self._least = self.planner.least(*key)
        return self._least

    def inside(self, budget_bytes: int, reserve_bytes: int, spare_bytes: int) -> Plan:
        """A plan that keeps at most `spare_bytes` more than the least, which its surroundings count on."""
        key = budget_bytes, reserve_bytes, spare_bytes
        if key not in self._inside:
            self._inside = {key: self._plan_inside(*key)}
        return self._inside[key]

    def _plan_inside(self, budget_bytes: int, reserve_bytes: int, spare_bytes: int) -> Plan:
        least = self.least(budget_bytes, reserve_bytes)
        for more in (spare_bytes, spare_bytes // 2, spare_bytes // 4):
            limit = min(least.peak_bytes + more, budget_bytes - reserve_bytes)
            with contextlib.suppress(InputError):
                plan = self.plan(budget_bytes, budget_bytes - limit)
                kept, needed = (sum(option.kept for option in each.options) for each in (plan, least))
                if kept - needed <= spare_bytes and all(option.slices == 1 for option in plan.options):
                    return plan
        return least


class _WatchedTape(Tape):
    """Tells a watch when the backward pass begins to need the tape."""

    def __init__(self, decide: Callable, watch: Watch):
        super().__init__(decide)
        self._watch = watch

    def unpack(self, held):
        self._watch.backward_asks()
        return super().unpack(held)


class Follower:
    """Runs the forward passes of a step under a plan, as long as their operators match its profile.

    `watches`: the step is watched.  `taped`: it is seen to wait for its backward pass even where the plan
    keeps everything.  `inside`: it runs inside the step of another model, which is planned.  `spare_bytes`:
    what the plan leaves of the budget for other models whose steps run inside this one, if it knows of them.
    `pauses`: nothing is recorded in segments that recompute nothing.
    """

    def __init__(
        self,
        calls: tuple[Call, ...],
        plan: Plan,
        watches: Callable[[Callable[[], bool]], Watch] | None = None,
        *,
        taped: bool = False,
        inside: bool = False,
        spare_bytes: int = 0,
        pauses: bool = True,
    ):
        self.calls, self.plan = calls, plan
        self.watch = None if watches is None else watches(lambda: self.waits_for_backward)
        self.options, self.names = plan.options, plan.segments
        self.kept_bytes = 0  # by the segments that have run
        self.departures = 0  # segments that did not run as profiled; nothing was dropped there
        self.passes = 0
        self._segment = self._op = 0
        self._departed = False
        self._graphs: list[weakref.ref[Tape]] = []
        self.inside, self.spare_bytes = inside, spare_bytes
        self._tape: Tape | None = None  # that of the forward pass that is running
        # Steps that wait for their backward pass are known by the tapes that their graphs hold.
        self._pauses = pauses and watches is None and len(calls) == 1 and not plan.keeps_everything
        self._pauses &= not any(option.segment.writes_elsewhere for option in self.options)
        self.unchanged = plan.keeps_everything and watches is None and not taped

    @property
    def slices(self) -> dict[str, int]:
        """Block -> number of slices of its batch."""
        return {name: option.slices for name, option in zip(self.names, self.options) if option.slices > 1}

    @property
    def waits_for_backward(self) -> bool:
        """Whether a backward pass has not released all that it needs, as far as a tape has seen it."""
        return any(graph() is not None for graph in self._graphs)

    def expects(self, call: Call) -> bool:
        """Whether the plan has this forward pass as its next."""
        return self.passes < len(self.calls) and self.calls[self.passes].covers(call)

    def add(self, call: Call, plan: Plan) -> None:
        """Follow `plan` in a forward pass that comes next in this step."""
        self.calls = (*self.calls[: self.passes], call)
        self.options = (*self.options[: self._segment], *plan.options)
        self.names = (*self.names[: self._segment], *plan.segments)
        self.unchanged = self._pauses = False

    @torch.compiler.disable(recursive=False)  # a forward that keeps everything may be compiled
    def run(self, forward: Callable, *args, **kwargs):
        """Run the next forward pass of the step."""
        self.passes += 1
        if self.unchanged and NOTE not in self.plan.notes:
            return forward(*args, **kwargs)
        return self._run_taped(forward, args, kwargs)

    @torch.compiler.disable
    def _run_taped(self, forward: Callable, args: tuple, kwargs: dict):
        if self.unchanged:
            with own_checkpoints_off():
                return forward(*args, **kwargs)
        if self.watch is None:
            tape = Tape(self.decide, self.passes_unrecorded)
        else:
            tape = _WatchedTape(self.decide, self.watch)
        self._graphs.append(weakref.ref(tape))
        self._tape = tape
        watched = contextlib.nullcontext() if self.watch is None else self.watch.forward((args, kwargs))
        try:
            with watched, tape:
                self._turn()
                return forward(*args, **kwargs)
        finally:
            self._tape = None
            tails = itertools.count(self._segment)
            last = next(n for n in tails if n >= len(self.names) or not self.names[n])
            while self._segment <= last:
                self.block_ended("", (), {}, None)

    def block_ended(self, name: str, args: tuple, kwargs: dict, output) -> None:
        """Go on to the next segment."""
        if self._segment < len(self.options):
            self.kept_bytes += self.options[self._segment].kept
        self._segment += 1
        self._op, self._departed = 0, False
        self._turn()

    def _turn(self) -> None:
        """Record the next segment only if it recomputes something."""
        if self._tape is None or not self._pauses:
            return
        if self._segment < len(self.options) and not self.options[self._segment].recorded:
            self._tape.pause()
        elif not self._tape.resume():
            self._departed = True
            self.departures += 1

    def passes_unrecorded(self, func: Callable) -> bool:
        """Whether the next operator is `func`, and its results are not recomputed; see `Tape`."""
        if self._departed or self._segment >= len(self.options):
            return False
        passing = self.options[self._segment].passing
        if self._op < len(passing) and passing[self._op] == operator_name(func):
            self._op += 1
            return True
        return False

    def decide(self, op: Op, contents: dict) -> list[str] | None:
        """The decisions for the outputs of an operator; see `Tape`."""
        if self._departed or self._segment >= len(self.options):
            return None
        option = self.options[self._segment]
        ops = option.segment.ops
        if self._op >= len(ops) or ops[self._op].name != operator_name(op.func) or (
            len(ops[self._op].outputs) != len(op.outputs)
        ):  # fmt: skip
            self._departed = True
            self.departures += 1
            return None
        outputs = ops[self._op].outputs
        self._op += 1
        first = option.segment.first_buffer
        return [option.level.decisions[buffer - first] for buffer in outputs]
