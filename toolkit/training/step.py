"""The steps that train: forward and backward in micro-batches, then the optimizer.

A step that runs out of memory under a plan is undone and repeated on a tighter plan, with the same random
numbers.  Otherwise out of memory ends the run, see `loop.fit`.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from toolkit.budget import (
    AutoCheckpoint,
    Checkpointing,
    DeviceMemory,
    format_bytes,
    is_out_of_memory,
    release_failed_backward,
    tensors_of,
)
from toolkit.budget.memory import rounded
from toolkit.budget.step import autocast, call
from toolkit.datasets.tasks import Task, split_targets
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.measure import FlopCounter
from toolkit.measure.memory import MemoryTrace, free_bytes
from toolkit.methods import METHODS, Hooks, set_train_mode
from toolkit.model import optimizer_of
from toolkit.training.result import FitResult

OUT_OF_MEMORY_RETRIES = 5  # of one step, under a plan; each for a peak lower by a twentieth


class NotFinite(Exception):
    """The loss is infinite or not a number."""


class Steps:
    """Trains `stepped` as an experiment says: its optimizer, gradient scaler, method's hooks and strategy.

    `stepped` is `model`, or with cached features the part of it that reads them.
    """

    def __init__(
        self,
        model: nn.Module,
        stepped: nn.Module,
        task: Task,
        experiment: Experiment,
        memory: DeviceMemory,
        total_steps: int,
    ):
        self.model, self.stepped, self.task, self.experiment = model, stepped, task, experiment
        self.memory, self.total_steps = memory, total_steps
        self.device = torch.device(experiment.device)
        self.optimizer = optimizer_of(model, experiment)
        self.hooks = METHODS[experiment.method].hooks(model)
        self.hooks.begin(total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=experiment.precision == "fp16")
        self._hits: torch.Tensor | None = None  # right answers of the present forward pass, in images
        self._penalty: torch.Tensor | None = None  # the method's part of its loss
        self._counted_steps: Counter = Counter()  # by batch size, and the kind of step under the method

    def state(self) -> dict:
        """All that the next steps depend on, besides the model's weights and random numbers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.hooks.state(),
        }

    def load_state(self, state: dict) -> None:
        """Continue from `state()`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.hooks.load_state(state["method"])

    def track(self) -> None:
        """Count what is on the device already, and start the peak from there."""
        self.memory.track(tensors_of(self.stepped))
        self.memory.track(value for s in self.optimizer.state.values() for value in s.values())
        self.memory.track(self.hooks.tensors)
        self.memory.reset_peak()

    @contextlib.contextmanager
    def checkpointing(self, blank_images: torch.Tensor, blank_targets, result: FitResult) -> Iterator[None]:
        """Wrap the model's blocks as the strategy says while the body of a with statement trains.

        A plan is made for the blank batch; its predicted peak goes into `result`.
        """
        experiment = self.experiment
        if experiment.strategy.plans:
            set_train_mode(self.stepped)  # which the plan is for
            self.blocks = AutoCheckpoint(
                self.stepped,
                experiment.budget_bytes,
                (self.task.inputs(blank_images, blank_targets), blank_targets),
                loss=self._loss,
                optimizer=self.optimizer,
                precision=experiment.precision,
                micro_batches=experiment.micro_batch_size or True,
                held_bytes=held_bytes(self.model, self.hooks, plans=True),
            )
            self._hits = self._penalty = None
            result.predicted_peak_bytes = self.blocks.plan.peak_bytes
            self._check_free(result.predicted_peak_bytes)
        else:
            self.blocks = Checkpointing(
                self.stepped,
                experiment.strategy,
                memory=self.memory,
                budget_bytes=experiment.budget_bytes,
            )
        try:
            with self.blocks:
                yield
        finally:
            self.hooks.end(self.optimizer)

    def _check_free(self, peak_bytes: int) -> None:
        """Tell whether the plan fits what is free now; raises `torch.OutOfMemoryError` if it does not."""
        free = free_bytes(self.device)
        if free is None:
            return
        free += self.memory.allocated_bytes
        text = f"the plan needs {format_bytes(peak_bytes)}, {format_bytes(free)} are free on {self.device}"
        if peak_bytes > free:
            raise torch.OutOfMemoryError(f"{text}: others hold the rest; later, try again by --retry oom")
        print(text)

    def run(self, images: torch.Tensor, targets, result: FitResult) -> tuple[float, float]:
        """Run one step on one batch; returns its loss and the right answers in images.

        Updates `result`.  Raises `NotFinite` before a loss that is not finite reaches the weights.
        """
        self._set_lr(result.steps + 1)
        # The first step lacks the optimizer's state.
        tracing = not result.memory_trace and result.steps == min(1, self.total_steps - 1)
        trace = MemoryTrace(self.memory, self.stepped) if tracing else contextlib.nullcontext()
        counter = FlopCounter() if tracing else contextlib.nullcontext()
        with self._counted(len(images)), trace, counter:
            loss, hits = self._forward_and_backward(images, targets, result)
            if not math.isfinite(loss):
                raise NotFinite(f"loss {loss} at step {result.steps + 1}")
            if tracing:
                trace.start_optimizer()
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.hooks.after_step(result.steps + 1, finite=self.scaler.get_scale() >= scale)
            self.optimizer.zero_grad(set_to_none=True)
        if tracing:
            result.memory_trace = trace.segments
            for phase in ("forward", "backward", "recompute"):
                result.step_flops[phase] = getattr(counter.flops, phase) / len(images)
            result.uncounted = sorted(counter.uncounted)
        result.steps += 1
        result.checkpointed_blocks = len(self.blocks.checkpointed)
        result.read_peaks(self.memory)
        if isinstance(self.blocks, AutoCheckpoint):
            self.blocks.check(self.memory.peak_bytes)
        return loss, hits

    def _set_lr(self, step: int) -> None:
        """Linear warm-up to the peak learning rate, then a cosine to zero."""
        warmup = self.experiment.warmup_fraction * self.total_steps
        if step < warmup:
            factor = step / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.experiment.lr * factor

    def _counted(self, batch_size: int) -> AbstractContextManager:
        """The memory counter, or nothing if there is nothing new to count.

        Counting on the CPU slows a small step by a third.  Equal shapes take equal bytes, so the first
        two steps of each batch size and of each kind that the method knows are enough (the very first lacks
        the optimizer's state), unless the strategy reads the counter in every step.
        """
        kind = batch_size, self.hooks.step_kind(self.optimizer)
        if self.experiment.strategy.reads_memory or self._counted_steps[kind] < 2:
            self._counted_steps[kind] += 1
            return self.memory
        return contextlib.nullcontext()

    def _forward_and_backward(self, images: torch.Tensor, targets, result: FitResult) -> tuple[float, float]:
        """Compute the gradients of one batch, under a plan again and again until they fit in memory."""
        if not isinstance(self.blocks, AutoCheckpoint):
            return self._passes(images, targets, result)
        before = self._before_passes()
        for _ in range(OUT_OF_MEMORY_RETRIES):
            try:
                return self._passes(images, targets, result)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            result.out_of_memory_retries += 1
            self._undo_passes(before, result)
            with contextlib.suppress(InputError):  # no tighter plan is left: what was freed may be enough
                self.blocks.tighten(self.blocks.plan.peak_bytes * 19 // 20)
        return self._passes(images, targets, result)

    def _passes(self, images: torch.Tensor, targets, result: FitResult) -> tuple[float, float]:
        """Forward and backward pass, slice by slice if there are micro-batches."""
        micro = self.experiment.micro_batch_size or len(images)
        if isinstance(self.blocks, AutoCheckpoint):
            micro = self.blocks.plan.micro_batch_size
        result.micro_batch_size = micro
        batch_loss, hits = 0.0, 0.0
        for image_slice, target_slice in zip(images.split(micro), split_targets(targets, micro)):
            share = len(image_slice) / len(images)
            x = image_slice.to(self.device, non_blocking=True)  # (micro, 3, H, W)
            y = tree_map(lambda t: t.to(self.device, non_blocking=True), target_slice)
            self.memory.track([x, *tree_leaves(y)])
            with autocast(self.device, self.experiment.precision):
                outputs = call(self.stepped, self.task.inputs(x, y))
                # Weighted so that the slices' gradients add up to those of the whole batch's mean.
                loss = self._loss(outputs, y) * share
            self.scaler.scale(loss).backward()
            batch_loss += loss.item()
            if self._penalty is not None:
                batch_loss -= self._penalty.item() * share
            hits += 0 if self._hits is None else self._hits.item()
            self._hits = self._penalty = None
            del x, y, outputs, loss
        return batch_loss, hits

    def _loss(self, outputs, targets) -> torch.Tensor:
        """The task's loss plus the method's penalty.

        The right answers are counted here, so that plans, which call this function, know of their bytes.
        """
        if self.task.hits:
            self._hits = self.task.hits(outputs, targets)
        loss = self.task.loss(outputs, targets)
        penalty = self.hooks.penalty()
        if penalty is None:
            return loss
        self._penalty = penalty.detach()
        return loss + penalty

    def _before_passes(self) -> dict:
        """What forward and backward passes change besides gradients: random numbers, running statistics."""
        buffers = [buffer.clone() for buffer in _running_buffers(self.model)]
        return rng_state(self.device) | {"buffers": buffers}

    def _undo_passes(self, before: dict, result: FitResult) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        release_failed_backward()
        result.read_peaks(self.memory)
        self.memory.reset_peak()  # what follows has another plan
        set_rng_state(before)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with torch.no_grad():
            for buffer, value in zip(_running_buffers(self.model), before["buffers"]):
                buffer.copy_(value)


def rng_state(device: torch.device) -> dict:
    """The states of torch's random number generators."""
    cuda = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    return {"rng_cpu": torch.get_rng_state(), "rng_cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Continue from `rng_state`."""
    torch.set_rng_state(state["rng_cpu"])
    if state["rng_cuda"]:
        torch.cuda.set_rng_state_all(state["rng_cuda"])


def held_bytes(model: nn.Module, hooks: Hooks, plans: bool) -> int:
    """Bytes that `fit` holds during a step besides model, batch and optimizer: tensors of the method, and
    under a plan copies of buffers for repeating the step."""
    copied = _running_buffers(model) if plans else []
    return sum(rounded(b.nbytes) for b in copied) + hooks.held_bytes


def _running_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that a forward pass may change: of modules in training mode, so not of frozen batch norms."""
    return [b for module in model.modules() if module.training for b in module.buffers(recurse=False)]
