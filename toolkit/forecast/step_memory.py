"""Bytes that a training step of a method keeps for backward, and its peak.

Trained parameters are only a part of the memory.  Most of what backward needs is kept for layers that are not
trained at all, because the gradient has to pass through them.  Here it is counted, tensor by tensor, in a
step that really runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from toolkit.budget import device_memory, tensors_of
from toolkit.budget.step import make_state, run_step
from toolkit.experiment import Experiment
from toolkit.forecast.step import step_of
from toolkit.measure.memory import KeptTensors, MemoryTrace
from toolkit.methods import summarize

MIB = 2**20


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
            "kept for backward (MiB)": {name: step.kept_bytes / MIB for name, step in steps.items()},
            "peak of the step (MiB)": {name: step.peak_bytes / MIB for name, step in steps.items()},
        }
    )
