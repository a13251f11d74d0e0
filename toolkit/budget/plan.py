"""`plan()` predicts the memory of training, and finds the fastest way to train within a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_iter

from toolkit.budget.checkpointing import STRATEGIES, Checkpointing, find_segments
from toolkit.budget.fakes import Others, on_fake_tensors, refuse_unsuitable, swept
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.found import Found
from toolkit.budget.lean import LeanForms
from toolkit.budget.memory import TensorMemory, format_bytes, parse_bytes, tensors_of
from toolkit.budget.optimizers import Stepper, make_state, optimizer_like
from toolkit.budget.own_checkpoints import own_checkpoints_off
from toolkit.budget.profile import Profile, profile
from toolkit.budget.solver import Chain, DeviceSpeed, Option, speed_of
from toolkit.budget.step import run_step
from toolkit.errors import InputError, check_name

SLICES = 8  # number of slices of a block's batch, where slicing can help
# A roofline overestimates how well small batches use a device: they must look faster by this factor.
MICRO_BATCH_MARGIN = 1.02
_SHOWN_BYTES = 2**20 // 10 + 1  # 0.1 MiB, the last digit of `format_bytes`


@dataclass(frozen=True)
class Plan:
    """How one training step runs, and its predicted memory and time.

    `peak_bytes` counts all tensors: weights, gradients, optimizer state, batch, activations, temporaries.
    FLOPs are two per multiply-add of products, per step, without norms.  `memory` holds the highest allocated
    bytes at each moment of the step.
    """

    strategy: str
    budget_bytes: int
    reserve_bytes: int  # part of the budget that is not for tensors
    peak_bytes: int
    unplanned_peak_bytes: int  # of the same step (lean forms included) with everything kept
    forward_flops: int
    recompute_flops: int
    extra_seconds: float | None  # estimated time of recomputation and slicing, if known
    plain_seconds: float | None  # estimated time of the step without it
    batch_size: int
    micro_batch_size: int
    levels: dict[str, str]  # block -> level, in words
    fixed: dict[str, int] = field(default_factory=dict)  # bytes by kind
    memory: np.ndarray | None = field(default=None, repr=False, compare=False)
    device: str = ""  # the device that the seconds are estimated for
    notes: tuple[str, ...] = ()
    options: tuple[Option, ...] = field(default=(), repr=False, compare=False)
    segments: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes + self.reserve_bytes <= self.budget_bytes

    @property
    def recompute_pct(self) -> float:
        """Recomputed FLOPs as a percentage of the forward pass."""
        return 100 * self.recompute_flops / self.forward_flops if self.forward_flops else 0.0

    def explain(self) -> str:
        """A table to print."""
        lines = [
            f"strategy    {self.strategy}" + (f", in micro-batches of {self.micro_batch_size}" * self.sliced),
            f"budget      {format_bytes(self.budget_bytes)}"
            + (f", of which {format_bytes(self.reserve_bytes)} are reserved" if self.reserve_bytes else ""),
            f"peak        {format_bytes(self.peak_bytes)}, {'fits' if self.fits else 'DOES NOT FIT'}; "
            f"{format_bytes(self.unplanned_peak_bytes)} with everything kept",
            f"recomputed  {self.recompute_pct:.1f} % of the forward pass",
        ]
        if self.extra_seconds is not None:
            share = 100 * self.extra_seconds / self.plain_seconds
            lines.append(f"time        {share:+.1f} % of the step, estimated ({self.device})")
        if self.fixed:
            lines.append("fixed       " + ", ".join(f"{k} {format_bytes(v)}" for k, v in self.fixed.items()))
        lines += [f"note        {note}" for note in self.notes]
        width = max((len(name) for name in self.levels), default=0)
        lines += [f"{name:<{width}}  {level}" for name, level in self.levels.items()]
        return "\n".join(lines)

    @property
    def sliced(self) -> bool:
        """Whether the batch runs in micro-batches."""
        return self.micro_batch_size < self.batch_size

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is recomputed and no block is sliced: the model runs unchanged."""
        return _keeps_everything(self.options)


def plan(
    model: nn.Module,
    budget: int | str,
    batch,
    *,
    strategy: str = "planned",
    loss: Callable | None = None,
    optimizer="adamw",
    precision: str = "fp32",
    blocks: list[str] | None = None,
    reserve: int | str = 0,
    micro_batches: bool | int = False,
    lean: bool = True,
    speed: DeviceSpeed | None = None,
    held_bytes: int = 0,
) -> Plan:
    """Plan one training step of `model` on `batch` within `budget`; nothing is computed.

    `batch`: inputs, or (inputs, targets), as training will use them, on the device of the model; inputs
    are a tensor, a tuple of arguments or a dict of keyword arguments.  `loss(outputs, targets)`:
    cross-entropy if None.  `optimizer`: "adamw", "sgd", an optimizer of the model, or a function of the
    trained parameters.  `precision`: the loop's autocast.  `blocks`: names of modules to plan by; found if
    None.  `reserve`: part of the budget that is not for tensors (a CUDA context, fragmentation).
    `micro_batches`: True if the batch may run in micro-batches whose gradients accumulate; a number fixes
    their size.  `lean`: layers run in the forms of `budget.lean`.  `speed`: the device's, measured if None.
    `held_bytes`: tensors that the loop holds besides model, batch and optimizer.  Strategies other than
    "planned" are predicted whether or not they fit.

    Raises `InputError` if no plan fits, naming the smallest budget that does.
    """
    check_name("checkpointing strategy", strategy, STRATEGIES)
    batch_size_of(batch)
    check_trains(model)
    budget_bytes = parse_bytes(budget)
    reserve_bytes = parse_bytes(reserve) if reserve else 0
    if strategy != "planned":
        return _plan_of_rule(model, budget_bytes, reserve_bytes, batch, strategy, held_bytes,
                             loss=loss, optimizer=optimizer, precision=precision)  # fmt: skip
    planner = Planner(model, batch, loss=loss, optimizer=optimizer, precision=precision, blocks=blocks,
                      lean=lean, speed=speed, held_bytes=held_bytes)  # fmt: skip
    return planner.plan(budget_bytes, reserve_bytes, micro_batches=micro_batches)


class Planner:
    """Plans one training step for any budget; profiles it once for each micro-batch size, when needed.

    `accumulates`: gradients are there before the step.  `recorded`: the profile of a real step, in place of
    `batch`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch,
        *,
        loss: Callable | None = None,
        optimizer="adamw",
        precision: str = "fp32",
        blocks: list[str] | None = None,
        lean: bool = True,
        speed: DeviceSpeed | None = None,
        held_bytes: int = 0,
        accumulates: bool = False,
        recorded: Profile | None = None,
    ):
        self.model, self.batch, self.loss, self.optimizer = model, batch, loss, optimizer
        self.precision, self.lean, self.held_bytes = precision, lean, held_bytes
        self.accumulates, self.recorded = accumulates, recorded is not None
        self.blocks = find_segments(model, blocks)
        self.speed = speed or speed_of(next(model.parameters()).device, precision)
        self.batch_size = 1 if recorded else batch_size_of(batch)  # a recorded step is not divided
        self._chains: dict[tuple[int, bool], Chain] = {}
        if recorded:
            self._chains[1, True] = self._chains[1, False] = Chain(recorded, self.speed.op_seconds)

    def chain(self, micro_batch_size: int, sliced: bool) -> Chain:
        """All plans for micro-batches of one size; `sliced`: also those that slice the batch of blocks."""
        key = micro_batch_size, sliced
        if key in self._chains:
            return self._chains[key]
        if not sliced:
            self._chains[key] = Chain(self._profile(micro_batch_size), self.speed.op_seconds)
            return self._chains[key]
        whole = self.chain(micro_batch_size, False)
        counts = self._sliceable(whole, micro_batch_size)
        self._chains[key] = whole
        if counts:
            names = {whole.profile.segments[i]: count for i, count in counts.items()}
            other = self._profile(micro_batch_size, names)
            self._chains[key] = Chain(whole.profile, self.speed.op_seconds, (other, counts))
        return self._chains[key]

    def _profile(self, micro_batch_size: int, slices: dict[str, int] | None = None) -> Profile:
        lean = LeanForms(self.model) if self.lean else None
        try:
            return profile(
                self.model,
                self.batch,
                self.blocks,
                loss=self.loss,
                optimizer=self.optimizer,
                precision=self.precision,
                micro_batch_size=micro_batch_size,
                slices=slices,
                held_bytes=self.held_bytes,
                accumulates=self.accumulates,
            )
        finally:
            if lean is not None:
                lean.remove()

    def _sliceable(self, chain: Chain, micro_batch_size: int) -> dict[int, int]:
        """Number of slices for the last segment of each kind whose block treats samples independently."""
        chosen: dict[tuple, int] = {}
        for number, segment in enumerate(chain.segments):
            coupled = any(op.coupled for op in segment.ops)
            # When the first block runs backward, nothing else is kept, so slices gain nothing.
            useful = number or number not in chain.profile.backward_starts
            if useful and segment.name in chain.profile.inputs and not coupled:
                chosen[segment.kind] = number
        shapes = chain.profile.inputs
        chosen = {
            kind: number
            for kind, number in chosen.items()
            if computes_samples_alone(self.blocks[(name := chain.segments[number].name)], shapes[name])
        }
        slices = min(SLICES, micro_batch_size)
        return {number: slices for number in sorted(chosen.values())} if slices > 1 else {}

    def plan(self, budget_bytes: int, reserve_bytes: int = 0, *, micro_batches: bool | int = False) -> Plan:
        """The fastest plan within the budget.  Raises `InputError` if there is none."""
        limit = budget_bytes - reserve_bytes
        whole = self.chain(self.batch_size, False)
        notes = list(whole.profile.notes)
        coupled = whole.profile.batch_statistics
        if micro_batches is True or not micro_batches:
            best = self._best(self.batch_size, limit)
            if micro_batches and coupled:
                notes.append("no micro-batches: batch norms compute statistics of the whole batch.")
            elif micro_batches:
                best = self._best_of_smaller(best, limit)
        else:
            best = self._best(min(micro_batches, self.batch_size), limit)
        if best is None:
            raise InputError(self._why_not(budget_bytes, reserve_bytes, bool(micro_batches) and not coupled))
        seconds, size, chain, solution = best
        plain = self._step_seconds(self.batch_size)
        count = -(-self.batch_size // size)
        return Plan(
            strategy="planned",
            budget_bytes=budget_bytes,
            reserve_bytes=reserve_bytes,
            peak_bytes=solution.peak_bytes,
            unplanned_peak_bytes=self._unplanned_peak(),
            forward_flops=sum(op.flops for op in whole.profile.ops),
            recompute_flops=count * sum(option.level.flops for option in solution.options),
            extra_seconds=seconds - plain,
            plain_seconds=plain,
            batch_size=self.batch_size,
            micro_batch_size=size,
            levels={
                name: describe(option)
                for name, option in zip(chain.profile.segments, solution.options)
                if name
            },
            fixed=whole.profile.fixed,
            memory=chain.memory(solution.options),
            device=self.speed.name,
            notes=tuple(notes),
            options=solution.options,
            segments=tuple(chain.profile.segments),
        )

    @property
    def profile(self) -> Profile:
        """The profile of a step on the whole batch."""
        return self.chain(self.batch_size, False).profile

    def least(self, budget_bytes: int, reserve_bytes: int) -> Plan:
        """The plan that keeps the least bytes in every block, whether or not it fits."""
        chain = self.chain(self.batch_size, False)
        options = tuple(options[-1] for options in chain.options)
        segments = tuple(chain.profile.segments)
        return replace(
            self.plan(1 << 62),
            budget_bytes=budget_bytes,
            reserve_bytes=reserve_bytes,
            peak_bytes=chain.peak_bytes(options),
            recompute_flops=sum(option.level.flops for option in options),
            extra_seconds=None,
            levels={name: describe(option) for name, option in zip(segments, options) if name},
            memory=chain.memory(options),
            options=options,
            segments=segments,
        )

    def _best_of_smaller(self, best, limit: int):
        """`best`, or a clearly faster plan on micro-batches: the largest that is not clearly slower."""
        size = self.batch_size
        while size > 1 and (best is None or best[0] > MICRO_BATCH_MARGIN * self._step_seconds(size)):
            size = -(-size // 2)
            found = self._best(size, limit)
            if found is not None and (best is None or found[0] * MICRO_BATCH_MARGIN < best[0]):
                best = found
        return best

    def smallest_bytes(self, micro_batch_size: int | None = None) -> int:
        """Peak of the plan with the least memory."""
        size = micro_batch_size or self.batch_size
        return self.chain(size, size == self.batch_size).smallest_peak()

    def _best(self, size: int, limit: int):
        """(seconds of the step, micro-batch size, chain, solution); None if nothing fits."""
        count = -(-self.batch_size // size)
        found = None
        # Blocks are sliced in whole batches only: micro-batches are slices already.
        for sliced in (False, True) if size == self.batch_size else (False,):
            chain = self.chain(size, sliced)
            solution = chain.solve(limit)
            if solution is not None:
                seconds = count * self.speed.step_seconds(
                    3 * chain.plain_seconds + solution.seconds,
                    sum(len(option.segment.ops) for option in solution.options),
                    sum(len(option.segment.ops) for option in solution.options if option.recorded),
                )
                if found is None or seconds < found[0]:
                    found = seconds, size, chain, solution
                if solution.seconds == 0:
                    break  # slices cannot be faster
        return found

    def _step_seconds(self, size: int) -> float:
        """Estimated time of a step in micro-batches of `size` without recomputation."""
        chain = self.chain(size, False)
        seconds = self.speed.step_seconds(3 * chain.plain_seconds, len(chain.profile.ops))
        return -(-self.batch_size // size) * seconds

    def _unplanned_peak(self) -> int:
        return self.chain(self.batch_size, False).solve(1 << 62).peak_bytes

    def _why_not(self, budget_bytes: int, reserve_bytes: int, micro_batches: bool) -> str:
        smallest = self.smallest_bytes(1 if micro_batches else None) + reserve_bytes
        smallest += -smallest % _SHOWN_BYTES  # so that the printed size fits
        fixed = ", ".join(
            f"{kind} {format_bytes(count)}"
            for kind, count in self.chain(self.batch_size, False).profile.fixed.items()
        )
        ways = []
        statistics = self.chain(self.batch_size, False).profile.batch_statistics
        for size in (self.batch_size // 4, self.batch_size // 16, 1):
            if 0 < size < self.batch_size:
                try:
                    fits = self.smallest_bytes(size) + reserve_bytes
                except (RuntimeError, ValueError):
                    continue  # the model cannot run on so few samples
                if fits <= budget_bytes and not micro_batches:
                    how = "a batch" if statistics else "a batch, or micro-batches,"
                    ways.append(f"{how} of {size} (from {format_bytes(fits)})")
                    break
        ways.append("a method that trains fewer parameters, a lower precision or a smaller backbone")
        how = ", in micro-batches of 1," if micro_batches else ""
        return (
            f"budget {format_bytes(budget_bytes)} cannot be held: the smallest peak for "
            + ("the step that was recorded" if self.recorded else f"batch {self.batch_size}{how}")
            + f" is {format_bytes(smallest)}"
            + (f", {format_bytes(reserve_bytes)} of it reserved" if reserve_bytes else "")
            + f" (fixed: {fixed}). Raise the budget, or try {'; or '.join(ways)}."
        )


def check_trains(model: nn.Module) -> None:
    """Raise `InputError` for models that cannot be planned, or have no parameter that requires a gradient."""
    refuse_unsuitable(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"nothing of {type(model).__name__} trains: no parameter requires a gradient.")


def batch_size_of(batch) -> int:
    """Number of samples in a batch: the first dimension of its first tensor."""
    first = next((leaf for leaf in tree_iter(batch) if isinstance(leaf, torch.Tensor)), None)
    if first is None or not first.dim() or not len(first):
        raise InputError(
            "the batch holds no tensor with a first dimension; pass inputs or (inputs, targets)."
        )
    return len(first)


def _keeps_everything(options: tuple[Option, ...]) -> bool:
    return all(option.slices == 1 and not option.level.recomputed for option in options)


def computes_samples_alone(block: nn.Module, shape: torch.Size) -> bool:
    """Whether a sample's output is independent of the other samples of the batch, tried on random numbers."""
    parameter = next(block.parameters(), None)
    if parameter is None or parameter.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    first, second, third = (
        torch.randn(1, *shape[1:], generator=generator).to(parameter.device) for _ in range(3)
    )
    found = Found((block, block))
    with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False), own_checkpoints_off():
        try:
            one, other = block(torch.cat([first, second])), block(torch.cat([first, third]))
        except (RuntimeError, ValueError, TypeError):
            return False  # it cannot run two samples, or not in this type
        finally:
            found.put_back()
    return torch.allclose(one[0], other[0], rtol=1e-4, atol=1e-5)


def describe(option: Option) -> str:
    """The level of a block in words."""
    level = option.level
    if not level.recomputed:
        words = "keep"
    else:
        kinds = [
            word
            for word, parts in (
                ("products", ("mm", "linear", "conv", "scan")),
                ("attention", ("attention",)),
                ("norms and cheap operators", ("norm",)),
            )
            if any(part in name for name in level.recomputed for part in parts)
        ]
        words = "recompute " + (", ".join(kinds) if kinds else "cheap operators")
        if option.segment.ops and level.flops:
            share = 100 * level.flops / sum(op.flops for op in option.segment.ops)
            words += f" ({share:.0f} % of its FLOPs)"
    return words + (f", in {option.slices} slices" if option.slices > 1 else "")


@dataclass(frozen=True)
class ObservedStep:
    """One training step under a strategy that decides block by block; FLOPs as in `Plan`."""

    peak_bytes: int
    forward_flops: int
    recompute_flops: int
    checkpointed: frozenset[str]  # names of blocks
    seen_bytes: tuple[int, ...]  # every number of allocated bytes that the strategy has read
    memory_bytes: tuple[int, ...]  # at every operator of the step
    notes: tuple[str, ...] = ()


class _Seen:
    """Allocated bytes of `memory` and `extra` ones, as a strategy reads them; keeps every number."""

    def __init__(self, memory: TensorMemory, extra: int):
        self._memory, self._extra = memory, extra
        self.bytes: list[int] = []

    @property
    def allocated_bytes(self) -> int:
        self.bytes.append(self._memory.allocated_bytes + self._extra)
        return self.bytes[-1]


@swept
def observe(
    model: nn.Module,
    batch,
    strategy,
    budget_bytes: int,
    *,
    loss: Callable | None = None,
    optimizer="adamw",
    precision: str = "fp32",
    extra_bytes: int = 0,
) -> ObservedStep:
    """Run one step on fake tensors under `strategy`, which sees `extra_bytes` more than are allocated.

    The optimizer has its state already.  For the arguments see `plan` and `Checkpointing`.
    """
    make_optimizer = optimizer_like(optimizer, model)
    others = Others(optimizer, loss)
    with on_fake_tensors(model, batch, others) as fakes:
        history: list[int] = []
        memory = TensorMemory(next(model.parameters()).device, history)
        memory.track(tensors_of(model))
        memory.track(leaf for leaf in tree_iter(fakes) if isinstance(leaf, torch.Tensor))
        memory.track(others.state)
        stepper = Stepper(make_optimizer(model), model, others.state)
        counter, seen = FlopCounter(), _Seen(memory, extra_bytes)
        checkpointing = Checkpointing(model, strategy, memory=seen, budget_bytes=budget_bytes)
        with memory, checkpointing:
            make_state(model, stepper)
            memory.reset_peak()
            history.clear()
            run_step(model, fakes, loss, stepper, precision, counter)
    forward, recompute = (
        sum(n for name, n in counter.counts[phase].items() if name not in NORMS)
        for phase in ("forward", "recompute")
    )
    blocks = frozenset(checkpointing.checkpointed)
    notes = (stepper.note,) if stepper.note else ()
    return ObservedStep(
        memory.peak_bytes, forward, recompute, blocks, tuple(seen.bytes), tuple(history), notes
    )


def _plan_of_rule(
    model, budget_bytes: int, reserve_bytes: int, batch, strategy: str, held_bytes: int, **step
) -> Plan:
    """The plan of a strategy that does not plan; `step`: options of `observe`."""
    plain = observe(model, batch, "none", budget_bytes, **step)
    ran = plain if strategy == "none" else observe(model, batch, strategy, budget_bytes, **step)
    size = batch_size_of(batch)
    return Plan(
        strategy=strategy,
        budget_bytes=budget_bytes,
        reserve_bytes=reserve_bytes,
        peak_bytes=ran.peak_bytes + held_bytes,
        unplanned_peak_bytes=plain.peak_bytes + held_bytes,
        forward_flops=ran.forward_flops,
        recompute_flops=ran.recompute_flops,
        extra_seconds=None,
        plain_seconds=None,
        batch_size=size,
        micro_batch_size=size,
        levels={
            name: "recompute all" if name in ran.checkpointed else "keep" for name in find_segments(model)
        },
        notes=ran.notes,
    )
