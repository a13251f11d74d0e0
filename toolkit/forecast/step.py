"""The training step of an experiment, before anything is downloaded: costs under a strategy, and memory.

Trained parameters are only a part of the memory.  Most of what backward needs is kept for layers that are not
trained at all, because the gradient has to pass through them: `step_memory` counts it, tensor by tensor, in a
step that really runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from toolkit.backbones import data_config
from toolkit.budget import Strategy, device_memory, tensors_of
from toolkit.budget.optimizers import make_state
from toolkit.budget.plan import observe
from toolkit.budget.step import run_step
from toolkit.datasets import task_of
from toolkit.experiment import Experiment
from toolkit.measure.memory import KeptTensors, MemoryTrace
from toolkit.methods import METHODS, Hooks, adapt, set_train_mode, summarize
from toolkit.model import build_model, optimizer_of
from toolkit.training.feature_cache import FeatureModel, layout_of
from toolkit.training.step import held_bytes


@dataclass(frozen=True)
class Step:
    """An adapted model with random weights in training mode, a batch of zeros, loss and optimizer."""

    model: nn.Module
    whole: nn.Module  # `model`, with its backbone even if cached features replace that
    batch: tuple[Any, Any]  # inputs of images (B, C, H, W), and targets
    loss: Callable[[Any, Any], torch.Tensor]  # loss(outputs, targets)
    optimizer: torch.optim.Optimizer
    hooks: Hooks = field(default_factory=Hooks)


def step_of(experiment: Experiment, num_classes: int) -> Step:
    """The step of `experiment` on images of `num_classes` classes, on its device.

    Raises `InputError` for a model that cannot be built or adapted.
    """
    model = build_model(experiment, num_classes, pretrained=False)
    model = adapt(model, experiment.method, **experiment.method_options).to(experiment.device)
    whole, task, size = model, task_of(experiment.dataset), experiment.batch_size
    _, *sides = shape = data_config(model)["input_size"]
    dtype = torch.float32
    if experiment.feature_cache:
        layout = layout_of(model, experiment.precision)
        model, shape, dtype = FeatureModel(model, layout), (sum(layout.sizes),), layout.dtype
    set_train_mode(model)
    images = torch.zeros(size, *shape, dtype=dtype, device=experiment.device)
    targets = tree_map(lambda t: t.to(experiment.device), task.zeros(size, *sides))
    hooks = METHODS[experiment.method].hooks(whole)

    def loss(outputs: Any, targets: Any) -> torch.Tensor:
        loss, penalty = task.loss(outputs, targets), hooks.penalty()
        return loss if penalty is None else loss + penalty

    batch = task.inputs(images, targets), targets
    return Step(model, whole, batch, loss, optimizer_of(model, experiment), hooks)


@dataclass(frozen=True)
class AtLimit(Strategy):
    """Checkpoint the blocks that start with `limit` bytes or more allocated."""

    limit: float = math.inf

    def limit_bytes(self, budget_bytes: int) -> float:
        return self.limit


@dataclass(frozen=True)
class StepCost:
    """The costs of a step under every limit in (above, up_to] bytes."""

    above: float
    up_to: float
    peak_bytes: int
    recompute_pct: float  # recomputed FLOPs as a percentage of the forward pass
    memory_bytes: tuple[int, ...]  # allocated at every operator


def step_under(
    step: Step, precision: str, strategy: Strategy, budget_bytes: int = 0, extra_bytes: int = 0
) -> StepCost:
    """The costs of a step under `strategy`, which sees `extra_bytes` more than are allocated.

    A limit is compared with the allocated bytes as each block starts, so the step is the same under every
    limit between two of these numbers.
    """
    ran = observe(
        step.model, step.batch, strategy, budget_bytes, loss=step.loss, optimizer=step.optimizer,
        precision=precision, extra_bytes=extra_bytes,
    )  # fmt: skip
    limit = strategy.limit_bytes(budget_bytes)
    if limit is None:  # nothing is known of other limits
        limit = math.inf
    nothing_read = sys.float_info.max if limit == math.inf else -math.inf
    return StepCost(
        above=max((size for size in ran.seen_bytes if size < limit), default=nothing_read),
        up_to=min((size for size in ran.seen_bytes if size >= limit), default=math.inf),
        peak_bytes=ran.peak_bytes + held_bytes(step.model, step.hooks, plans=False),
        recompute_pct=100 * ran.recompute_flops / ran.forward_flops if ran.forward_flops else 0.0,
        memory_bytes=ran.memory_bytes,
    )


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step whose optimizer has its state."""

    kept_bytes: int  # saved by autograd at the end of the forward pass, without weights and buffers
    peak_bytes: int  # highest moment of the whole step, with weights and optimizer state
    trained_parameters: int
    trace: list[dict]  # see `MemoryTrace.segments`


def step_memory(experiment: Experiment, num_classes: int) -> StepMemory:
    """Run a step of `experiment` on a batch of zeros, with random weights and nothing checkpointed.

    A storage that several operators keep is counted once.  Raises `InputError` for a model that cannot be
    built or adapted.
    """
    step = step_of(experiment, num_classes)
    kept = KeptTensors(tensors_of(step.model))
    memory = device_memory(torch.device(experiment.device))
    memory.track(tensors_of(step.model))
    memory.track(tree_leaves(step.batch))
    trace = MemoryTrace(memory, step.model)
    with memory:
        make_state(step.model, step.optimizer)
        memory.reset_peak()
        run_step(step.model, step.batch, step.loss, step.optimizer, experiment.precision, trace, kept)
    return StepMemory(kept.forward_bytes, memory.peak_bytes, summarize(step.model).trainable, trace.segments)


def step_memories(experiments: Iterable[Experiment], num_classes: int) -> dict[str, StepMemory]:
    """`step_memory` of each experiment, by its method."""
    return {e.method: step_memory(e, num_classes) for e in experiments}


def memory_table(steps: Mapping[str, StepMemory]) -> pd.DataFrame:
    """One row for each step: trained parameters, bytes kept for backward, and the peak."""
    return pd.DataFrame(
        {
            "trained": {name: f"{step.trained_parameters:,}" for name, step in steps.items()},
            "kept for backward (MiB)": {name: step.kept_bytes / 2**20 for name, step in steps.items()},
            "peak of the step (MiB)": {name: step.peak_bytes / 2**20 for name, step in steps.items()},
        }
    )
