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
from torch.utils._pytree import tree_leaves

from toolkit.budget.checkpointing import find_segments
from toolkit.budget.following import Follower
from toolkit.budget.lean import LeanForms
from toolkit.budget.loop import Loop
from toolkit.budget.memory import format_bytes, parse_bytes, tensors_of
from toolkit.budget.plan import Plan, check_trains
from toolkit.budget.recording import Recording
from toolkit.budget.step import AUTOCAST, on_fakes, run_block, tensors_in
from toolkit.budget.watching import PastCalls, StepPeaks, compiled_modules
from toolkit.budget.wrapping import Wrapping
from toolkit.errors import InputError

_LOOK_AT_DEVICE_EVERY = 50  # forward passes


def auto_checkpoint(
    model: nn.Module,
    budget: int | str,
    batch=None,
    *,
    loss: Callable | None = None,
    optimizer=None,
    precision: str | None = None,
    blocks: list[str] | None = None,
    reserve: int | str | None = None,
    lean: bool = True,
    accumulate: bool | int = False,
    held=None,
) -> AutoCheckpoint:
    """Keep the training of `model` within `budget` bytes of device memory, until `.remove()`.

    `batch`: inputs or (inputs, targets), the largest batch that the loop uses; if None, the loop's first step
    is recorded, with its loss, and the following ones are planned (not where the whole model is compiled;
    compiled blocks are no obstacle).  `loss(outputs, targets)`: cross-entropy if None.  `optimizer`: the
    loop's, or "adamw" (if None) or "sgd"; its state is part of the budget.  `precision`: the loop's autocast;
    that of the surrounding autocast if None.  `reserve`: bytes of the budget that are not for tensors; if
    None, on CUDA, the memory in use outside this process's tensors.
    `accumulate`: whether the loop adds the gradients of several batches (or how many), which otherwise shows
    in its second step.  `held`: modules and tensors that the loop holds besides (a teacher, an average of the
    weights, the next batch), or their bytes; on the CPU also seen, from the second step on, where operators
    of the first use them.  Of several models that are planned, those whose forward pass runs while the graph
    of another waits keep what its plan can spare, as part of its step.  For the rest see `plan`.

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
        accumulates=accumulate > 1 or accumulate is True,
        held=held,
    )


class AutoCheckpoint:
    """Runs a model under a plan; `plan` is the one that the latest step followed, None before a first one."""

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
        accumulates: bool = False,
        held=None,
    ):
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        ddp = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        if ddp is not None:
            model = ddp.module
        check_trains(model)
        _make_room(model)
        self.model = model
        self.budget_bytes = budget_bytes
        self.device = next(model.parameters()).device
        tensors, more_bytes = _held(held)
        self._loop = Loop(
            model,
            budget_bytes,
            batch,
            reserve_bytes=untracked_bytes(self.device) if reserve_bytes is None else reserve_bytes,
            micro_batches=micro_batches,
            held=tensors,
            held_bytes=held_bytes + more_bytes,
            ddp=ddp,
            settings={"loss": loss, "optimizer": optimizer, "blocks": blocks, "lean": lean},
        )
        self._turn = threading.Condition()  # planning waits for forward passes in other threads
        self._running = 0  # forward passes, in all threads
        self.passes = 0  # forward passes that have begun
        self._past, self._peaks = PastCalls(model), StepPeaks(model, 0)
        self._blocks = find_segments(model, blocks)
        if batch is not None:
            self._loop.plan_ahead(precision or _autocast_precision(self.device), accumulates)
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
            fraction = min(1.0, max(0.0, (budget_bytes - self._loop.reserve_bytes) / total))
            torch.cuda.set_per_process_memory_fraction(fraction, self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._inside = threading.local()  # `step`: what this thread's forward pass runs under
        self._on_model: list = [LeanForms(model)] if lean else []
        self._on_model += [
            Wrapping(block, functools.partial(self._run_block, name)) for name, block in self._blocks.items()
        ]
        self._on_model.append(Wrapping(model, self._run))
        _HANDLES.add(self)

    def remove(self) -> None:
        """Let the model run its own forward."""
        if not self._on_model:
            return
        self._loop.close()
        for wrapping in self._on_model:
            wrapping.remove()
        self._on_model = []
        self._peaks.stop()
        _HANDLES.discard(self)
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def __enter__(self) -> AutoCheckpoint:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    @property
    def plan(self) -> Plan | None:
        """The plan that the latest step followed; None before a first step has been recorded."""
        return self._loop.plan

    @property
    def replans(self) -> int:
        """How often the plan has changed."""
        return self._loop.replans

    @property
    def departures(self) -> int:
        """Segments that did not run as planned, in the steps that have ended; nothing was dropped there."""
        return self._loop.departures

    @property
    def checkpointed(self) -> set[str]:
        """Names of the blocks that recompute something."""
        if self.plan is None:
            return set()
        options = zip(self.plan.segments, self.plan.options)
        return {name for name, option in options if name and option.level.recomputed}

    def measure(self, steps: int) -> None:
        """Count the peak bytes of the next `steps` steps, for `report()`.

        On the CPU that slows them, and the step before them, which shows what the loop holds.
        """
        self._peaks.stop()
        self._peaks = StepPeaks(self.model, steps)

    def report(self) -> str:
        """What was planned and what ran, to print."""
        plan, peaks = self.plan, self._peaks.bytes
        lines = [
            plan.explain() if plan else "no step has been planned yet",
            f"ran         {self.passes} forward passes, {self.replans} changes of the plan",
            f"departed    {self.departures} segments ran other operators than planned, and kept everything",
        ]
        if self._loop.inside:
            lines.append(
                f"inside      {self._loop.inside} steps of other models, in what their plans can spare"
            )
        lines += [f"past it     {count} blocks, run by {entry}" for entry, count in self._past.counts.items()]
        if peaks:
            over = sum(peak > self.budget_bytes for peak in peaks)
            lines.append(f"measured    {', '.join(map(format_bytes, peaks))}; {over} steps over the budget")
        compiled = compiled_modules(self.model)
        if compiled and plan and not plan.keeps_everything:
            lines.append(f"uncompiled  {', '.join(compiled)}, because the plan recomputes operators")
        return "\n".join(lines)

    def tighten(self, peak_bytes: int) -> None:
        """From now on plan for a peak of at most `peak_bytes`.  Raises `InputError` if nothing fits."""
        before = self._loop.reserve_bytes
        self._loop.reserve_bytes = max(before, self.budget_bytes - peak_bytes)
        try:
            with self._turn:
                self._wait()
                self._loop.plan_again()
        except InputError:
            self._loop.reserve_bytes = before  # keep the plan
            raise

    def check(self, peak_bytes: int) -> None:
        """Compare a step's measured peak with the budget; if it was above, plan for a smaller peak."""
        if self.plan is None:
            return
        available, predicted = self.budget_bytes - self._loop.reserve_bytes, self.plan.peak_bytes
        if peak_bytes > max(available, predicted):
            warnings.warn(
                f"a step took {format_bytes(peak_bytes)}, {format_bytes(peak_bytes - predicted)} more than "
                "predicted; planning again.",
                stacklevel=2,
            )
            with contextlib.suppress(InputError):  # no tighter plan exists; the user has been warned
                self.tighten(available - (peak_bytes - predicted))

    @torch.compiler.disable(recursive=False)  # a forward that keeps everything may be compiled
    def _run(self, forward, *args, **kwargs):
        if on_fakes():
            return forward(*args, **kwargs)
        step = self._begin(forward, args, kwargs)
        try:
            return forward(*args, **kwargs) if step is None else step.run(forward, *args, **kwargs)
        finally:
            self._end()

    @torch.compiler.disable
    def _begin(self, forward, args: tuple, kwargs: dict) -> Follower | Recording | None:
        """Begin a forward pass."""
        self._peaks.begin()
        with self._turn:
            if torch.is_grad_enabled():
                step = self._step(forward, args, kwargs)
            else:
                step = None
                self._loop.pause()
            self._running += 1
            self.passes += 1
        self._inside.step = step
        return step

    @torch.compiler.disable
    def _end(self) -> None:
        self._inside.step = None
        with self._turn:
            self._running -= 1
            self._turn.notify_all()

    @torch.compiler.disable(recursive=False)
    def _run_block(self, name: str, forward, *args, **kwargs):
        step = getattr(self._inside, "step", None)
        if step is None and self._goes_past(name, args, kwargs):
            return self._past.run(forward, *args, **kwargs)
        if step is None or step.unchanged:
            return forward(*args, **kwargs)
        return run_block(name, step.block_ended, step.slices.get(name, 1), forward, *args, **kwargs)

    @torch.compiler.disable
    def _goes_past(self, name: str, args: tuple, kwargs: dict) -> bool:
        """Whether a block that runs outside of the model's forward leaves more for backward than planned."""
        if not torch.is_grad_enabled() or on_fakes() or torch._C._current_graph_task_id() != -1:
            return False  # in a backward pass it is computed again
        tensors = [*tensors_in((args, kwargs)), *self._blocks[name].parameters()]
        keeps = self.plan is not None and self.plan.keeps_everything
        return not keeps and any(tensor.requires_grad for tensor in tensors)

    def _step(self, forward, args: tuple, kwargs: dict) -> Follower | Recording:
        """What a forward pass that begins runs under."""
        self._look_at_device()
        inputs = args[0] if len(args) == 1 else args
        if kwargs:
            inputs = dict(inspect.signature(forward).bind(*args, **kwargs).arguments) if args else kwargs
        others = [handle._loop for handle in _HANDLES if handle is not self]
        return self._loop.begin(inputs, _autocast_precision(self.device), self._wait, others)

    def _wait(self) -> None:
        """Wait for the forward passes of other threads, which planning must not disturb."""
        while self._running:
            self._turn.wait()

    def _look_at_device(self) -> None:
        """On CUDA: react to peaks above the prediction, and to memory taken by other processes."""
        if self.device.type != "cuda" or self.plan is None or self.passes % _LOOK_AT_DEVICE_EVERY != 2:
            return
        self.check(torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        available = free + torch.cuda.memory_reserved(self.device)
        if available < self.plan.peak_bytes:
            self.tighten(available)


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


def _held(held) -> tuple[list[torch.Tensor], int]:
    """The tensors in a nest of modules and tensors, and the bytes that are given as such."""
    leaves = tree_leaves(held)
    sizes = [parse_bytes(leaf) for leaf in leaves if isinstance(leaf, int | str)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for leaf in leaves:
        tensors += tensors_of(leaf) if isinstance(leaf, nn.Module) else []
    return tensors, sum(sizes)


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
