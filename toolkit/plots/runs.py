"""Figures of runs: their learning curves, and what accuracy costs; frames come from `toolkit.analysis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from toolkit.analysis.statistics import COSTS, SCORES
from toolkit.budget import STRATEGIES
from toolkit.datasets.tasks import score_in
from toolkit.measure.quantities import QUANTITIES
from toolkit.measure.scores import pareto_rank
from toolkit.methods import METHODS
from toolkit.plots.style import (
    BASELINE_MARKER,
    budget_at_edge,
    grid_of,
    legend_outside,
    method_look,
    note,
    plain,
    styled,
)


@styled
def learning_curves(histories: Sequence[dict] | Mapping[str, Sequence[dict]]) -> Figure:
    """Loss and score by epoch: training solid, validation dashed.

    `histories`: rows of `FitResult.history`, of one run or by name of several; empty ones are left out.
    """
    runs = histories if isinstance(histories, Mapping) else {"run": histories}
    rows = []
    for name, history in runs.items():
        for row in history:
            for part, word in (("train", "training"), ("val", "validation")):
                score, value = score_in(row, part) or ("score", None)
                known = {"epoch": row["epoch"], "run": plain(name), "part": word}
                rows.append(known | {"of": "loss", "value": row.get(f"{part}_loss")})
                rows.append(known | {"of": QUANTITIES[score].title if value else "", "value": value})
    table = pd.DataFrame(rows).dropna(subset="value")
    grid = sns.relplot(
        table.astype({"value": float}), x="epoch", y="value", hue="run", style="part", col="of", kind="line",
        marker="o", height=3.5, aspect=1.3, facet_kws={"sharey": False}, legend=len(table) > 0,
    )  # fmt: skip
    grid.set(ylabel="", ylim=(0, None)).set_titles("{col_name}")
    for axes in grid.axes.flat:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return grid.figure


@styled
def accuracy_against(means: pd.DataFrame, *costs: str, score: str = "") -> Figure:
    """Mean test score with its interval against each of `costs`; lines are Pareto fronts, which are named.

    `means`: rows of `analysis.means` or `analysis.ranking`.  A cost is a key of `analysis.COSTS` ("memory",
    "time", "energy") or a column.  Each data set and environment has a row of panels.  A dashed line is the
    budget, if all rows have the same.  `score`: a column; by default that of each data set's task.
    """
    costs = [COSTS.get(cost, cost) for cost in costs or COSTS]
    known = means[means[score or "score_pct"].notna()] if len(means) else means
    if known.empty:
        return note("no finished run has a test score")
    places = list(known.groupby(["dataset", "environment"], sort=False))
    figure, rows = grid_of(len(places), len(costs), 4.6 if len(costs) > 1 else 6.5, 4.2)
    for panels, ((dataset, environment), frame) in zip(rows, places):
        own = [name for name in SCORES if name in frame and frame[name].notna().any()]
        column = score or next(iter(own), "score_pct")
        for axes, cost in zip(panels, costs):
            _draw_against(axes, frame, cost, column)
        where = means.attrs.get("environments", {}).get(environment, environment)
        title = plain(dataset if means.environment.nunique() == 1 else f"{dataset}, {where}")
        panels[0].set(title=title, ylabel=QUANTITIES[column].title)
    legend_outside(rows[0][-1], *rows.flat)
    return figure


def _draw_against(axes: Axes, means: pd.DataFrame, cost: str, score: str) -> None:
    """One panel: points with intervals, the front with names, the budget and the axes."""
    quantity = QUANTITIES[cost]
    frame = means.dropna(subset=[cost, score]).assign(x=lambda rows: rows[cost] / quantity.scale)
    if frame.empty:
        axes.text(0.5, 0.5, f"{quantity.label}: not measured", ha="center", transform=axes.transAxes)
        return
    for row in frame.to_dict("records"):
        baseline = row["method"] not in METHODS
        half_width = row.get(f"{score}_half_width", np.nan)
        axes.errorbar(
            row["x"], row[score], yerr=None if np.isnan(half_width) else half_width, linestyle="none",
            marker=BASELINE_MARKER if baseline else STRATEGIES[row["checkpointing"]].marker,
            markersize=8, markeredgewidth=1.5, capsize=3, elinewidth=1, alpha=0.85,
            **method_look(row["method"]),
            label=plain(f"{row['backbone']} {row['method']}" if baseline else row["method"]),
        )  # fmt: skip
    for strategy in STRATEGIES if frame.checkpointing.nunique() > 1 else ():
        if (frame.checkpointing == strategy).any():
            look = {"marker": STRATEGIES[strategy].marker, "color": "0.3", "linestyle": "none"}
            axes.plot([], [], label=f"checkpointing {strategy}", **look)
    front = frame[front_of(frame, cost, score)].sort_values("x")
    if len(front) > 1:
        axes.step(
            front.x, front[score], where="post", color="0.35", linewidth=1, zorder=1, label="Pareto front"
        )
    for row in front.to_dict("records"):
        text = f"{row['method']} ({row['variant']})" if row.get("variant") else row["method"]
        text = row["checkpointing"] if score == "recompute_pct" else text
        position = {"xytext": (5, 6), "textcoords": "offset points", "fontsize": 8}
        axes.annotate(plain(text), (row["x"], row[score]), **position)
    _limit(axes, frame, means, cost, score)
    axes.set_xlabel(quantity.title)


def _limit(axes: Axes, frame: pd.DataFrame, means: pd.DataFrame, cost: str, score: str) -> None:
    """Set the limits, and draw the budget if it is one for all and near the data; it would dwarf them."""
    budgets = means.budget_bytes.astype(float).unique() if "budget_bytes" in means else np.array([])
    budgets = budgets / QUANTITIES[cost].scale
    if cost == COSTS["memory"] and len(budgets) == 1 and budgets[0] < 3 * frame.x.max():
        axes.axvline(budgets[0], color="black", linestyle="--", linewidth=1, label="budget")
    elif cost == COSTS["memory"] and len(budgets) == 1 and np.isfinite(budgets[0]):
        budget_at_edge(axes, budgets[0] * QUANTITIES[cost].scale, along="x")
    low, high = frame[score].min(), frame[score].max()
    margin = max(0.15 * (high - low), (5 - (high - low)) / 2)  # at least 5 points: less is mostly chance
    axes.set_ylim(low - margin, high + margin)
    if frame.x.max() > 8 * frame.x.min() > 0:
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.15 * frame.x.max() or 1)


def front_of(means: pd.DataFrame, cost: str, score: str = "score_pct") -> pd.Series:
    """Which rows are on the Pareto front: no other is at least as good in both, and better in one."""
    known = means[[score, cost]].notna().all(axis=1)
    on_front = pd.Series(False, index=means.index)
    if known.any():
        sign = -1 if QUANTITIES[score].better == "less" else 1
        on_front[known] = pareto_rank(sign * means.loc[known, score], means.loc[known, [cost]]) == 1
    return on_front


@styled
def learning_rates(table: pd.DataFrame) -> Figure:
    """Validation loss against learning rate, one line per column (method)."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    palette = {method: method_look(method)["color"] for method in table}
    sns.lineplot(table, markers=True, dashes=False, palette=palette, ax=axes)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss", ylim=(0, None))
    legend_outside(axes)
    return figure


@styled
def costs_by_batch(stock: pd.DataFrame, lean: pd.DataFrame) -> Figure:
    """Peak memory of a step in per cent of full fine-tuning's, by batch size; a row of panels per backbone.

    `stock`, `lean`: `forecast.cnn_costs.cost_table` of the same steps without and with lean forms.  Left: as
    published, the sum of the categories' maxima; middle: the peak that really occurs; right: that of lean
    layers.  All are compared with full fine-tuning in stock torch, counted in the same way.
    """
    keys = ["backbone", "batch_size"]
    full = stock[stock.method == "full"].set_index(keys)
    parts = []
    for name, frame, column in (
        ("as published: sum of maxima", stock, "published_bytes"),
        ("true peak", stock, "peak_bytes"),
        ("true peak, lean layers", lean, "peak_bytes"),
    ):
        percent = 100 * frame[column] / frame.set_index(keys).index.map(full[column])
        parts.append(frame[[*keys, "method"]].assign(percent=percent, counted=name))
    grid = sns.relplot(
        pd.concat(parts), x="batch_size", y="percent", hue="method", row="backbone", col="counted",
        style="method", kind="line", markers=True, dashes=False, height=2.8, aspect=1.3,
        palette={method: method_look(method)["color"] for method in stock.method.unique()},
    )  # fmt: skip
    grid.set(ylim=(0, None)).set_titles("{row_name}: {col_name}", size=10)
    grid.set_axis_labels("batch size", "memory (% of full)")
    for axes in grid.axes.flat:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    return grid.figure
