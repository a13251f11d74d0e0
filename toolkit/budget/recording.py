"""Records one step of a training loop as it runs: the profile of what no fake tensors can show.

Detectors, masks that depend on values, losses outside the model, several forward passes before one backward
pass: the step runs with each block's input kept and the rest computed again, while a timeline underneath the
loop notes what it allocates, reads and frees.  `Recording.profile` is what `profile.profile` makes of fakes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from toolkit.budget.memory import tensors_of
from toolkit.budget.profile import Profile
from toolkit.budget.step import on_fakes, tensors_in
from toolkit.budget.tape import storage_key
from toolkit.budget.timeline import ProfilingTape, Timeline


class Watch:
    """Counts the memory of one step of a loop: of its forward passes, of what runs while a graph waits for
    its backward pass (`waits()`), and of the optimizer, underneath all that the loop does.

    `held`: tensors that the loop holds besides the model and that the step does not read; `held_bytes`: the
    bytes of others.
    """

    def __init__(
        self,
        model: nn.Module,
        waits: Callable[[], bool],
        held: Iterable[torch.Tensor] = (),
        held_bytes: int = 0,
    ):
        self.model, self._waits = model, waits
        device = next(model.parameters()).device
        self.timeline = Timeline(device, self._is_step)
        self.timeline.track(tensors_of(model))
        self.weights_bytes = self.timeline.allocated_bytes
        self.timeline.track(p.grad for p in model.parameters() if p.grad is not None)
        self.timeline.track(held)
        self.other_bytes = held_bytes
        if device.type == "cuda":  # what the loop holds is in the allocator's count
            self.other_bytes = max(0, torch.cuda.memory_allocated(device) - self.timeline.allocated_bytes)
        self.start_bytes: int | None = None
        self.forward_end = 0
        self.backward_start: int | None = None
        self.optimizer_start: int | None = None
        self._found: int | None = None  # number of the tensors found before the optimizer's step
        self.failed = False
        self._running = False  # a forward pass, or the optimizer
        # The hooks are torch's own, for all optimizers: they must not keep the model alive.
        starts, ends = weakref.WeakMethod(self._optimizer_starts), weakref.WeakMethod(self._optimizer_ends)
        self._hooks = [
            register_optimizer_step_pre_hook(lambda *args: starts() and starts()(*args)),
            register_optimizer_step_post_hook(lambda *args: ends() and ends()(*args)),
        ]
        self._entered = False
        self._enter()

    def _enter(self) -> None:
        if not self._entered and not self.timeline.ended:
            self._entered = True
            put_underneath(self.timeline)

    def pause(self) -> None:
        """See no operators until the next forward pass or optimizer, unless a graph waits for backward."""
        if self._entered and not self._waits():
            self._entered = False
            take_away(self.timeline)

    def _is_step(self) -> bool:
        return self._running or self._waits()

    @contextlib.contextmanager
    def forward(self, arguments) -> Iterator[None]:
        """Watch a forward pass inside the with statement; `arguments`: a nest of tensors and others."""
        self._enter()
        if self.start_bytes is None:
            self.timeline.track(tensors_in(arguments))
            self.timeline.begin()
            self.start_bytes = self.timeline.allocated_bytes
        self._running = True
        try:
            yield
        except BaseException:
            self.failed = True
            self.stop()
            raise
        finally:
            self._running = False
            self.forward_end = self.timeline.time

    def backward_asks(self) -> None:
        """Note that the backward pass asks for a tensor that the forward pass has saved."""
        if self.backward_start is None:
            self.backward_start = self.timeline.time

    def _optimizer_starts(self, optimizer, args, kwargs) -> None:
        if self.start_bytes is not None and not self._waits() and not on_fakes():
            self._enter()
            self._running = True
            if self.optimizer_start is None:
                self.optimizer_start = self.timeline.time
                self._found = len(self.timeline.found)  # what it reads besides is its state

    def _optimizer_ends(self, optimizer, args, kwargs) -> None:
        if not on_fakes():  # a step that is planned
            self._running = False
            self.pause()

    def __del__(self):  # of a plan that was dropped without `remove()`
        if hasattr(self, "_entered"):
            self.stop()

    def stop(self) -> None:
        """End the step."""
        if not self.timeline.ended:
            self.timeline.ended = True
            if self._entered:
                take_away(self.timeline)
            for hook in self._hooks:
                hook.remove()

    @property
    def found(self) -> list[int]:
        """Bytes of each tensor that was there from the start, seen before the optimizer's step."""
        return self.timeline.found[: self._found]

    def peak_bytes(self, state_bytes: int) -> int:
        """Peak before the optimizer's step, with `state_bytes` of the optimizer's state."""
        there = self.start_bytes + sum(self.found) + self.other_bytes + state_bytes
        return there + _highest(self.timeline.deltas[: self.optimizer_start])

    @property
    def loss_bytes(self) -> int:
        """See `Profile.loss_bytes`."""
        return _highest(self.timeline.deltas[self.forward_end : self.backward_start])


class Recording(Watch):
    """A step that is being recorded, from its first forward pass until `profile` or `stop`.

    `calls`: its forward passes so far, by what the caller knows them by; any may follow.  `seen`, of a
    profile: bytes of each tensor in it that is there from the start and belongs to the loop.
    """

    departures = spare_bytes = 0
    unchanged = False

    def __init__(self, model: nn.Module, first=None, held: Iterable[torch.Tensor] = (), held_bytes: int = 0):
        super().__init__(model, lambda: self.waits_for_backward, held, held_bytes)
        self.calls = [first]
        self.slices: dict[str, int] = {}  # blocks run whole
        self.tape = ProfilingTape(self.timeline, real=True)
        self.block_ended = self.tape.block_ended

    def run(self, forward: Callable, *args, **kwargs):
        """Run a forward pass of the step."""
        with self.forward((args, kwargs)):
            with self.tape:
                outputs = forward(*args, **kwargs)
            self.tape.forward_ended(outputs)
        return outputs

    def expects(self, call) -> bool:
        """Whether another forward pass belongs to the step: every one does."""
        self.calls.append(call)
        return True

    @property
    def waits_for_backward(self) -> bool:
        """Whether a backward pass has not released all that it needs."""
        return self.tape.open > 0

    def profile(self, state_bytes: int = 0) -> Profile:
        """The recorded step, as it will be next time; `state_bytes`: of the optimizer.

        Gradients that the step has left are there from the start of the next one.  So is what else it has
        left (the outputs of the model), which the next one makes again.
        """
        self.stop()
        timeline, tape = self.timeline, self.tape
        deltas = list(timeline.deltas)
        start = self.optimizer_start
        if start is None:
            start = max((time for time, _, _ in timeline.events), default=0)
        gradients = {storage_key(p.grad) for p in self.model.parameters() if p.grad is not None}
        left = {"gradients": 0, "optimizer": 0, "other": 0}
        self.seen = self.found
        for key, place in timeline.born.items():
            kind = "gradients" if key in gradients else "optimizer" if place >= start else "other"
            left[kind] += deltas[place]
            if kind == "other":
                self.seen.append(deltas[place])
            else:
                deltas[place] = 0
        left["optimizer"] = max(left["optimizer"], state_bytes)
        left["other"] += sum(self.found) + self.other_bytes
        tape.forget()
        return Profile(
            deltas=deltas,
            events=timeline.events,
            start_bytes=self.start_bytes + sum(left.values()),
            ops=tape.ops,
            buffers=tape.buffers,
            saved=tape.saved,
            segments=tape.segments,
            entered=tape.entered,
            forward_end=tape.forward_end,
            optimizer_start=start,
            fixed={"weights": self.weights_bytes, **left},
            inputs={},
        )


def _highest(deltas: list[int]) -> int:
    return int(np.cumsum([0, *deltas]).max())


def put_underneath(mode: TorchDispatchMode) -> None:
    """Enter `mode` below those that are entered, so that they can be left before it."""
    _push([mode, *_leave_all()])


def take_away(mode: TorchDispatchMode) -> None:
    """Leave `mode`, wherever it is among those that are entered."""
    _push([each for each in _leave_all() if each is not mode])


@contextlib.contextmanager
def modes_left() -> Iterator[None]:
    """Leave all modes inside the with statement: counters of the loop must not count what is planned."""
    entered = _leave_all()
    try:
        yield
    finally:
        _push(entered)


def _leave_all() -> list[TorchDispatchMode]:
    """Leave all modes; what is returned begins with the lowest."""
    return [_pop_mode() for _ in _get_current_dispatch_mode_stack()][::-1]


def _push(modes: list[TorchDispatchMode]) -> None:
    """Enter modes again, but those that have ended since: a plan may be collected while they are left."""
    for mode in modes:
        if not getattr(mode, "ended", False):
            _push_mode(mode)
