"""The results browser and the method chooser: widgets around the tables and figures of finished runs.

Nothing here needs a browser: choosing is setting the values of widgets.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import pandas as pd

from toolkit import analysis, plots
from toolkit.analysis.results import side_by_side
from toolkit.budget import format_bytes
from toolkit.errors import InputError
from toolkit.measure.quantities import QUANTITIES
from toolkit.plots.style import png
from toolkit.training.record import FILE_NAME, RunRecord, read_record

FILTERS = ("dataset", "backbone", "method", "checkpointing", "status", "phase")
COLUMNS = ("seed", "budget_bytes", "score_pct", "peak_bytes", "adapt_seconds", "adapt_joules")
HINT = "Choose a run for its figures and curves, or two (with Ctrl or ⌘) to compare them."
NO_RUNS = "there are no records yet: run `python -m toolkit run` first."
STYLE = """<style>
.toolkit-runs select, .toolkit-heads .widget-html-content {font: 12px monospace; white-space: pre}
.toolkit-runs :is(th, td, p) {line-height: 1.3; padding: 2px 8px; text-align: left; overflow-wrap: anywhere}
</style>"""
WIDE = ipywidgets.Layout(width="95%")


class ResultsBrowser(ipywidgets.VBox):
    """Choose among the runs of `records` (`analysis.read`): one to look at, two to compare.

    `filters`, `sort`, `order` and `cost` are what a person sets, `runs.value` the chosen rows of `records`.
    """

    def __init__(self, records: pd.DataFrame):
        records = records.reset_index(drop=True)
        if records.empty:
            records = records.reindex(columns=[*FILTERS, *COLUMNS])
        else:
            records = analysis.adaptation(records)
        self.records = records
        self.filters = {
            name: ipywidgets.SelectMultiple(
                options=sorted(records[name].dropna().unique()), description=name,
                rows=min(max(records[name].nunique(), 2), 8),
                style={"description_width": "95px"}, layout=ipywidgets.Layout(width="31%"),
            )
            for name in FILTERS
        }  # fmt: skip
        columns = [name for name in records if records[name].notna().any()]
        sort = "score_pct" if "score_pct" in columns else None
        self.sort = ipywidgets.Dropdown(options=columns, description="sort by", value=sort)
        self.order = ipywidgets.ToggleButtons(options=["descending", "ascending"])
        self.cost = ipywidgets.ToggleButtons(options=list(analysis.COSTS), description="score against")
        self.count, self.heads = ipywidgets.HTML(), ipywidgets.HTML()
        self.runs = ipywidgets.SelectMultiple(rows=16, layout=WIDE)
        self.message, self.details = ipywidgets.HTML(), ipywidgets.HTML()
        self.front, self.curves, self.memory = (ipywidgets.Image(format="png") for _ in range(3))
        self._drawn = None  # rows in the figure of all runs
        self.add_class("toolkit-runs")
        self.heads.add_class("toolkit-heads")
        pages = [[self.cost, self.front], [self.message, self.curves, self.memory, self.details]]
        self.tabs = ipywidgets.Tab(
            [ipywidgets.VBox(page) for page in pages], titles=["All runs", "Chosen runs"]
        )
        filters = ipywidgets.HBox(list(self.filters.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        sorting = ipywidgets.HBox([self.sort, self.order, self.count])
        super().__init__([ipywidgets.HTML(STYLE), filters, sorting, self.heads, self.runs, self.tabs])
        for widget in (*self.filters.values(), self.sort, self.order):
            widget.observe(lambda _: self._attempt(self._list), "value")
        self.cost.observe(lambda _: self._attempt(self._draw_front), "value")
        self.runs.observe(self._chosen, "value")
        self._attempt(self._list)
        self._chosen()

    @property
    def shown(self) -> pd.Index:
        """Rows of `records` that pass the filters, sorted."""
        keep = pd.Series(True, index=self.records.index)
        for name, widget in self.filters.items():
            if widget.value:
                keep &= self.records[name].isin(widget.value)
        if self.sort.value is None:
            return keep.index[keep]
        key = self.records[self.sort.value][keep]
        key = key.map(str, na_action="ignore") if key.dtype == object else key
        return key.sort_values(ascending=self.order.value == "ascending", kind="stable").index

    def _attempt(self, step: Callable[[], None]) -> None:
        """An error in a callback is shown nowhere in a notebook: here it becomes the message."""
        try:
            step()
        except Exception as error:
            self.message.value = html.escape(str(error) or type(error).__name__)

    def _list(self) -> None:
        shown, chosen = self.shown, self.runs.value
        columns = [*FILTERS, *COLUMNS]
        if self.sort.value not in (None, *columns):
            columns.append(self.sort.value)
        texts = analysis.as_text(self.records.loc[shown, columns])
        head, *lines = texts.to_string(index=False).replace(" ", "\N{NO-BREAK SPACE}").split("\n")
        self.heads.value = html.escape(head)
        self.runs.unobserve(self._chosen, "value")  # new options choose nothing, for a moment
        self.runs.options = list(zip(lines, shown))
        self.runs.value = [row for row in chosen if row in shown]
        self.runs.observe(self._chosen, "value")
        if self.runs.value != chosen:
            self._chosen()
        self.count.value = f"{len(shown)} of {len(self.records)} runs" if len(self.records) else NO_RUNS
        if {*shown} != self._drawn:  # their order does not matter there
            self._draw_front()

    def _draw_front(self) -> None:
        self._drawn = {*self.shown}
        self.front.layout.display = "none"
        means = analysis.means(self.records.loc[self.shown])
        cost = analysis.COSTS[self.cost.value]
        if len(means) and means[["score_pct", cost]].notna().all(axis=1).any():
            self.front.value = png(plots.accuracy_against(means, cost))
            self.front.layout.display = None

    def _chosen(self, _: object = None) -> None:
        self._attempt(self._choose)

    def _choose(self) -> None:
        chosen = self.runs.value
        self.curves.layout.display = self.memory.layout.display = "none"
        self.tabs.selected_index = int(len(chosen) > 0)
        self.message.value = "" if len(chosen) in (1, 2) else HINT
        self.details.value = ""
        if len(chosen) == 1:
            self._one(*chosen)
        if len(chosen) == 2:
            self.details.value = analysis.show(side_by_side(self.records, *chosen)).to_html()

    def _one(self, row: int) -> None:
        """A run's figures, with the reasons for those that are missing, and its curves."""
        folder = Path(self.records.folder[row])
        record = RunRecord(**read_record(folder / FILE_NAME))
        error = record.run["error"]
        title = f"{folder}: {record.run['status']}" + (f", {error}" if error else "")
        self.details.value = f"<p>{html.escape(title)}</p>{analysis.overview(record).to_html()}"
        history, trace = record.curves.get("history"), record.curves.get("memory_trace_bytes")
        if history:
            self.curves.value, self.curves.layout.display = png(plots.learning_curves(history)), None
        if trace:
            peak, budget = record.memory["train_peak_bytes"], int(self.records.budget_bytes[row])
            self.memory.value = png(plots.memory_over_step(trace, budget, peak))
            self.memory.layout.display = None


class MethodChooser(ipywidgets.VBox):
    """Which method for my device: sliders for memory and FLOPs, and what `analysis.recommend` says there.

    `ranked`: rows of `analysis.ranking`, of one or several data sets.  Each stop of a slider is what a method
    needs, the first is a little less than any.  Raises `InputError` if no row has all figures.
    """

    def __init__(self, ranked: pd.DataFrame):
        needed = ["score_pct", "peak_bytes", "flops_per_step"]
        known = ranked.dropna(subset=needed) if len(ranked) else ranked
        if known.empty:
            raise InputError("no row has a score, peak memory and FLOPs: nothing to choose from.")
        self._ranked = known
        self.dataset = ipywidgets.Dropdown(options=sorted(known.dataset.unique()), description="data")
        self.memory = ipywidgets.SelectionSlider(options=[("", 0.0)], description="memory", layout=WIDE)
        self.flops = ipywidgets.SelectionSlider(options=[("", 0.0)], description="FLOPs", layout=WIDE)
        self.answer, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__([self.dataset, self.memory, self.flops, self.answer, self.table])
        self._choose_data()
        self.dataset.observe(lambda _: self._choose_data(), "value")
        for slider in (self.memory, self.flops):
            slider.observe(lambda _: self._answer(), "value")

    def _choose_data(self) -> None:
        """Set the stops of the chosen data set; both sliders begin at the highest."""
        self._rows = self._ranked[self._ranked.dataset == self.dataset.value]
        flops = QUANTITIES["flops_per_step"]
        for slider, column, text in (
            (self.memory, "peak_bytes", format_bytes),
            (self.flops, "flops_per_step", lambda count: f"{flops.text(count)} MFLOP"),
        ):
            needs = {text(need): need for need in sorted(self._rows[column])}  # the highest of a label
            least = 0.98 * self._rows[column].min()
            slider.options = [(f"below {next(iter(needs))}", least), *needs.items()]
            slider.index = len(slider.options) - 1
        self._answer()

    def _answer(self) -> None:
        found = analysis.recommend(self._rows, self.memory.value, self.flops.value)
        self.answer.value = f"<p><b>{html.escape(found.why)}</b></p>"
        self.table.value = analysis.show(analysis.ranking_table(found.table)).to_html()
