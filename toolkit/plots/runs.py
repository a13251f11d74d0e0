"""Figures.  Each function draws one and returns it; `save` writes it for the README or a report."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torchvision
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset

from toolkit.analysis.statistics import adaptation
from toolkit.datasets import Splits
from toolkit.datasets.tasks import score_in
from toolkit.errors import InputError
from toolkit.files import FIGURES
from toolkit.measure.quantities import QUANTITIES
from toolkit.methods import METHODS
from toolkit.plots.images import test_examples
from toolkit.plots.pareto import COSTS
from toolkit.plots.text import plain
from toolkit.training.evaluation import Evaluation

sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
STRATEGY_MARKERS = {"none": "o", "static": "s", "threshold": "^", "planned": "D"}


def save(figure: Figure, name: str, folder: Path = FIGURES) -> Path:
    """Write `figure` as `name`.png."""
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    return path


def learning_curves(history: list[dict]) -> Figure:
    """Loss and score of training and validation, by epoch, as far as a run has them."""
    frame = pd.DataFrame(history)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    labels = []
    for part, name in (("train", "training"), ("val", "validation")):
        if f"{part}_loss" in frame:
            left.plot(frame.epoch, frame[f"{part}_loss"], marker="o", label=name)
        if found := score_in(history[-1], part):
            labels.append(QUANTITIES[found[0]].title)
            right.plot(frame.epoch, frame[f"{part}_{found[0]}"], marker="o", label=name)
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel=", ".join(dict.fromkeys(labels)), ylim=(0, 101))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def memory_over_step(trace: list[dict], budget_bytes: int, peak_bytes: int) -> Figure:
    """Allocated memory after each operator of one training step, with the budget and the run's peak.

    `trace`: segments of `measure.memory.MemoryTrace`; shades alternate from block to block.
    """
    figure, axes = plt.subplots(figsize=(10, 3.5), layout="constrained")
    colours = dict(zip(("forward", "backward", "recompute", "optimizer"), sns.color_palette()))
    start, shades = 0, {}
    for segment in trace:
        points = [count / 2**20 for count in segment["bytes"]]
        first = segment["phase"] not in axes.get_legend_handles_labels()[1]
        shade = shades.setdefault(segment["block"], 0.55 if len(shades) % 2 else 0.85)
        axes.fill_between(
            range(start, start + len(points)), points, alpha=shade, linewidth=0, step="post",
            color=colours[segment["phase"]], label=segment["phase"] if first else None,
        )  # fmt: skip
        # Peaks last one operator, less than a pixel: a line keeps them visible.
        axes.step(
            range(start, start + len(points)), points, where="post", linewidth=0.6,
            color=colours[segment["phase"]],
        )  # fmt: skip
        start += len(points)
    axes.axhline(budget_bytes / 2**20, color="black", linestyle="--", linewidth=1, label="budget")
    axes.axhline(peak_bytes / 2**20, color="black", linestyle=":", linewidth=1, label="peak of all steps")
    axes.set(
        xlabel="operators of one training step", ylabel="allocated (MiB)", xlim=(0, start), ylim=(0, None)
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def recompute_against_budget(frame: pd.DataFrame) -> Figure:
    """Recomputed share of the forward pass against the budget, by strategy.

    `frame`: rows with strategy, budget_bytes, peak_bytes, recompute_pct.  "planned": a curve.  Others: a
    point at the budget that they take; a cross at the one that they were given, if they broke it.  The
    row "none" is what the upper axis relates to.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    planned = frame[frame.strategy == "planned"].sort_values("budget_bytes")
    axes.plot(
        planned.budget_bytes / 2**20, planned.recompute_pct, marker=STRATEGY_MARKERS["planned"],
        markersize=5, label="planned",
    )  # fmt: skip
    others = frame[frame.strategy != "planned"]
    for colour, row in zip(sns.color_palette()[1:], others.itertuples()):
        given, taken = row.budget_bytes / 2**20, row.peak_bytes / 2**20
        marker = STRATEGY_MARKERS[row.strategy]
        axes.plot(
            taken, row.recompute_pct, marker, color=colour, markersize=9, label=row.strategy, zorder=3,
            clip_on=False,
        )  # fmt: skip
        if taken > given and row.strategy == "threshold":  # the only one that was told
            axes.plot((given, taken), (row.recompute_pct,) * 2, color=colour, linewidth=1, linestyle=":")
            axes.plot(
                given, row.recompute_pct, "x", color=colour, markersize=10, markeredgewidth=2.5,
                label="its budget, broken",
            )  # fmt: skip
    axes.set(xlabel="budget (MiB)", ylabel="recomputed (% of forward FLOPs)", ylim=(-3, None))
    whole = frame.loc[frame.strategy == "none", "peak_bytes"]
    if len(whole):
        percent = whole.iloc[0] / 2**20 / 100
        share = axes.secondary_xaxis("top", functions=(lambda x: x / percent, lambda x: x * percent))
        share.set_xlabel("share of the peak without checkpointing (%)")
    axes.legend(loc="upper right")
    return figure


def test_pictures(evaluation: Evaluation, model: nn.Module, splits: Splits) -> Figure:
    """What a test looks like: the confusion matrix of a classifier, predictions of a dense model."""
    if splits.task == "classification":
        return confusion_matrix(evaluation, splits.classes)
    return test_examples(model, splits)


def confusion_matrix(evaluation: Evaluation, classes: list[str]) -> Figure:
    """True against predicted class on the evaluated split; rows sum to 1."""
    many = len(classes) > 20
    side = 5 if len(classes) <= 10 else 7
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    pairs = pd.crosstab(evaluation.labels.numpy(), evaluation.predictions.numpy(), normalize="index")
    names = False if many else [plain(name) for name in classes]
    sns.heatmap(
        pairs.reindex(index=range(len(classes)), columns=range(len(classes)), fill_value=0.0),
        vmin=0, vmax=1, cmap="Blues", square=True, annot=len(classes) <= 10, fmt=".2f",
        annot_kws={"fontsize": 8}, xticklabels=names, yticklabels=names, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def accuracy_against(frame: pd.DataFrame, cost: str) -> Figure:
    """Test accuracy of every run against `cost`, one of `pareto.COSTS`; of runs that have one.

    Raises `InputError` where none has: dense tasks are scored otherwise.
    """
    data = adaptation(frame[(frame.status == "ok") & frame.test_top1_pct.notna()])
    if data.empty:
        raise InputError(
            "none of these runs has a test accuracy; for segmentation and detection see "
            "dense_prediction.ipynb."
        )
    baselines = data.phase == "inference"
    column, unit, label = COSTS[cost]
    names = data.method.where(~baselines, data.backbone + " " + data.method)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    sns.scatterplot(
        x=data[column] / unit, y=data.test_top1_pct, hue=names.rename("method"),
        style=data.checkpointing.where(~baselines, "baseline"),
        hue_order=[*(m for m in METHODS if m in set(names)), *names[baselines].unique()],
        markers=STRATEGY_MARKERS | {"baseline": "P"}, s=110, alpha=0.85, ax=axes,
    )  # fmt: skip
    budgets = data.budget.astype(float).unique()
    seen = budgets < 3 * data[column].max()  # else it would be all that can be seen
    if cost == "memory" and len(budgets) == 1 and seen[0]:
        axes.axvline(budgets[0] / unit, color="black", linestyle="--", linewidth=1, label="budget")
    low, high = data.test_top1_pct.min(), data.test_top1_pct.max()
    margin = max(0.1 * (high - low), (5 - (high - low)) / 2)  # at least 5 points: less is mostly chance
    axes.set(xlabel=label, ylabel="test accuracy (%)", xlim=(0, None), ylim=(low - margin, high + margin))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def method_grid(frame: pd.DataFrame) -> Figure:
    """Methods by strategies: peak memory in per cent of the budget, training time, and test accuracy."""
    data = frame[(frame.status == "ok") & (frame.phase == "training")].assign(
        used_pct=lambda runs: 100 * runs.train_peak_bytes / runs.budget.astype(float)
    )
    best = data.test_top1_pct.max()
    panels = {  # numbers, and colours that do not make much of little
        "used_pct": ("peak memory (% of the budget)", ".0f", {"cmap": "vlag", "vmin": 0, "vmax": 200}),
        "train_seconds": ("training time (s)", ".1f", {"cmap": "cividis", "vmin": 0}),
        "test_top1_pct": (
            "test accuracy (%)",
            ".1f",
            {"cmap": "cividis", "vmin": min(best - 5, data.test_top1_pct.min()), "vmax": best},
        ),
    }
    figure, all_axes = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    for axes, (column, (title, numbers, colours)) in zip(all_axes, panels.items()):
        table = data.pivot_table(index="method", columns="checkpointing", values=column)
        table = table.reindex(
            index=[m for m in METHODS if m in table.index],
            columns=[s for s in STRATEGY_MARKERS if s in table.columns],
        )
        sns.heatmap(table, annot=True, fmt=numbers, cbar=False, ax=axes, **colours)
        axes.set(title=title, xlabel="", ylabel="")
        axes.tick_params(axis="y", labelrotation=0)
    return figure


def learning_rates(table: pd.DataFrame) -> Figure:
    """Validation loss against learning rate, one line per column (method)."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for method in table:
        axes.plot(table.index, table[method], marker="o", label=method)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss", ylim=(0, None))
    axes.legend()
    return figure


def gallery(split: Dataset, evaluation: Evaluation, classes: list[str], count: int = 12) -> Figure:
    """Images of `split` with the predicted class and its confidence; half of them, if there are, mistakes.

    A mistake is marked by ✗ and the true class.  The most confident of each kind, where there are
    confidences; otherwise the first.
    """
    right = evaluation.predictions == evaluation.labels
    confidences = evaluation.confidences
    order = (
        torch.arange(len(right)) if confidences is None else confidences.argsort(descending=True, stable=True)
    )
    wrong = order[~right[order]][: count // 2]
    shown = torch.cat([order[right[order]][: count - len(wrong)], wrong]).tolist()
    names = [plain(name) for name in [*classes, "no class"]]  # "no class": an unmatched answer
    columns = min(6, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure, all_axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat:
        axes.set_axis_off()
    for axes, row in zip(all_axes.flat, shown):
        image, label = split[row]
        said = names[evaluation.predictions[row]]
        share = "" if confidences is None else f"{100 * confidences[row]:.0f} %"
        title = f"{said}\n{share}" if right[row] else f"✗ {said} {share}\ntrue: {names[label]}"
        axes.imshow(image.permute(1, 2, 0))
        axes.set_title(title, fontsize=9, color="black" if right[row] else "#b30000")
    return figure


def image_grid(split: Dataset, per_class: int, classes: int) -> Figure:
    """The first `per_class` images of `classes` classes, spread over all of them; one class a row."""
    labels = np.array([split[row][1] for row in range(len(split))])
    shown = np.unique(labels)[np.linspace(0, len(np.unique(labels)) - 1, classes).astype(int)]
    rows = [np.flatnonzero(labels == label)[:per_class] for label in shown]
    pictures = [split[row][0] for row in np.concatenate(rows)]
    grid = torchvision.utils.make_grid(pictures, nrow=2 * per_class, padding=2, pad_value=255)
    figure, axes = plt.subplots(figsize=(10, 10 * grid.shape[1] / grid.shape[2]), layout="constrained")
    axes.imshow(grid.permute(1, 2, 0))
    axes.set_axis_off()
    return figure
