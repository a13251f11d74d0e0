"""What the strategies without a plan do with one training step, under any budget.

The threshold rule checkpoints the blocks that begin with some limit allocated: under no limit no block,
which is the strategy "none", and under a limit of 0 each, which is "static".
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from toolkit.budget import Checkpointing, TensorMemory, tensors_of
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.step import make_state, on_fake_tensors, optimizer_like, run_step
from toolkit.forecast.steps import Step
from toolkit.training.loop import held_bytes


@dataclass(frozen=True)
class RuleStep:
    """What a step takes under every limit in (above, up_to] bytes."""

    above: float
    up_to: float
    peak_bytes: int
    forward_flops: int
    recompute_flops: int

    @property
    def recompute_pct(self) -> float:
        """Recomputed FLOPs in per cent of the forward pass's."""
        return 100 * self.recompute_flops / self.forward_flops if self.forward_flops else 0.0


class _Readings:
    """Stands for `memory`, and notes every number that the rule reads."""

    def __init__(self, memory: TensorMemory):
        self._memory = memory
        self.bytes: list[int] = []

    @property
    def allocated_bytes(self) -> int:
        self.bytes.append(self._memory.allocated_bytes)
        return self.bytes[-1]


def rule_step(step: Step, precision: str, limit: float) -> RuleStep:
    """Run a step on fake tensors; blocks that begin with `limit` bytes or more are checkpointed.

    The rule compares the limit with what is allocated as each block begins.  So the step is the same under
    every limit between two of these numbers.  Without a limit no block is needed: some models have none.
    """
    make_optimizer = optimizer_like(step.optimizer, step.model)
    with on_fake_tensors(step.model, step.batch) as batch:
        memory = TensorMemory(batch[0].device)
        memory.track([*tensors_of(step.model), *batch])
        stepper, counter = make_optimizer(step.model), FlopCounter()
        readings = _Readings(memory)
        strategy = "none" if limit == math.inf else "threshold"
        rule = Checkpointing(step.model, strategy, memory=readings, budget_bytes=0)
        rule.threshold_bytes = limit
        with memory, rule:
            make_state(step.model, stepper)
            memory.reset_peak()
            run_step(step.model, batch, step.loss, stepper, precision, counter)
    forward, recompute = (
        sum(count for op, count in counter.counts[phase].items() if op not in NORMS)
        for phase in ("forward", "recompute")
    )
    nothing_read = sys.float_info.max if limit == math.inf else -math.inf
    return RuleStep(
        above=max((size for size in readings.bytes if size < limit), default=nothing_read),
        up_to=min((size for size in readings.bytes if size >= limit), default=math.inf),
        peak_bytes=memory.peak_bytes + held_bytes(step.model, "none"),
        forward_flops=forward,
        recompute_flops=recompute,
    )
