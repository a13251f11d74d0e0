"""The results browser: filters over finished runs, their Pareto front, one run's curves, two side by side.

Nothing here needs a browser: choosing is setting the values of widgets.
"""

from __future__ import annotations

import functools
import html
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ipywidgets
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from toolkit.analysis.statistics import ALIKE, DATA, PARAMETERS, adaptation, paired_differences, refuse_mixed
from toolkit.errors import InputError
from toolkit.plots import runs as plots
from toolkit.plots.pareto import COSTS, printable, svg
from toolkit.training.record import FILE_NAME, SCHEMA_VERSION, SIMULATED, RunRecord, load_records

FILTERS = ("dataset", "backbone", "method", "checkpointing", "status", "phase")
COLUMNS = {  # of the list: column, unit, format
    "budget MiB": ("budget", 2**20, "{:,.0f}"),
    "seed": ("seed", 1, "{:.0f}"),
    "top-1 %": ("test_top1_pct", 1, "{:.2f}"),
    "peak MiB": ("peak_bytes", 2**20, "{:,.1f}"),
    "adapt s": ("adapt_seconds", 1, "{:,.1f}"),
    "adapt J": ("adapt_joules", 1, "{:,.0f}"),
}
PAIRED = {  # what two runs are compared in over their seeds: column, unit, digits
    "test accuracy (points)": ("test_top1_pct", 1, 2),
    "peak memory (MiB)": ("train_peak_bytes", 2**20, 2),
    "training time (s)": ("train_seconds", 1, 1),
    "training energy (J)": ("train_energy_joules", 1, 1),
}
FIGURES = (  # must be numbers
    "budget", "seed", "test_top1_pct", "train_peak_bytes", "prepare_peak_bytes", "test_peak_bytes",
    "train_seconds", "prepare_seconds", "train_energy_joules", "prepare_joules",
)  # fmt: skip
WIDEST = 28  # characters of a column
NO_RUNS = "there are no records yet: run `python -m toolkit run` first."


def read(runs: pd.DataFrame | Path) -> tuple[pd.DataFrame, list[str]]:
    """Records with the columns of `statistics.adaptation`, and what is wrong with any, each with its file.

    `runs`: a folder, or what `load_records` made of one.  Records that have something else where there
    should be a figure or a name are left out; those of other versions are kept, as far as they go.
    """
    problems = []
    if not isinstance(runs, pd.DataFrame):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = load_records(Path(runs))
        problems = [str(warning.message) for warning in caught]
    frame = runs.reset_index(drop=True)
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, *FILTERS, "folder", "schema_version"])))
    foreign = frame.map(lambda v: isinstance(v, (dict, list)) or (isinstance(v, int) and abs(v) >= 2**63))
    for row in frame.index[foreign.any(axis=1)]:
        names = ", ".join(map(str, frame.columns[foreign.loc[row]]))
        problems.append(f"{frame.folder[row]} was left out: no name and no figure under {names}")
    frame = frame[~foreign.any(axis=1)].reset_index(drop=True)
    for name in [name for name in FIGURES if name in frame]:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        for row in frame.index[frame[name].notna() & numbers.isna()]:
            problems.append(f"{frame.folder[row]}: {name} {frame[name][row]!r} is no number")
        frame[name] = numbers
    others = frame[frame.schema_version != SCHEMA_VERSION]
    for version, folders in others.folder.groupby(others.schema_version.map(_text)):
        problems.append(
            f"of schema {version}, this toolkit writes {SCHEMA_VERSION}; figures may be missing: "
            + ", ".join(Path(str(folder)).name for folder in folders)
        )
    if "energy_source" in frame:
        frame.loc[frame.energy_source == "fake", frame.columns.intersection(SIMULATED)] = None
    return adaptation(frame), [printable(problem) for problem in problems]


def table(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each run of `read`, as text for people."""
    text = {name: records[name].map(_text) for name in FILTERS}
    for name, (column, unit, form) in COLUMNS.items():
        values = records.get(column, pd.Series(index=records.index, dtype=float)) / unit
        text[name] = values.map(lambda value, form=form: "–" if pd.isna(value) else form.format(value))
    if "energy_source" in records:
        text["adapt J"] = text["adapt J"].mask(records.energy_source == "fake", "simulated")
    return pd.DataFrame(text, index=records.index, dtype=str)


def side_by_side(records: pd.DataFrame, first: int, second: int) -> pd.DataFrame:
    """Two rows of `read` as columns of text: parameters, data and environment that differ, and figures."""
    names = ["status", "seed", *PARAMETERS, *DATA, *ALIKE]
    pair = records.loc[[first, second], [name for name in names if name in records]].map(_text)
    pair = pair.loc[:, pair.iloc[0] != pair.iloc[1]]
    figures = table(records.loc[[first, second]])[list(COLUMNS)[2:]]
    return pair.join(figures).set_axis(["first", "second"]).T


def over_seeds(records: pd.DataFrame, first: pd.Series, second: pd.Series) -> pd.DataFrame:
    """Second less first over the seeds that the experiments of both finished with; one row for each figure.

    Columns, as text: mean difference, 95 % Student-t interval, n pairs, and what it means.  Raises
    `InputError` where there is nothing to pair, and where the runs were not measured alike.
    """
    if "inference" in (first.phase, second.phase):
        raise InputError("a baseline's seed is of other things: only fine-tuned runs are paired by seed.")
    changed = [n for n in PARAMETERS if n in records and _text(first[n]) != _text(second[n])]
    other_data = [n for n in DATA if n in records and _text(first[n]) != _text(second[n])]
    unknown = [n for n in (*changed, *other_data) if pd.isna(first[n]) or pd.isna(second[n])]
    if unknown:
        raise InputError(f"one of the two does not tell its {', '.join(unknown)}: nothing to pair by.")
    if other_data:
        raise InputError("the two runs were on different data: their seeds cannot be paired.")
    if not changed:
        raise InputError("the two runs differ in their seed only: choose another method or setting.")
    texts = records[[name for name in (*PARAMETERS, *DATA) if name in records]].map(_text)
    groups = [(texts == run[texts.columns].map(_text)).all(axis=1) for run in (first, second)]
    both = records[groups[0] | groups[1]]
    rows = []
    for title, (column, unit, digits) in PAIRED.items():
        pair = {"mean": None, "half_width": None, "n": 0}
        if column in both and both[both.status == "ok"].groupby(changed)[column].count().gt(0).sum() == 2:
            found = paired_differences(both, column, first[changed].to_dict())
            pair = found[(found[changed] == second[changed]).all(axis=1)].iloc[0].to_dict()
        rows.append({"": title} | _difference(pair, unit, digits))
    return pd.DataFrame(rows)


def _difference(pair: dict, unit: float, digits: int) -> dict[str, str]:
    mean, half_width, n = pair["mean"], pair["half_width"], pair["n"]
    row = dict.fromkeys(("second − first", "95 % interval"), "–") | {"seeds": str(n)}
    if not n:
        return row | {"verdict": "no seed has it in both"}
    row["second − first"] = f"{mean / unit:+.{digits}f}"
    if n == 1:
        return row | {"verdict": "one seed says nothing about chance"}
    low, high = (mean - half_width) / unit, (mean + half_width) / unit
    row["95 % interval"] = f"{low:+.{digits}f} to {high:+.{digits}f}"
    return row | {"verdict": "tied: the interval contains 0" if pair["tied"] else "differs"}


def _text(value: object) -> str:
    return "–" if pd.isna(value) else printable(str(value))


def _escape(text: object) -> str:
    return html.escape(printable(str(text)))


HINT = "Choose a run for its figures and curves, or two (with Ctrl or ⌘) to compare them."
STYLE = """<style>
.toolkit-runs select, .toolkit-heads .widget-html-content {font: 12px monospace; white-space: pre}
.toolkit-runs table {border-collapse: collapse; margin: 8px 0}
.toolkit-runs :is(th, td, p) {line-height: 1.3; padding: 2px 8px; text-align: left; overflow-wrap: anywhere}
</style>"""


class ResultsBrowser(ipywidgets.VBox):
    """Choose among the runs of a folder (or of `load_records`): one to look at, two to compare.

    `filters`, `sort`, `order` and `cost` are what a person sets, `runs.value` the chosen rows of `records`.
    """

    def __init__(self, runs: pd.DataFrame | Path):
        self.records, self.problems = read(runs)
        self._table = table(self.records)
        self._front = functools.lru_cache(maxsize=64)(self._front)  # what takes time is kept
        self._look = functools.lru_cache(maxsize=64)(self._look)
        self._labels = functools.lru_cache(maxsize=64)(self._labels)
        self.filters = {
            name: ipywidgets.SelectMultiple(
                options=sorted(self._table[name].unique()), description=name, rows=4,
                style={"description_width": "95px"}, layout=ipywidgets.Layout(width="31%"),
            )
            for name in FILTERS
        }  # fmt: skip
        columns = self.records.columns[self.records.notna().any()]
        self.sort = ipywidgets.Dropdown(
            options=[(printable(name), name) for name in columns], description="sort by",
            value="test_top1_pct" if "test_top1_pct" in columns else next(iter(columns), None),
        )  # fmt: skip
        self.order = ipywidgets.ToggleButtons(options=["descending", "ascending"])
        self.cost = ipywidgets.ToggleButtons(options=list(COSTS), description="accuracy against")
        self.count, self.heads = ipywidgets.HTML(), ipywidgets.HTML()
        self.runs = ipywidgets.SelectMultiple(rows=12, layout=ipywidgets.Layout(width="98%"))
        self.front, self.message, self.details = (ipywidgets.HTML() for _ in range(3))
        self.curves, self.memory = (ipywidgets.Image(format="png") for _ in range(2))
        self.add_class("toolkit-runs")
        self.heads.add_class("toolkit-heads")
        pages = [[self.cost, self.front], [self.message, self.curves, self.memory, self.details]]
        self.tabs = ipywidgets.Tab(
            [ipywidgets.VBox(page) for page in pages], titles=["Pareto front", "Chosen runs"]
        )
        super().__init__(
            [
                ipywidgets.HTML(STYLE + _remarks(self.problems)),
                ipywidgets.HBox(list(self.filters.values()), layout=ipywidgets.Layout(flex_flow="row wrap")),
                ipywidgets.HBox([self.sort, self.order, self.count]),
                self.heads, self.runs, self.tabs,
            ]
        )  # fmt: skip
        for widget in (*self.filters.values(), self.sort, self.order):
            widget.observe(lambda _: self._attempt(self.count, self._list), "value")
        self.cost.observe(lambda _: self._attempt(self.count, self._draw_front), "value")
        self.runs.observe(self._choose, "value")
        self._attempt(self.count, self._list)
        self._choose()

    @property
    def shown(self) -> pd.Index:
        """Rows of `records` that pass the filters, sorted."""
        keep = pd.Series(True, index=self.records.index)
        for name, widget in self.filters.items():
            if widget.value:
                keep &= self._table[name].isin(widget.value)
        if self.sort.value is None:
            return keep.index
        key = self.records[self.sort.value][keep]
        numbers = pd.to_numeric(key, errors="coerce")
        key = numbers if numbers.notna().any() else key.map(_text)
        return key.sort_values(ascending=self.order.value == "ascending", kind="stable").index

    def _attempt(self, message: ipywidgets.HTML, step: Callable[[], None]) -> None:
        """An error in a callback is shown nowhere in a notebook: here it becomes the message."""
        try:
            step()
        except (InputError, OSError) as error:
            message.value = _escape(error)
        except Exception as error:  # whatever a damaged record leads to
            message.value = _escape(f"this cannot be shown: {error!r}")

    def _list(self) -> None:
        shown, chosen = self.shown, self.runs.value
        heads, labels = self._labels(self.sort.value)
        self.heads.value = _escape(heads)
        self.runs.unobserve(self._choose, "value")  # new options choose nothing, for a moment
        self.runs.options = list(zip(labels[shown], shown))
        self.runs.value = [row for row in chosen if row in shown]
        self.runs.observe(self._choose, "value")
        if self.runs.value != chosen:
            self._choose()
        self.count.value = f"{len(shown)} of {len(self.records)} runs" if len(self.records) else NO_RUNS
        self._draw_front()

    def _labels(self, sort: str | None) -> tuple[str, pd.Series]:
        """Head and rows of the list, in columns; with the column that sorts, if it is another."""
        columns = self._table.copy()
        if sort not in (None, *FILTERS, *(name for name, *_ in COLUMNS.values())):
            columns[printable(sort)] = self.records[sort].map(_text)
        head, lines = "", pd.Series("", index=columns.index)
        for name in columns:
            texts = columns[name].str.slice(stop=WIDEST)
            right, width = name in COLUMNS, max([len(name), *texts.str.len()])
            head += (name.rjust(width) if right else name.ljust(width)) + "  "
            lines += texts.str.pad(width, "left" if right else "right") + "  "
        return head, lines.str.replace(r"\s", "\N{NO-BREAK SPACE}", regex=True).astype(object)

    def _draw_front(self) -> None:
        self.front.value = self._front(tuple(sorted(row for _, row in self.runs.options)), self.cost.value)

    def _front(self, rows: tuple[int, ...], cost: str) -> str:
        records, note = self.records.loc[list(rows)], ""
        try:
            # Parameters do not matter for rivals; without them there are few groups to look through.
            names = {*PARAMETERS, "budget_mode"} - {"dataset"}
            refuse_mixed(records.drop(columns=list(names), errors="ignore"))
        except InputError as error:
            note = f"<p>Not all of these points can be compared: {_escape(error)}</p>"
        return svg(records, cost) + note

    def _choose(self, _: object = None) -> None:
        chosen = self.runs.value
        self.curves.layout.display = self.memory.layout.display = "none"
        self.tabs.selected_index = int(len(chosen) > 0)
        self.message.value = "" if len(chosen) in (1, 2) else HINT
        self.details.value = ""
        if not self.message.value:
            names = [_escape(self.records.folder[row]) for row in chosen]
            self.details.value = "".join(f"<p>{name}</p>" for name in names)
            self._attempt(self.message, lambda: (self._one if len(chosen) == 1 else self._two)(*chosen))

    def _one(self, row: int) -> None:
        text, *pictures = self._look(row)
        self.details.value += text
        for widget, picture in zip((self.curves, self.memory), pictures):
            if picture:
                widget.value, widget.layout.display = picture, None

    def _look(self, row: int) -> tuple[str, bytes | None, bytes | None]:
        """A run's figures as HTML, with the reasons for those that are missing, and its curves as PNG."""
        path = Path(self.records.folder[row]) / FILE_NAME
        record = RunRecord(**json.loads(path.read_text()))
        status, error = record.run["status"], record.run["error"]
        lines = [status if error is None else f"{status}: {error}"]
        history, trace = record.curves.get("history"), record.curves.get("memory_trace_bytes")
        baseline = "a baseline does not train" if self.records.phase[row] == "inference" else None
        if not history:
            lines.append(f"No loss and accuracy by epoch: {baseline or 'no epoch was completed'}.")
        if not trace:
            lines.append(f"No memory over a step: {baseline or 'no training step was traced'}.")
        overview = record.overview().reset_index().to_html(escape=True, index=False)
        budget, peak = int(record.config["budget"]), record.memory.get("train_peak_bytes")
        return (
            "".join(f"<p>{_escape(line)}</p>" for line in lines) + printable(overview),
            _png(lambda: plots.learning_curves(history)) if history else None,
            _png(lambda: plots.memory_over_step(trace, budget, peak)) if trace else None,
        )

    def _two(self, first: int, second: int) -> None:
        """What differs between two runs, and how their experiments differ over seeds."""
        self.details.value += side_by_side(self.records, first, second).to_html(escape=True)
        differences = over_seeds(self.records, self.records.loc[first], self.records.loc[second])
        self.details.value += differences.to_html(escape=True, index=False)

    def reaction_seconds(self, moves: int = 20) -> float:
        """Median time from a change of a filter to the new list and picture, nothing of it seen before."""
        seconds, widget = [], self.filters["method"]
        for move in range(moves):
            self._front.cache_clear()
            start = time.perf_counter()
            widget.value = () if move % 2 else widget.options[: 1 + move // 2]
            seconds.append(time.perf_counter() - start)
        widget.value = ()
        return statistics.median(seconds)


def _png(draw: Callable[[], Figure]) -> bytes:
    before = set(plt.get_fignums())
    try:
        with io.BytesIO() as file:
            draw().savefig(file, format="png", dpi=72)
            return file.getvalue()
    finally:  # also what a damaged record left half drawn: the notebook would show it
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def _remarks(problems: list[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{_escape(problem)}</li>" for problem in problems)
    return f"<details><summary>Remarks on records: {len(problems)}</summary><ul>{items}</ul></details>"
