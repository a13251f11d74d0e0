"""One training step under a strategy that decides block by block, under any budget."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from toolkit.budget import Checkpointing, Strategy, TensorMemory, tensors_of
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.step import make_state, on_fake_tensors, optimizer_like, run_step
from toolkit.forecast.steps import Step
from toolkit.training.loop import held_bytes


@dataclass(frozen=True)
class AtLimit(Strategy):
    """Checkpoint the blocks that start with `limit` bytes or more allocated."""

    limit: float = math.inf

    def limit_bytes(self, budget_bytes: int) -> float:
        return self.limit


@dataclass(frozen=True)
class RuleStep:
    """The costs of a step under every limit in (above, up_to] bytes."""

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
    """Allocated bytes of `memory` and `extra` ones, as a strategy reads them; keeps every reading."""

    def __init__(self, memory: TensorMemory, extra: int):
        self._memory, self._extra = memory, extra
        self.bytes: list[int] = []

    @property
    def allocated_bytes(self) -> int:
        self.bytes.append(self._memory.allocated_bytes + self._extra)
        return self.bytes[-1]


def rule_step(
    step: Step, precision: str, strategy: Strategy, budget_bytes: int = 0, extra_bytes: int = 0
) -> RuleStep:
    """Run a step on fake tensors under `strategy`, which sees `extra_bytes` more than are allocated.

    A limit is compared with the allocated bytes as each block starts, so the step is the same under every
    limit between two of these numbers.
    """
    limit = strategy.limit_bytes(budget_bytes)
    if limit is None:  # nothing is known of other limits
        limit = math.inf
    make_optimizer = optimizer_like(step.optimizer, step.model)
    with on_fake_tensors(step.model, step.batch) as batch:
        memory = TensorMemory(batch[0].device)
        memory.track([*tensors_of(step.model), *batch])
        stepper, counter = make_optimizer(step.model), FlopCounter()
        readings = _Readings(memory, extra_bytes)
        rule = Checkpointing(step.model, strategy, memory=readings, budget_bytes=budget_bytes)
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
        peak_bytes=memory.peak_bytes + held_bytes(step.model, step.hooks, plans=False),
        forward_flops=forward,
        recompute_flops=recompute,
    )
