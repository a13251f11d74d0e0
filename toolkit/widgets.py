"""The budget explorer: what a budget does to an experiment's training step, before anything trains.

`Explorer` profiles the step once and then answers for any budget; `BudgetExplorer` is the slider on top.
Nothing here needs a browser: moving the slider and pressing the button are methods.
"""

from __future__ import annotations

import html
import io
import shlex
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox
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


class BudgetExplorer(ipywidgets.VBox):
    """A slider over budgets, the picture and the table of its budget, and a button that writes them down.

    The button writes to `path`, see `Explorer.write`.
    """

    def __init__(self, explorer: Explorer, path: Path):
        self.explorer, self.path = explorer, Path(path)
        self._layout: list[Bbox] = []  # where the axes lie
        stops, wanted = explorer.stops, explorer.experiment.budget_bytes
        self.slider = ipywidgets.SelectionSlider(
            options=[(_label(size), size) for size in stops],
            index=min(range(len(stops)), key=lambda i: abs(stops[i] - wanted)),
            description="budget",
            continuous_update=False,
            layout=ipywidgets.Layout(width="90%"),
        )
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.legend, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        self.button = ipywidgets.Button(description="Use this budget")
        self.message = ipywidgets.HTML()
        e = explorer.experiment
        title = ipywidgets.HTML(
            html.escape(f"{e.method} on {e.backbone}, batches of {e.batch_size}, {e.precision} on {e.device}")
        )
        super().__init__(
            [title, self.slider, self.picture, self.legend, self.table, self.button, self.message]
        )
        self.slider.observe(lambda change: self.update(change["new"]), "value")
        self.button.on_click(lambda _: self.write())
        self.update(self.slider.value)

    def update(self, budget: int | str) -> None:
        """Show `budget`; bad input is a message, and what is shown stays."""
        try:
            table = self.explorer.summary(budget)
        except InputError as error:
            self.message.value = html.escape(str(error))
            return
        self.budget_bytes = parse_bytes(budget)
        self.table.value = table.to_html(index=False, escape=True)
        self.picture.value = self._draw()
        self.message.value = ""

    def _draw(self) -> bytes:
        """The picture as PNG.  Text takes longest: legends are HTML, and the layout is found once."""
        with plt.rc_context({"figure.dpi": 72}):
            figure = self.explorer.figure(self.budget_bytes)
        try:
            self.legend.value = "<br>".join(_legend(axes) for axes in figure.axes)
            for axes in figure.axes:
                axes.get_legend().remove()
                axes.locator_params(axis="y", nbins=4)
            figure.axes[0].locator_params(axis="x", nbins=5)
            if not self._layout:
                figure.draw_without_rendering()
                self._layout = [axes.get_position() for axes in figure.axes]
                for box in self._layout:
                    box.x0 += 0.02  # room for longer numbers
            figure.set_layout_engine("none")
            for axes, position in zip(figure.axes, self._layout):
                axes.set_position(position)
            with io.BytesIO() as file:
                # Not savefig, which draws twice.
                FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 1})
                return file.getvalue()
        finally:
            plt.close(figure)

    def write(self) -> None:
        """Write the shown budget's experiment, and show the command that runs it."""
        try:
            command = self.explorer.write(self.budget_bytes, self.path)
        except (InputError, OSError) as error:
            self.message.value = html.escape(str(error))
            return
        self.message.value = f"<pre>{html.escape(command)}</pre>"

    def reaction_seconds(self, moves: int = 20) -> float:
        """Median time from a change of the slider to the picture and the table."""
        before, count, seconds = self.slider.index, len(self.slider.options), []
        for _ in range(moves):
            start = time.perf_counter()
            self.slider.index = (self.slider.index + max(1, count // 3)) % count
            seconds.append(time.perf_counter() - start)
        self.slider.index = before
        return statistics.median(seconds)


def _label(size: int) -> str:
    return f"{size // 10**9} GB" if size in MARKS else format_bytes(size)


def _legend(axes: Axes) -> str:
    """The legend of `axes` as HTML."""
    parts = []
    for handle, label in zip(*axes.get_legend_handles_labels()):
        artist = handle[0] if isinstance(handle, BarContainer) else handle
        colour = artist.get_color() if isinstance(artist, Line2D) else np.ravel(artist.get_facecolor())
        square = f'<span style="color:{to_hex(colour, keep_alpha=True)}">&#9632;</span>'
        parts.append(f"{square} {html.escape(label)}")
    return " &ensp; ".join(parts)
