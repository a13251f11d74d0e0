"""`auto_checkpoint()` keeps any training loop within a memory budget.

The model's forward pass runs under a tape that follows a plan; nothing else in the loop changes.  The plan
changes when the batch shape, mode or precision does, when a peak exceeds the prediction, and when other
processes take memory.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_iter, tree_map_only

from toolkit.budget.integers import described
from toolkit.budget.lean import LeanForms
from toolkit.budget.memory import format_bytes, parse_bytes
from toolkit.budget.own_checkpoints import own_checkpoints_off
from toolkit.budget.plan import Plan, Planner, batch_size_of, check_trains
from toolkit.budget.solver import Option
from toolkit.budget.step import AUTOCAST, on_fakes, run_block, split_batch
from toolkit.budget.tape import Op, Tape, operator_name
from toolkit.budget.wrapping import Wrapping
from toolkit.errors import InputError

_LOOK_AT_DEVICE_EVERY = 50  # forward passes


def auto_checkpoint(
    model: nn.Module,
    budget: int | str,
    batch,
    *,
    loss: Callable | None = None,
    optimizer=None,
    precision: str | None = None,
    blocks: list[str] | None = None,
    reserve: int | str | None = None,
    lean: bool = True,
) -> AutoCheckpoint:
    """Keep the training of `model` within `budget` bytes of device memory, until `.remove()`.

    `batch`: inputs or (inputs, targets), one batch as the loop uses it.  `loss(outputs, targets)`:
    cross-entropy if None.  `optimizer`: the loop's, or "adamw" (if None) or "sgd"; its state is part of the
    budget.  `precision`: the loop's autocast; that of the surrounding autocast if None.  `reserve`: bytes of
    the budget that are not for tensors; if None, on CUDA, the memory in use outside this process's tensors.
    For the rest see `plan`.

    Also a context manager.  Losses and gradients are those of the unchanged model, bit for bit if its
    kernels are deterministic (up to the order of rounding in lean LoRA layers and sliced blocks).  Raises
    `InputError` if nothing fits.
    """
    return AutoCheckpoint(
        model,
        parse_bytes(budget),
        batch,
        loss=loss,
        optimizer=optimizer or "adamw",
        precision=precision,
        blocks=blocks,
        reserve_bytes=None if reserve is None else parse_bytes(reserve) if reserve else 0,
        lean=lean,
    )


class AutoCheckpoint:
    """Runs a model under a plan; `plan` is the one that the latest forward pass followed."""

    def __init__(
        self,
        model: nn.Module,
        budget_bytes: int,
        batch,
        *,
        loss: Callable | None,
        optimizer,
        precision: str | None,
        blocks: list[str] | None = None,
        reserve_bytes: int | None = None,
        lean: bool = True,
        micro_batches: bool | int = False,
        held_bytes: int = 0,
    ):
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        check_trains(model)
        _make_room(model)
        self.model = model
        self.budget_bytes, self.micro_batches = budget_bytes, micro_batches
        self.device = next(model.parameters()).device
        self.batch = batch = _without_memory(batch, self.device)
        self.reserve_bytes = untracked_bytes(self.device) if reserve_bytes is None else reserve_bytes
        self._settings = {
            "loss": loss,
            "optimizer": optimizer,
            "blocks": blocks,
            "lean": lean,
            "held_bytes": held_bytes,
        }
        self._planners: dict[tuple, Planner] = {}
        self._turn = threading.Condition()  # planning waits for forward passes in other threads
        self._running = 0  # forward passes, in all threads
        self._passes = 0
        self.replans = 0
        self.departures = 0  # segments that did not run as profiled; nothing was dropped there
        precision = precision or _autocast_precision(self.device)
        self._planner = self._planner_for(batch, self._state(precision), precision)
        self.plan = self._solve()
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
            fraction = min(1.0, max(0.0, (budget_bytes - self.reserve_bytes) / total))
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._followers = threading.local()  # `now`: the follower of this thread's forward pass
        blocks = self._planner.blocks.items()
        self._on_model: list = [LeanForms(model)] if lean else []
        self._on_model += [
            Wrapping(block, functools.partial(self._run_block, name)) for name, block in blocks
        ]
        self._on_model.append(Wrapping(model, self._run))
        _HANDLES.add(self)

    def remove(self) -> None:
        """Let the model run its own forward."""
        if not self._on_model:
            return
        for wrapping in self._on_model:
            wrapping.remove()
        self._on_model = []
        _HANDLES.discard(self)
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def __enter__(self) -> AutoCheckpoint:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    @property
    def checkpointed(self) -> set[str]:
        """Names of the blocks that recompute something."""
        options = zip(self.plan.segments, self.plan.options)
        return {name for name, option in options if name and option.level.recomputed}

    def tighten(self, peak_bytes: int) -> None:
        """From now on plan for a peak of at most `peak_bytes`.  Raises `InputError` if nothing fits."""
        before = self.reserve_bytes
        self.reserve_bytes = max(before, self.budget_bytes - peak_bytes)
        try:
            with self._turn:
                self._wait()
                self._plan_again()
        except InputError:
            self.reserve_bytes = before  # keep the plan
            raise

    def check(self, peak_bytes: int) -> None:
        """Compare a step's measured peak with the budget; if it was above, plan for a smaller peak."""
        available, predicted = self.budget_bytes - self.reserve_bytes, self.plan.peak_bytes
        if peak_bytes > max(available, predicted):
            warnings.warn(
                f"a step took {format_bytes(peak_bytes)}, {format_bytes(peak_bytes - predicted)} more than "
                "predicted; planning again.",
                stacklevel=2,
            )
            with contextlib.suppress(InputError):  # no tighter plan exists; the user has been warned
                self.tighten(available - (peak_bytes - predicted))

    @torch.compiler.disable
    def _run(self, forward, *args, **kwargs):
        if on_fakes():
            return forward(*args, **kwargs)
        with self._turn:
            plan = self._plan_for(forward, args, kwargs) if torch.is_grad_enabled() else None
            self._running += 1
        try:
            if plan is None:
                return forward(*args, **kwargs)
            if plan.keeps_everything:
                with own_checkpoints_off():
                    return forward(*args, **kwargs)
            follower = self._followers.now = _Follower(plan)
            with Tape(follower.decide):
                return forward(*args, **kwargs)
        finally:
            self._followers.now = None
            with self._turn:
                self._running -= 1
                self._turn.notify_all()
                if plan is not None and not plan.keeps_everything:
                    self.departures += follower.departures

    @torch.compiler.disable
    def _run_block(self, name: str, forward, *args, **kwargs):
        follower = getattr(self._followers, "now", None)
        if follower is None:
            return forward(*args, **kwargs)
        return run_block(name, follower.block_ended, follower.slices.get(name, 1), forward, *args, **kwargs)

    def _plan_for(self, forward, args: tuple, kwargs: dict) -> Plan:
        """The plan for a forward pass that begins."""
        self._look_at_device()
        inputs = args[0] if len(args) == 1 else args
        if kwargs:
            inputs = dict(inspect.signature(forward).bind(*args, **kwargs).arguments) if args else kwargs
        precision = _autocast_precision(self.device)
        if not self._covers(inputs, precision):
            self._wait()
            self._change_to(inputs, precision)
        return self.plan

    def _wait(self) -> None:
        """Wait for the forward passes of other threads, which planning must not disturb."""
        while self._running:
            self._turn.wait()

    def _state(self, precision: str) -> tuple:
        """Everything besides the inputs that a profile depends on."""
        flags = tuple(parameter.requires_grad for parameter in self.model.parameters())
        return precision, self.model.training, flags

    def _covers(self, inputs, precision: str) -> bool:
        """Whether the plan holds for these inputs: they have the planned shapes, or fewer samples."""
        if self._state(precision) != self._planned_state:
            return False
        planned, now = _tensors(split_batch(self._planner.batch)[0]), _tensors(inputs)
        return len(planned) == len(now) and all(
            p.dtype == t.dtype and p.shape[1:] == t.shape[1:] and p.shape[:1] >= t.shape[:1]
            for p, t in zip(planned, now)
        )

    def _change_to(self, inputs, precision: str) -> None:
        """Plan for other inputs; the targets are assumed to keep their shape, for as many samples."""
        _, targets = split_batch(self.batch)
        before, now = batch_size_of(self.batch), batch_size_of(inputs)
        if targets is not None:
            targets = tree_map_only(
                torch.Tensor,
                lambda t: t.new_zeros((now, *t.shape[1:])) if t.dim() and len(t) == before else t,
                targets,
            )
        batch = (inputs, targets) if targets is not None else inputs
        batch = _without_memory(batch, self.device)
        self._planner = self._planner_for(batch, self._state(precision), precision)
        self._plan_again()

    def _plan_again(self) -> None:
        self.plan = self._solve()
        self.replans += 1

    def _planner_for(self, batch, state: tuple, precision: str) -> Planner:
        self._planned_state = state
        key = (state, tuple((tuple(t.shape), t.dtype) for t in _tensors(batch)))
        if key not in self._planners:
            self._planners[key] = Planner(self.model, batch, precision=precision, **self._settings)
        return self._planners[key]

    def _solve(self) -> Plan:
        return self._planner.plan(self.budget_bytes, self.reserve_bytes, micro_batches=self.micro_batches)

    def _look_at_device(self) -> None:
        """On CUDA: react to peaks above the prediction, and to memory taken by other processes."""
        self._passes += 1
        if self.device.type != "cuda" or self._passes % _LOOK_AT_DEVICE_EVERY != 2:
            return
        self.check(torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        available = free + torch.cuda.memory_reserved(self.device)
        if available < self.plan.peak_bytes:
            self.tighten(available)


class _Follower:
    """Makes a tape's decisions according to a plan, as long as the operators match its profile."""

    def __init__(self, plan: Plan):
        self.options = plan.options
        self.slices = {
            name: option.slices for name, option in zip(plan.segments, plan.options) if option.slices > 1
        }
        self.departures = 0
        self._segment = self._op = 0
        self._departed = False

    def block_ended(self, name: str, args: tuple, kwargs: dict, output) -> None:
        self._segment += 1
        self._op, self._departed = 0, False

    def decide(self, op: Op, contents: dict) -> list[str] | None:
        if self._departed or self._segment >= len(self.options):
            return None
        option: Option = self.options[self._segment]
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


_HANDLES: weakref.WeakSet[AutoCheckpoint] = weakref.WeakSet()  # of models that are under a plan


def _make_room(model: nn.Module) -> None:
    """Remove an earlier plan of `model`.  Raises `InputError` if a part or a parent of it is under one."""
    modules = set(model.modules())
    for handle in list(_HANDLES):
        if handle.model is model:
            handle.remove()
        elif not modules.isdisjoint(handle.model.modules()):
            raise InputError(
                f"this {type(model).__name__} shares modules with a {type(handle.model).__name__} that is "
                "under a plan already; remove() that plan first, or plan one module that contains both."
            )


def _without_memory(batch, device: torch.device):
    """`batch` as meta tensors, so that a planner that keeps it holds no memory on the device."""
    known: dict[int, torch.Tensor] = {}

    def without(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is not torch.Tensor or tensor.device != device:
            return tensor
        if id(tensor) not in known:
            known[id(tensor)] = described(tensor)
        return known[id(tensor)]

    return tree_map_only(torch.Tensor, without, batch)


def untracked_bytes(device: torch.device) -> int:
    """Bytes in use on a CUDA device outside this process's allocator: its context, and other processes.

    0 on the CPU.
    """
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))


def _autocast_precision(device: torch.device) -> str:
    """Name of the precision of the surrounding autocast."""
    if not torch.is_autocast_enabled(device.type):
        return "fp32"
    dtype = torch.get_autocast_dtype(device.type)
    names = [name for name, known in AUTOCAST.items() if known is dtype]
    if not names:
        raise InputError(f"autocast to {dtype} is not supported; use one of {', '.join(AUTOCAST)}.")
    return names[0]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
