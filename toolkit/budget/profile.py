"""Profiles one training step on fake tensors: its allocations over time, and the costs of each operator.

The step runs under a tape that keeps nothing, with placeholders where backward asks for a saved tensor, so
its memory over time (`Profile.base`) excludes all activations that backward needs.  `levels.simulate` adds
the activations that a plan keeps or recomputes: one profile serves all plans.  No memory is taken on the
device, nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_iter, tree_map_only

from toolkit.budget.fakes import Others, on_fake_tensors, swept
from toolkit.budget.found import SHARED
from toolkit.budget.integers import RealIntegers, with_values
from toolkit.budget.memory import TensorMemory, tensors_of
from toolkit.budget.optimizers import Stepper, deposit_gradients, optimizer_like
from toolkit.budget.own_checkpoints import NOTE
from toolkit.budget.step import autocast, call, loss_of, segmented, split_batch
from toolkit.budget.timeline import BufferCost, OpCost, ProfilingTape, SavedCost, Timeline


@dataclass
class Profile:
    """One training step.  Times are indices into `base`: the number of allocations and releases before them.

    `events`, in order: (time, kind, index) with the kinds "op" (an operator has run), "died" (the forward
    pass released a buffer), "pack", "unpack", "release" (of a saved tensor), "end" (of a forward pass, whose
    last segment it names), "backward" (a segment's backward pass begins).
    """

    deltas: list[int]  # bytes, one per allocation or release
    events: list[tuple[int, str, int]]
    start_bytes: int  # parameters, buffers, optimizer state and batch, as the step begins
    ops: list[OpCost]
    buffers: list[BufferCost]
    saved: list[SavedCost]
    segments: list[str]  # named after the block that ends each; the last of a forward pass: ""
    entered: list[int]  # when each segment began
    forward_end: int  # of the last forward pass
    optimizer_start: int
    fixed: dict[str, int]  # bytes by kind
    inputs: dict[str, torch.Size]  # of blocks that only map one tensor (batch, ...) to another: input shapes
    notes: tuple[str, ...] = ()

    @property
    def batch_statistics(self) -> bool:
        """Whether a batch norm normalises by the statistics of the batch."""
        return any(op.coupled and "batch_norm" in op.name for op in self.ops)

    @cached_property
    def backward_starts(self) -> dict[int, int]:
        """Segment -> position in `events` where its backward pass begins, in the order of that pass."""
        starts: dict[int, int] = {}
        for position, (_, kind, index) in enumerate(self.events):
            if kind == "backward":
                starts.setdefault(index, position)
        return starts

    @cached_property
    def loss_bytes(self) -> int:
        """Highest bytes after the forward pass, until backward asks for a tensor that it has saved; more than
        at its end."""
        end = next((time for time, kind, _ in self.events if kind == "unpack"), self.optimizer_start)
        during = self.base[self.forward_end : end + 1]
        return int(during.max() - during[0]) if len(during) else 0

    @cached_property
    def base(self) -> np.ndarray:
        """Allocated bytes over the step, without saved activations."""
        return self.start_bytes + np.concatenate([[0], np.cumsum(self.deltas)])


@swept
def profile(
    model: nn.Module,
    batch,
    blocks: dict[str, nn.Module],
    *,
    loss: Callable | None = None,
    optimizer="adamw",
    precision: str = "fp32",
    micro_batch_size: int | None = None,
    slices: dict[str, int] | None = None,
    held_bytes: int = 0,
    accumulates: bool = False,
) -> Profile:
    """Profile one training step of `model` in its present mode.

    `batch`: inputs or (inputs, targets), of the shapes and on the device that training will use.
    `micro_batch_size`: profile only the first samples, with the gradients of earlier micro-batches if the
    batch has more.  The optimizer always has its state.  `slices`: block -> number of slices that its batch
    runs in. `held_bytes`: other tensors that exist all the time.  `accumulates`: gradients are there already.
    Raises `InputError` if the model cannot run on fake tensors.
    """
    make_optimizer = optimizer_like(optimizer, model)
    others = Others(optimizer, loss)
    with on_fake_tensors(model, batch, others) as fakes, RealIntegers():
        fake_batch = with_values(fakes, batch)
        inputs, targets, is_part = _first_samples(fake_batch, micro_batch_size)
        accumulates |= is_part
        device = next(model.parameters()).device
        timeline = Timeline(device)
        timeline.track(tensors_of(model))
        weights_bytes = timeline.allocated_bytes
        timeline.track(t for t in tree_iter(fake_batch) if isinstance(t, torch.Tensor))
        batch_bytes = timeline.allocated_bytes - weights_bytes
        trained = [p for p in model.parameters() if p.requires_grad]
        with timeline:
            timeline.track(others.state)
            stepper = Stepper(make_optimizer(model), model, others.state)
            deposit_gradients(trained)
            in_hooks = any(parameter.grad is None for parameter in trained)  # an optimizer took them
            stepper.step()
            with_gradients = timeline.allocated_bytes
            stepper.zero_grad(set_to_none=True)
            grad_bytes = with_gradients - timeline.allocated_bytes
            state_bytes = timeline.allocated_bytes - weights_bytes - batch_bytes

            def run_passes() -> ProfilingTape:
                """Run a forward and a backward pass."""
                tape = ProfilingTape(timeline)
                with autocast(device, precision):
                    with tape, segmented(blocks, tape.block_ended, slices):
                        outputs = call(model, inputs)
                    tape.forward_ended(())
                    value = loss_of(outputs, targets, loss)
                tape.backward_begins(tape.tails[-1])
                value.backward()
                return tape

            timeline.begin()
            if accumulates and in_hooks:  # hooks may behave differently in the first micro-batch
                run_passes().forget()
                timeline.again()
            elif accumulates:
                deposit_gradients(trained)
                timeline.begin()
            start_bytes = timeline.allocated_bytes + held_bytes
            tape = run_passes()
            timeline.take_as_before()
            optimizer_start = timeline.time
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            timeline.ended = True
            tape.forget()
    return Profile(
        deltas=timeline.deltas,
        events=timeline.events,
        start_bytes=start_bytes,
        ops=tape.ops,
        buffers=tape.buffers,
        saved=tape.saved,
        segments=tape.segments,
        entered=tape.entered,
        forward_end=tape.forward_end,
        optimizer_start=optimizer_start,
        fixed={
            "weights": weights_bytes,
            "batch": batch_bytes,
            "gradients": grad_bytes,
            "optimizer": state_bytes,
            **({"other": held_bytes} if held_bytes else {}),
        },
        inputs={name: shape for name, shape in tape.inputs.items() if _is_pure(blocks[name], others.effects)},
        notes=tuple(filter(None, (stepper.note, NOTE if tape.own_checkpoints() else ""))),
    )


def _is_pure(block: nn.Module, effects: set) -> bool:
    """Whether calls of `block` change nothing but their output, and run nobody's hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = list(block.modules())
    return not effects & {SHARED, *parts} and not any(getattr(m, kind) for m in parts for kind in hooks)


@swept
def state_bytes_of(optimizer, model: nn.Module) -> int:
    """Bytes of the state that an optimizer has after its first step; see `profile`."""
    make_optimizer = optimizer_like(optimizer, model)
    device = next(model.parameters()).device
    others = Others(optimizer, None)
    with on_fake_tensors(model, (), others), RealIntegers(), TensorMemory(device) as memory:
        memory.track(tensors_of(model))
        before = memory.allocated_bytes
        memory.track(others.state)
        stepper = Stepper(make_optimizer(model), model, others.state)
        deposit_gradients(p for p in model.parameters() if p.requires_grad)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        return memory.allocated_bytes - before


def _first_samples(batch, count: int | None) -> tuple:
    """Inputs and targets of the first `count` samples, and whether the batch has more."""
    total = next(len(leaf) for leaf in tree_iter(batch) if isinstance(leaf, torch.Tensor))
    if count is None or count >= total:
        return *split_batch(batch), False
    first = tree_map_only(
        torch.Tensor, lambda t: t[:count] if t.dim() and len(t) == total else t, split_batch(batch)
    )
    return *first, True
