"""Figures of methods on CNNs: means over seeds against what a step costs, curves over a setting, and costs
by batch size.

The first three draw rows of `edge.recommend.ranking`, the last those of `edge.costs.cost_table`.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from toolkit.analysis.recommend import title
from toolkit.analysis.statistics import PARAMETERS
from toolkit.methods import METHODS
from toolkit.plots.text import plain

_MARKERS = "osD^v<>PX*h8pdH"  # one a method: told without colour
_COSTS = {  # column of `ranking`, its unit in the label, and the label
    "peak_bytes": (2**20, "peak memory (MiB)"),
    "flops_per_step": (1e6, "MFLOP a step, optimizer included"),
}


def _style(method: str) -> dict:
    """Colour and marker of a method, the same in every picture."""
    place = list(METHODS).index(method) if method in METHODS else len(METHODS)
    return {
        "color": sns.color_palette("husl", len(METHODS) + 1)[place],
        "marker": _MARKERS[place % len(_MARKERS)],
    }


def accuracy_against_costs(frame: pd.DataFrame) -> Figure:
    """Mean accuracy with its interval against peak memory and against FLOPs; lines are the fronts.

    A row without one of the two is left out of that picture, which says how many there are.
    """
    figure, both = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", sharey=True)
    for axes, (column, (unit, label)) in zip(both, _COSTS.items()):
        rows = frame.dropna(subset=["accuracy_pct", column])
        for method in sorted(set(rows.method), key=[*METHODS, *rows.method].index):
            own = rows[rows.method == method]
            _errorbar(axes, own[column] / unit, own, label=plain(method), linestyle="none", **_style(method))
        front = rows.sort_values([column, "accuracy_pct"], ascending=[True, False])
        front = front[front.accuracy_pct > front.accuracy_pct.cummax().shift(fill_value=-np.inf)]
        axes.step(front[column] / unit, front.accuracy_pct, where="post", color="0.35", zorder=1)
        for row in front.to_dict("records"):
            axes.annotate(
                plain(title(row)), (row[column] / unit, row["accuracy_pct"]), xytext=(5, -11),
                textcoords="offset points", fontsize=8,
            )  # fmt: skip
        absent = len(frame) - len(rows)
        axes.set(xlabel=label, xscale="log", title=f"{absent} rows without figures" if absent else "")
        axes.margins(x=0.15)  # for the labels
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    both[0].set_ylabel("test accuracy (%)")
    handles = dict(zip(*both[0].get_legend_handles_labels()[::-1]))
    if handles:
        both[1].legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _errorbar(axes: Axes, x: pd.Series, rows: pd.DataFrame, **style: object) -> None:
    """Means with their intervals; a row of one seed is a bare point."""
    axes.errorbar(
        x, rows.accuracy_pct, yerr=rows.half_width.fillna(0.0), markersize=7, capsize=3, elinewidth=1,
        **style,
    )  # fmt: skip


def curve(frame: pd.DataFrame, method: str, column: str) -> pd.DataFrame:
    """The rows of `method` that differ in `column` alone: the longest such series, sorted by it.

    Empty where no two rows do.
    """
    rows = frame[frame.method == method]
    if column not in rows:
        return rows[:0]
    rest = [name for name in PARAMETERS if name in rows and name != column]
    series = [part for _, part in rows.groupby(rest, dropna=False) if part[column].nunique() > 1]
    return max(series, key=len).sort_values(column) if series else rows[:0]


def curves(frame: pd.DataFrame) -> dict[str, Figure]:
    """`rank_curves` and `gap_curve`, as far as there are rows for them, by a name for their files."""
    drawn = {}
    if _with_ranks(frame):
        drawn["edge_rank"] = rank_curves(frame)
    if len(curve(frame, "galore", "galore_gap")):
        drawn["edge_gap"] = gap_curve(frame)
    return drawn


def _with_ranks(frame: pd.DataFrame) -> dict[str, dict[str, tuple[str, pd.DataFrame]]]:
    """By backbone and method: the column of its rank, and its rows, where several ranks were tried."""
    found = {}
    for backbone, part in frame.groupby("backbone", sort=False):
        columns = {method: "galore_rank" if method == "galore" else "lora_rank" for method in METHODS}
        tried = {method: (column, curve(part, method, column)) for method, column in columns.items()}
        found[backbone] = {method: pair for method, pair in tried.items() if len(pair[1])}
    return {backbone: tried for backbone, tried in found.items() if tried}


def rank_curves(frame: pd.DataFrame) -> Figure:
    """Accuracy over the rank of low-rank methods and of GaLore, with intervals; dashed: full fine-tuning.

    One picture for each backbone of which several ranks were tried; at least one must be.
    """
    tried = _with_ranks(frame)
    figure, every = plt.subplots(
        1, len(tried), figsize=(2 + 5 * len(tried), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (backbone, methods) in zip(every.flat, tried.items()):
        for method, (column, rows) in methods.items():
            _errorbar(axes, rows[column], rows, label=method, **_style(method))
        _draw_full(axes, _full(frame[frame.backbone == backbone], rows))
        axes.set(title=plain(backbone), ylabel="test accuracy (%)")
        _powers_of_two(axes, "rank")
        axes.legend()
    return figure


def gap_curve(frame: pd.DataFrame) -> Figure:
    """GaLore over the steps between two choices of its subspace: accuracy, and the FLOPs of a step.

    Of the longest series of rows that differ in nothing else, which must have two rows.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = curve(frame, "galore", "galore_gap")
    full = _full(frame[frame.backbone == rows.backbone.iloc[0]], rows)
    _errorbar(left, rows.galore_gap, rows, label="galore", **_style("galore"))
    _draw_full(left, full)
    whole, optimizer = rows.flops_per_step / 1e6, rows.optimizer_flops_per_step / 1e6
    right.fill_between(rows.galore_gap, whole - optimizer, label="forward and backward", alpha=0.5)
    right.fill_between(rows.galore_gap, whole - optimizer, whole, label="optimizer", alpha=0.8)
    if full is not None:
        right.axhline(full.flops_per_step / 1e6, color="black", linestyle="--", label="full")
    left.set(ylabel="test accuracy (%)", title=plain(rows.backbone.iloc[0]))
    right.set(ylabel="MFLOP a step", ylim=(0, None))
    for axes in (left, right):
        _powers_of_two(axes, "steps between two choices of the subspace")
        axes.legend()
    return figure


def _full(frame: pd.DataFrame, rows: pd.DataFrame) -> pd.Series | None:
    """Full fine-tuning as `rows` were trained; the most accurate if there are several."""
    same = frame[(frame.method == "full") & frame.accuracy_pct.notna()]
    for name in ("dataset", "batch_size", "epochs", "checkpointing"):
        same = same[same[name] == rows[name].iloc[0]] if name in rows else same
    return None if same.empty else same.loc[same.accuracy_pct.idxmax()]


def _draw_full(axes: Axes, full: pd.Series | None) -> None:
    if full is None:
        return
    axes.axhline(full.accuracy_pct, color="black", linestyle="--", linewidth=1, label="full")
    if pd.notna(full.half_width):
        ends = full.accuracy_pct - full.half_width, full.accuracy_pct + full.half_width
        axes.axhspan(*ends, color="0.5", alpha=0.15, linewidth=0)


def _powers_of_two(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


def costs_by_batch(stock: pd.DataFrame, lean: pd.DataFrame) -> Figure:
    """Peak memory of a step in per cent of full fine-tuning's, by batch size; a row of pictures a backbone.

    `stock`, `lean`: `edge.costs.cost_table` of the same steps without and with lean forms.  Left: as
    published, the sum of the categories' maxima; middle: the peak that really occurs; right: that of lean
    layers.  All are compared with full fine-tuning in stock torch, counted in the same way.
    """
    keys = ["backbone", "batch_size"]
    full = stock[stock.method == "full"].set_index(keys)
    panels = {
        "as published: sum of maxima": (stock, "published_bytes"),
        "true peak": (stock, "peak_bytes"),
        "true peak, lean layers": (lean, "peak_bytes"),
    }
    backbones = list(dict.fromkeys(stock.backbone))
    figure, every = plt.subplots(
        len(backbones), 3, figsize=(12, 0.6 + 2.7 * len(backbones)), layout="constrained", sharex=True,
        sharey=True, squeeze=False,
    )  # fmt: skip
    for line, backbone in zip(every, backbones):
        for axes, (name, (frame, column)) in zip(line, panels.items()):
            rows = frame[frame.backbone == backbone]
            percent = 100 * rows[column] / rows.set_index(keys).index.map(full[column])
            for method, own in percent.groupby(rows.method, sort=False):
                axes.plot(rows.batch_size[own.index], own, label=plain(method), **_style(method))
            axes.set_title(f"{plain(backbone)}: {name}", fontsize=10)
            _powers_of_two(axes, "")
        line[0].set_ylabel("memory (% of full)")
    every[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    every[0, 0].set_ylim(0, None)
    for axes in every[-1]:
        axes.set_xlabel("batch size")
    return figure
