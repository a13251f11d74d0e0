"""Records one step of a training loop as it runs: the profile of what no fake tensors can show.

Detectors, masks that depend on values, losses outside the model, several forward passes before one backward
pass: the step runs with each block's input kept and the rest computed again, while a timeline underneath the
loop notes what it allocates, reads and frees.  `Recording.profile` is what `profile.profile` makes of fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

from toolkit.budget.memory import tensors_of
from toolkit.budget.profile import Profile
from toolkit.budget.step import tensors_in
from toolkit.budget.tape import storage_key
from toolkit.budget.timeline import ProfilingTape, Timeline


class Recording:
    """A step that is being recorded, from its first forward pass until `profile` or `stop`.

    `held`: tensors that the loop holds besides the model and that the step does not read; `held_bytes`: the
    bytes of others.
    """

    def __init__(self, model: nn.Module, held: Iterable[torch.Tensor] = (), held_bytes: int = 0):
        self.model = model
        self.device = next(model.parameters()).device
        self.timeline = Timeline(self.device, finds=True)
        self.timeline.track(tensors_of(model))
        self.weights_bytes = self.timeline.allocated_bytes
        self.timeline.track(p.grad for p in model.parameters() if p.grad is not None)
        self.timeline.track(held)
        self.other_bytes = held_bytes
        if self.device.type == "cuda":  # what the loop holds is in the allocator's count
            there = torch.cuda.memory_allocated(self.device) - self.timeline.allocated_bytes
            self.other_bytes, self.timeline.finds = max(0, there), False
        self.tape = ProfilingTape(self.timeline, real=True)
        self.optimizer_start: int | None = None
        self._hook = register_optimizer_step_pre_hook(self._optimizer_starts)
        _put_underneath(self.timeline)

    def run(self, forward: Callable, *args, **kwargs):
        """Run a forward pass of the step."""
        if not self.tape.segments:
            self.timeline.track(tensors_in((args, kwargs)))
            self.timeline.begin()
            self.start_bytes = self.timeline.allocated_bytes
        try:
            with self.tape:
                outputs = forward(*args, **kwargs)
        except BaseException:
            self.stop()
            raise
        self.tape.forward_ended(outputs)
        return outputs

    @property
    def waits_for_backward(self) -> bool:
        """Whether a backward pass has not released all that it needs."""
        return self.tape.open > 0

    def _optimizer_starts(self, optimizer, args, kwargs) -> None:
        if self.optimizer_start is None and not self.waits_for_backward:
            self.optimizer_start = self.timeline.time

    def stop(self) -> None:
        """End the recording."""
        if not self.timeline.ended:
            self.timeline.ended = True
            _take_away(self.timeline)
            self._hook.remove()

    def profile(self, state_bytes: int = 0) -> Profile:
        """The recorded step, as it will be next time; `state_bytes`: of an optimizer that made no step.

        Gradients and the optimizer's state that the step has left are there from the start of the next one.
        So is what else it has left (the outputs of the model), which the next one makes again.
        """
        self.stop()
        timeline, tape = self.timeline, self.tape
        deltas = list(timeline.deltas)
        stepped = self.optimizer_start is not None
        start = self.optimizer_start if stepped else max((time for time, _, _ in timeline.events), default=0)
        gradients = {storage_key(p.grad) for p in self.model.parameters() if p.grad is not None}
        left = {"optimizer": 0 if stepped else state_bytes, "gradients": 0, "other": 0}
        for key, place in timeline.born.items():
            kind = "gradients" if key in gradients else "optimizer" if stepped and place >= start else "other"
            left[kind] += deltas[place]
            if kind != "other":
                deltas[place] = 0
        left["other"] += timeline.found_bytes + self.other_bytes
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


def _put_underneath(mode: TorchDispatchMode) -> None:
    """Enter `mode` below those that are entered, so that they can be left before it."""
    entered = [_pop_mode() for _ in _get_current_dispatch_mode_stack()]
    for each in (mode, *reversed(entered)):
        _push_mode(each)


def _take_away(mode: TorchDispatchMode) -> None:
    """Leave `mode`, wherever it is among those that are entered."""
    entered = [_pop_mode() for _ in _get_current_dispatch_mode_stack()]
    for each in reversed(entered):
        if each is not mode:
            _push_mode(each)
