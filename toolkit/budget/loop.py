"""Decides what each step of a training loop runs under, from what is there when the step begins.

A step is all forward passes up to the backward pass that releases their graphs.  Its plan comes from a
profile on fake tensors, as long as the step has one forward pass that runs as it did there.  Otherwise a real
step is recorded (`recording`), and the plan for the following ones comes from that.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._pytree import tree_iter, tree_map_only

from toolkit.budget.following import Call, Follower, PlannedStep
from toolkit.budget.integers import described
from toolkit.budget.memory import format_bytes, rounded, tensors_of
from toolkit.budget.plan import Plan, Planner
from toolkit.budget.profile import state_bytes_of
from toolkit.budget.recording import Recording, Watch, modes_left
from toolkit.budget.step import split_batch, tensors_in
from toolkit.budget.tape import storage_key
from toolkit.budget.watching import Census, is_compiled, is_inside_compiled
from toolkit.errors import InputError

_PLANS = 8  # kept for one model: another call takes the place of the one that has not been used for longest
_TOLERANCE = 0.005  # of the peak: a step that takes more than predicted is not what was profiled
_LOOKS = 16  # at what a loop holds, at most, if no optimizer steps
_RECORDINGS = 3  # of one call; a path that still differs then differs in every step


class Loop:
    """The steps of a loop that trains `model` within a budget.

    `settings`: options of `Planner`.  `micro_batches`: the caller runs one forward pass at a time, in
    micro-batches as the plan says.  `held`, `held_bytes`: tensors that the loop holds besides, and the bytes
    of others.  `ddp`: the wrapper of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        budget_bytes: int,
        batch,
        *,
        reserve_bytes: int,
        micro_batches: bool | int,
        held: Iterable[torch.Tensor] = (),
        held_bytes: int = 0,
        ddp: nn.parallel.DistributedDataParallel | None = None,
        settings: dict,
    ):
        self.model, self.budget_bytes, self.reserve_bytes = model, budget_bytes, reserve_bytes
        self.device = next(model.parameters()).device
        self._modules = list(model.modules())  # walking through them takes as long as some operators
        self.ddp, self._bucket_bytes = ddp, 0
        self.batch = None if batch is None else without_memory(batch, self.device)
        self.micro_batches = micro_batches
        own = {storage_key(t) for t in tensors_of(model)}
        sizes = {storage_key(t): t.untyped_storage().nbytes() for t in held if t.device == self.device}
        tensors_bytes = sum(rounded(size) for key, size in sizes.items() if key not in own)
        self._held, self._held_bytes = [weakref.ref(tensor) for tensor in held], held_bytes
        self.settings = {**settings, "held_bytes": held_bytes + tensors_bytes}
        self._known: list[PlannedStep] = []  # the latest used last
        self._recordings: dict[Call, int] = {}  # how often the step that begins with a call was recorded
        self._to_record: set[Call] = set()
        self._one_forward = bool(micro_batches)  # whether steps are known to have one forward pass
        self._now = threading.local()
        self._census: Census | None = None
        self._end_census: Callable = lambda: None
        self._looks = 0  # at the beginning of steps, since the first or a recorded one
        self._outside_bytes = 0  # as last seen
        self._told = self._told_between = False
        self.optimizers: weakref.WeakSet = weakref.WeakSet()
        self.state_bytes = 0  # of the optimizers that have made a step
        self._stepped = False  # an optimizer, since then
        itself = weakref.ref(self)
        self._hook = register_optimizer_step_post_hook(lambda optimizer, *_: _seen(itself(), optimizer))
        self.plan: Plan | None = None  # the latest
        self.replans = 0
        self.departures = 0
        self.inside = 0  # steps that ran inside that of another model

    def close(self) -> None:
        """Stop watching the loop."""
        self._hook.remove()
        if self._watching is not None:
            self._watching.stop()
        self._end_census()
        self._now.step = None

    def pause(self) -> None:
        """Watch nothing that runs without gradients after a step."""
        if self._watching is not None:
            self._watching.pause()

    @property
    def _watching(self) -> Watch | None:
        """What watches the present step of this thread."""
        return self.now if isinstance(self.now, Recording) else getattr(self.now, "watch", None)

    @property
    def now(self) -> Follower | Recording | None:
        """What the present step of this thread runs under."""
        return getattr(self._now, "step", None)

    @property
    def waits(self) -> bool:
        """Whether a step of this thread waits for its backward pass."""
        return self.now is not None and self.now.waits_for_backward

    def call_of(self, inputs, precision: str, accumulates: bool | None = None) -> Call:
        """The call of the model on `inputs`, in its present state."""
        parameters = [p for module in self._modules for p in module._parameters.values() if p is not None]
        trained = [p for p in parameters if p.requires_grad]
        if self.micro_batches:  # whose profiles know of the gradients of earlier ones
            accumulates = False
        elif accumulates is None:
            accumulates = any(p.grad is not None for p in trained)
        buckets = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) or self.ddp
        if buckets is not None:  # gradients are copied to them, or are views of them
            accumulates |= buckets.gradient_as_bucket_view
            self._bucket_bytes = sum(
                rounded(p.nbytes) for p in trained if not buckets.gradient_as_bucket_view
            )
        flags = tuple(p.requires_grad for p in parameters)
        return Call.of((precision, self.model.training, flags), accumulates, inputs)

    def plan_ahead(self, precision: str, accumulates: bool) -> None:
        """Plan for the batch.  Raises `InputError` if nothing fits."""
        inputs = split_batch(self.batch)[0]
        step = self._on_fakes(self.call_of(inputs, precision, accumulates), self.batch)
        self.plan = self._plan_of(step)
        self._keep(step)

    def plan_again(self) -> None:
        """Plan for another reserve.  Raises `InputError` if nothing fits."""
        if self._known:
            self.plan = self._plan_of(self._known[-1])
            self.replans += 1

    def begin(
        self, inputs, precision: str, wait: Callable[[], None], others: Iterable[Loop] = ()
    ) -> Follower | Recording:
        """What a forward pass on `inputs` runs under; `wait()` is called before planning.

        If a step of one of the `others` waits for its backward pass, this one runs inside it, and is part of
        what is planned there: it keeps what that one can spare.  Raises `InputError` if nothing fits.
        """
        call, now = self.call_of(inputs, precision), self.now
        if self.waits and not self.micro_batches:
            if not now.expects(call):
                self._add(now, call, inputs)
            return now
        self._now.step = None
        if now is not None:
            self._learn(now)
        step = self._find(call)
        around = [other.now for other in others if other.waits]
        inside = bool(around)
        records = call in self._to_record and not (inside and step)
        if step is None and not records:
            wait()
            step = self._plan_for(call, inputs)
        records |= step is None
        # What watches a step is underneath the loop, where compiled code cannot run.
        compiled = (inside_compiled := is_inside_compiled()) or any(map(is_compiled, self._modules))
        if records and inside_compiled:
            raise InputError(
                f"no step of a compiled {type(self.model).__name__} can be recorded: give auto_checkpoint a "
                "batch, with which it can be planned in advance, or compile its blocks instead."
            )
        if self.device.type == "cpu" and not (compiled or inside or self.micro_batches):
            self._look_outside(None if records else step, inputs)
        if records:
            self._now.step = self._record(call)
            return self.now
        if inside:
            spare = min(other.spare_bytes for other in around)
            plan = step.inside(self.budget_bytes, self.reserve_bytes, spare)
        else:
            plan = self._possible_plan_of(step)
        self.inside += inside
        if plan is not self.plan and not (inside and self.plan):
            self.replans += self.plan is not None
            self.plan = plan
        careful = not (self._one_forward or step.planner.recorded or compiled)
        if careful and (least := self._least(step)).fits:
            plan = least
        room = self.budget_bytes - plan.reserve_bytes - plan.peak_bytes - step.outside_bytes
        self._now.step = Follower(
            step.calls,
            plan,
            self._watch if careful else None,
            taped=bool(others) and not compiled,
            inside=inside,
            pauses=not compiled,
            spare_bytes=max(0, room) if step.planner.recorded and not (careful or inside) else 0,
        )
        return self.now

    def _look_outside(self, step: PlannedStep | None, inputs) -> None:
        """Count what the loop holds besides a step that begins; None: one that is recorded.

        This looks at the loop from its first step, or a recorded one, to the first after the optimizer's, so
        that what runs in between (a teacher, an average of the weights, a second step on moved weights) is
        seen.
        """
        if self._census is None:
            loop = weakref.ref(self)
            self._census = Census(self.device, lambda: loop() is not None and not loop().waits)
            self._end_census = weakref.finalize(self, self._census.stop)
        elif step is None:
            self._looks, self._stepped = 0, False
        elif self._looks < _LOOKS:
            optimizers = [tree_iter(list(each.state.values())) for each in self.optimizers]
            own = [*tensors_of(self.model), *self._held_now()[0], *tensors_in(inputs)]
            own += [p.grad for p in self.model.parameters() if p.grad is not None]
            own += [t for state in optimizers for t in state if isinstance(t, torch.Tensor)]
            besides = self._census.bytes_besides(own, step.seen) - self._held_bytes
            if not step.planner.recorded:
                besides -= self._bucket_bytes
            step.outside_bytes = self._outside_bytes = max(step.outside_bytes, besides)
            self._looks = _LOOKS if self._stepped else self._looks + 1
            self._tell_between(self._census.highest_bytes + self._held_bytes)
        if self._looks < _LOOKS:
            self._census.watch()
        else:
            self._census.stop()

    def _tell_between(self, nbytes: int) -> None:
        """Tell once of bytes that were allocated while no step was running, if the budget is below."""
        if nbytes > self.budget_bytes and not self._told_between:
            self._told_between = True
            name, budget = type(self.model).__name__, format_bytes(self.budget_bytes)
            warnings.warn(
                f"{format_bytes(nbytes)} were allocated between the steps of {name}, more than the budget of "
                f"{budget}, for what no plan changes: a teacher, an evaluation, the optimizer's step.",
                stacklevel=2,
            )

    def _possible_plan_of(self, step: PlannedStep) -> Plan:
        """The plan of a step.  That nothing fits a step that was possible before, is told once."""
        possible = step.ran or (step.planner.recorded and self.plan is not None)
        try:
            plan = self._plan_of(step)
            possible = True
            if plan.peak_bytes + plan.reserve_bytes + step.outside_bytes > self.budget_bytes:
                plan = self._plan_of(step, step.outside_bytes)
        except InputError as error:
            if not possible:
                raise
            if not self._told:
                self._told = True
                besides = f"the loop holds {format_bytes(step.outside_bytes)} besides the step (see held=): "
                holds = besides if step.outside_bytes else ""
                warnings.warn(f"{holds}{error} Each block now keeps the least that it can.", stacklevel=2)
            plan = self._least(step)
        step.ran = True
        return plan

    def _least(self, step: PlannedStep) -> Plan:
        return step.least(self.budget_bytes, self.reserve_bytes)

    def _watch(self, waits: Callable[[], bool]) -> Watch:
        return Watch(self.model, waits, *self._held_now())

    def _held_now(self) -> tuple[list[torch.Tensor], int]:
        tensors = [tensor for tensor in (reference() for reference in self._held) if tensor is not None]
        return tensors, self._held_bytes

    def _learn(self, now: Follower | Recording) -> None:
        """Use what a step that has ended has shown."""
        first = now.calls[0]
        if isinstance(now, Recording):
            profile = now.profile(self._state_bytes_ahead())
            if now.failed or not profile.backward_starts:  # not a step that can be planned
                self._recordings[first] -= 1
                return
            self._to_record.discard(first)
            planner = Planner(self.model, None, recorded=profile, precision=first.state[0], **self.settings)
            self._known = [step for step in self._known if step.calls[0] != first]
            self._keep(PlannedStep(tuple(now.calls), planner, profile.fixed["optimizer"], seen=now.seen))
            return
        self.departures += now.departures
        more = False
        if now.watch is not None and not now.watch.failed:
            now.watch.stop()
            slack = _TOLERANCE * now.plan.peak_bytes
            planned = next(step.planner for step in reversed(self._known) if step.calls[0].covers(first))
            more = (
                now.watch.peak_bytes(self._state_bytes_ahead()) > now.plan.peak_bytes + slack
                or now.watch.loss_bytes > planned.profile.loss_bytes + slack
            )
            self._one_forward = now.passes == len(now.calls) == 1
        if (now.departures or more) and not (self.micro_batches or now.inside):
            self._record_next(first)

    def _record_next(self, first: Call) -> None:
        """Record the next step that begins with a call, unless its path differs every time."""
        compiled = is_inside_compiled()
        if self._recordings.get(first, 0) < _RECORDINGS and not compiled:
            self._to_record.add(first)
        elif self._recordings.get(first, 0) <= _RECORDINGS:
            self._recordings[first] = _RECORDINGS + 1
            how = "than planned, and is compiled, so that none is recorded" if compiled else "in every step"
            warnings.warn(
                f"{type(self.model).__name__} runs other operators {how}; where they differ from the plan "
                "everything is kept, which may take more than the budget.",
                stacklevel=2,
            )

    def _state_bytes_ahead(self) -> int:
        """Bytes of the optimizer's state, before its first step as the settings say."""
        return self.state_bytes or state_bytes_of(self.settings["optimizer"], self.model)

    def _record(self, call: Call) -> Recording:
        self._recordings[call] = self._recordings.get(call, 0) + 1
        return Recording(self.model, call, *self._held_now())

    def _add(self, now: Follower, call: Call, inputs) -> None:
        """Plan another forward pass of a step whose plan does not have it."""
        if not now.inside:
            self._record_next(now.calls[0])
        step = self._find(call) or self._plan_for(call, inputs)
        plan = None
        if step is not None and not now.inside:
            with contextlib.suppress(InputError):
                plan = self._plan_of(step, now.kept_bytes + self._outside_bytes)
        if plan is None and not now.inside:
            warnings.warn(
                f"{type(self.model).__name__} ran several times before a backward pass, which may take more "
                f"than the budget of {format_bytes(self.budget_bytes)} in this step, but not in the next.",
                stacklevel=2,
            )
        if step is not None:
            now.add(call, plan or self._least(step))

    def _find(self, call: Call) -> PlannedStep | None:
        """The plan of the smallest step that covers a call."""
        found = [step for step in reversed(self._known) if step.calls[0].covers(call)]
        step = min(found, key=lambda step: step.calls[0].elements, default=None)
        if step is not None:
            self._keep(step)
        return step

    def _keep(self, step: PlannedStep) -> None:
        self._known = [*(known for known in self._known if known is not step), step][-_PLANS:]

    def _plan_for(self, call: Call, inputs) -> PlannedStep | None:
        """A plan on fake tensors for a call like none before; None if they cannot show its step."""
        if self.batch is None:
            return None
        inputs = without_memory(inputs, self.device)
        alike = [step.calls[0] for step in self._known if step.calls[0].like(call)]
        grown = call.grown(alike) if len(alike) > 1 else call
        for each in dict.fromkeys((grown, call)):
            try:
                step = self._on_fakes(each, _resized(self.batch, inputs, each))
            except (InputError, RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                continue
            if each != call and not self._fits(step):
                continue
            self._keep(step)
            return step
        return None

    def _fits(self, step: PlannedStep) -> bool:
        try:
            self._plan_of(step)
        except InputError:
            return False
        return True

    def _on_fakes(self, call: Call, batch) -> PlannedStep:
        """Profile a step with one forward pass on fake tensors."""
        planner = Planner(
            self.model, batch, precision=call.state[0], accumulates=call.accumulates, **self.settings
        )
        with modes_left():
            state_bytes = planner.profile.fixed["optimizer"]
        targets = [rounded(t.nbytes) for t in tensors_in(split_batch(batch)[1])]
        step = PlannedStep((call,), planner, state_bytes, self.micro_batches, targets)
        step.outside_bytes = self._outside_bytes
        return step

    def _plan_of(self, step: PlannedStep, kept_bytes: int = 0) -> Plan:
        """The plan of a step, besides `kept_bytes` and what the loop holds that its profile has not seen."""
        more = kept_bytes + max(0, self.state_bytes - step.state_bytes)
        if not step.planner.recorded:
            more += self._bucket_bytes
        return step.plan(self.budget_bytes, self.reserve_bytes + more)


def _resized(batch, inputs, call: Call):
    """`batch` with the inputs of another call.

    The targets are assumed to change as the inputs do: their first dimension is the number of samples, and
    any other that equals one of the inputs follows it.
    """
    old, targets = split_batch(batch)
    sizes = iter(call.shapes)

    def as_called(tensor: torch.Tensor) -> torch.Tensor:
        _, size = next(sizes)
        return tensor if tuple(tensor.shape) == size else tensor.new_empty(size, device="meta")

    made = tree_map_only(torch.Tensor, as_called, inputs)
    if targets is None:
        return made
    before, now = ([t.shape for t in tensors_in(tree)] for tree in (old, made))
    changed = {n: m for a, b in zip(before, now) if len(a) == len(b) for n, m in zip(a[1:], b[1:])}

    def resized(target: torch.Tensor) -> torch.Tensor:
        if not target.dim() or len(target) != before[0][0]:
            return target
        return target.new_empty((now[0][0], *[changed.get(n, n) for n in target.shape[1:]]))

    return made, tree_map_only(torch.Tensor, resized, targets)


def without_memory(batch, device: torch.device):
    """`batch` as meta tensors, so that what keeps it holds no memory on the device."""
    known: dict[int, torch.Tensor] = {}

    def without(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor or tensor.device != device:
            return tensor
        if id(tensor) not in known:
            known[id(tensor)] = described(tensor)
        return known[id(tensor)]

    return tree_map_only(torch.Tensor, without, batch)


def _seen(loop: Loop | None, optimizer: torch.optim.Optimizer) -> None:
    """Count the state of an optimizer that has made its first step on the model of a loop."""
    if loop is None or (optimizer in loop.optimizers and loop._stepped):
        return
    trained = {id(p) for p in loop.model.parameters()}
    if trained.isdisjoint(id(p) for group in optimizer.param_groups for p in group["params"]):
        return
    loop._stepped = True
    if optimizer in loop.optimizers:
        return
    loop.optimizers.add(optimizer)
    tensors = [t for each in loop.optimizers for t in tree_iter(list(each.state.values()))]
    storages = {
        storage_key(t): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, torch.Tensor) and t.device == loop.device
    }
    loop.state_bytes = sum(map(rounded, storages.values()))
