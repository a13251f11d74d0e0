"""What any budget does to an experiment's training step, before anything trains.

`Explorer` profiles the step once and then answers for every budget; `widgets.BudgetExplorer` is the slider
on top.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from toolkit import plots
from toolkit.budget import (
    Checkpointing,
    Plan,
    Planner,
    TensorMemory,
    format_bytes,
    parse_bytes,
    tensors_of,
)
from toolkit.budget.checkpointing import RULES
from toolkit.budget.fake_step import on_fake_tensors
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.step import autocast, optimizer_like
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.files import write_atomically
from toolkit.paths import NOTEBOOKS
from toolkit.preview import step_of
from toolkit.training import held_bytes

MARKS = tuple(gigabytes * 10**9 for gigabytes in (2, 4, 6, 8))  # of common cards
STOPS = 40  # of the slider


@dataclass(frozen=True)
class _Ran:
    """A step of the threshold rule: what it takes under every limit in (above, up_to] bytes."""

    above: float
    up_to: float
    peak_bytes: int
    forward_flops: int
    recompute_flops: int


class _Readings:
    """Stands for `memory`, and notes every number that the rule reads."""

    def __init__(self, memory: TensorMemory):
        self._memory = memory
        self.bytes: list[int] = []

    @property
    def allocated_bytes(self) -> int:
        self.bytes.append(self._memory.allocated_bytes)
        return self.bytes[-1]


class Explorer:
    """All plans of one training step of `experiment` on images of `num_classes` classes.

    Random weights, fake tensors: no download, and no memory but that of the weights and one batch.  The
    experiment's own budget and checkpointing do not matter: every budget and strategy is answered.
    Budgets are bytes or text like "2GB", and hold tensors only: the context of a GPU comes on top.
    Raises `InputError` for a model that cannot be built, adapted or profiled.
    """

    def __init__(self, experiment: Experiment, num_classes: int):
        if num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}.")
        self.experiment = e = replace(experiment, checkpointing="planned")
        step = step_of(e, num_classes)
        self.model, self._batch, self._loss = step.model, step.batch, step.loss
        self.planner = Planner(
            self.model, self._batch, loss=self._loss, precision=e.precision,
            held_bytes=held_bytes(self.model, "planned"),
        )  # fmt: skip
        self._plans: dict[int, Plan] = {}
        sizes = self._micro_batch_sizes()
        for size in tqdm(sizes, desc="profiling", unit="size", leave=False):
            self.planner.chain(size, size == e.batch_size)
        self._without = self.planner.plan(1 << 62)
        smallest = min(self.planner.smallest_bytes(size) for size in {sizes[0], sizes[-1]})
        self._rules = self._run_rules()
        self._range = smallest, max(smallest, self._rules[0].peak_bytes)

    def _micro_batch_sizes(self) -> list[int]:
        """The sizes that the planner chooses among, the largest first."""
        size = self.experiment.micro_batch_size
        if size:
            return [size]
        sizes = [self.experiment.batch_size]
        if not self.planner.chain(sizes[0], False).profile.batch_statistics:
            while sizes[-1] > 1:
                sizes.append(-(-sizes[-1] // 2))
        return sizes

    def range(self) -> tuple[int, int]:
        """Bytes of the smallest budget that a plan is found for, and of the step without checkpointing."""
        return self._range

    @property
    def marks(self) -> list[int]:
        """Those of 2, 4, 6 and 8 GB that lie within the range."""
        low, high = self._range
        return [mark for mark in MARKS if low <= mark <= high]

    @property
    def stops(self) -> list[int]:
        """Budgets for a slider: evenly spaced logarithms over the range, and the marks."""
        spaced = np.geomspace(*self._range, STOPS)
        return sorted({*map(int, np.ceil(spaced)), *self.marks})

    def plan(self, budget: int | str) -> Plan:
        """The fastest plan, in micro-batches where these are faster.  Raises `InputError` if nothing fits."""
        size = parse_bytes(budget)
        if size not in self._plans:
            micro_batches = self.experiment.micro_batch_size or True
            self._plans[size] = self.planner.plan(size, micro_batches=micro_batches)
        return self._plans[size]

    def table(self, budget: int | str) -> pd.DataFrame:
        """One row per strategy: strategy, budget_bytes, peak_bytes (predicted), recompute_pct (of the
        forward pass's FLOPs), step_seconds (estimated), micro_batch_size, within_budget.

        Only "planned" is in micro-batches; the others are of the whole batch.
        """
        size = parse_bytes(budget)
        rules = [self._rule_plan(strategy, size) for strategy in RULES]
        return pd.DataFrame(map(self._row, (*rules, self.plan(size))))

    def curve(self) -> pd.DataFrame:
        """The planned rows of `table` at all stops, and the rows of "none" and "static"."""
        rows = [self._row(self.plan(size)) for size in self.stops]
        return pd.concat([pd.DataFrame(rows), self.table(self.stops[-1])[:2]], ignore_index=True)

    def summary(self, budget: int | str) -> pd.DataFrame:
        """`table` for people."""
        table = self.table(budget)
        return pd.DataFrame(
            {
                "strategy": table.strategy,
                "predicted peak": table.peak_bytes.map(format_bytes),
                "recomputed": table.recompute_pct.map("{:.1f} %".format),
                "step, estimated": (1000 * table.step_seconds).map("{:.1f} ms".format),
                "images per pass": table.micro_batch_size,
                "within budget": table.within_budget.map({True: "yes", False: "no"}),
            }
        )

    def figure(self, budget: int | str) -> Figure:
        """Memory over the planned step, and what each block does."""
        return plots.plan_over_step(self.plan(budget), without=self._without)

    def write(self, budget: int | str, path: Path) -> str:
        """Write the experiment with this budget to `path`; returns the command that runs it.

        The file holds the parameters of `finetune.ipynb`, in the YAML that papermill reads.  Raises
        `InputError` if no plan fits the budget, or `path` is a folder.
        """
        path = Path(path).resolve()
        if path.is_dir():
            raise InputError(f"parameters cannot be written to {path}: it is a folder; name a file in it.")
        chosen = replace(self.experiment, budget=str(self.plan(budget).budget_bytes))
        # Not json.dumps: it writes 5e-05, which YAML takes for text.
        write_atomically(path, yaml.safe_dump(chosen.to_dict(), sort_keys=False).encode())
        notebook, output = NOTEBOOKS / "finetune.ipynb", path.with_suffix(".ipynb")
        return shlex.join(["papermill", str(notebook), str(output), "-f", str(path)])

    def _run_rules(self) -> list[_Ran]:
        """All that the rules can do with the step, on fake tensors: from no block checkpointed to each.

        The threshold rule compares its limit with what is allocated as each block begins.  So a step under
        one limit is that of every limit down to the largest of these numbers below it, which is where the
        next step begins.
        """
        ran: list[_Ran] = []
        held = held_bytes(self.model, "none")
        with on_fake_tensors(self.model, self._batch) as (images, labels):
            memory = TensorMemory(images.device)
            readings = _Readings(memory)
            memory.track([*tensors_of(self.model), images, labels])
            stepper = optimizer_like("adamw", self.model)(self.model)
            rule = Checkpointing(self.model, "threshold", memory=readings, budget_bytes=0)
            bar = tqdm(total=1 + len(rule.blocks), desc="other strategies", unit="step", leave=False)
            with memory, rule, bar:
                for parameter in stepper.param_groups[0]["params"]:  # gives the optimizer its state
                    parameter.grad = torch.zeros_like(parameter)
                stepper.step()
                stepper.zero_grad(set_to_none=True)
                limit = np.inf
                while not ran or limit > 0:
                    rule.threshold_bytes = limit
                    memory.reset_peak()
                    readings.bytes.clear()
                    flops = self._run_step(images, labels, stepper)
                    next_limit = max((size for size in readings.bytes if size < limit), default=0)
                    ran.append(_Ran(next_limit, limit, memory.peak_bytes + held, *flops))
                    limit = next_limit
                    bar.update()
        return ran

    def _run_step(self, images: torch.Tensor, labels: torch.Tensor, stepper) -> tuple[int, int]:
        """One training step; returns FLOPs of its forward pass and of what it computed again."""
        with FlopCounter() as counter:
            with autocast(images.device, self.experiment.precision):
                logits = self.model(images)
                loss = self._loss(logits, labels)
            loss.backward()
            del loss, logits
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        forward, recompute = (
            sum(count for op, count in counter.counts[phase].items() if op not in NORMS)
            for phase in ("forward", "recompute")
        )
        return forward, recompute

    def _rule_plan(self, strategy: str, budget_bytes: int) -> Plan:
        """What a strategy that does not plan takes."""
        limit = {"none": np.inf, "static": 0, "threshold": self.experiment.threshold * budget_bytes}[strategy]
        ran = next(ran for ran in self._rules if ran.above < limit <= ran.up_to or not ran.above)
        return replace(
            self._without, strategy=strategy, budget_bytes=budget_bytes, peak_bytes=ran.peak_bytes,
            forward_flops=ran.forward_flops, recompute_flops=ran.recompute_flops, extra_seconds=None,
        )  # fmt: skip

    def _row(self, plan: Plan) -> dict:
        return {
            "strategy": plan.strategy,
            "budget_bytes": plan.budget_bytes,
            "peak_bytes": plan.peak_bytes,
            "recompute_pct": plan.recompute_pct,
            "step_seconds": self._seconds(plan),
            "micro_batch_size": plan.micro_batch_size,
            "within_budget": plan.fits,
        }

    def _seconds(self, plan: Plan) -> float:
        """Estimated time of a step; forward and backward together count as three forward passes."""
        if plan.extra_seconds is not None:
            return plan.plain_seconds + plan.extra_seconds
        chain = self.planner.chain(plan.batch_size, False)
        passes = 3 + plan.recompute_pct / 100
        ops = round(len(chain.profile.ops) * passes / 3)
        return self.planner.speed.step_seconds(passes * chain.plain_seconds, ops, False)
