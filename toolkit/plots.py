"""Figures.  Each function draws one and returns it; `save` writes it for the README or a report."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torchvision
from matplotlib.figure import Figure
from torch.utils.data import Dataset

from toolkit.evaluation import Evaluation
from toolkit.methods import METHODS
from toolkit.paths import FIGURES

sns.set_theme(style="whitegrid", context="notebook", palette="colorblind")
STRATEGY_MARKERS = {"none": "o", "static": "s", "threshold": "^"}


def save(figure: Figure, name: str, folder: Path = FIGURES) -> Path:
    """Write `figure` as `name`.png."""
    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    return path


def learning_curves(history: list[dict]) -> Figure:
    """Loss and accuracy of training and validation, by epoch."""
    frame = pd.DataFrame(history)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for part, name in (("train", "training"), ("val", "validation")):
        left.plot(frame.epoch, frame[f"{part}_loss"], marker="o", label=name)
        right.plot(frame.epoch, frame[f"{part}_top1_pct"], marker="o", label=name)
    left.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
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


def confusion_matrix(evaluation: Evaluation, classes: list[str]) -> Figure:
    """True against predicted class on the evaluated split; rows sum to 1."""
    many = len(classes) > 20
    side = 5 if len(classes) <= 10 else 7
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    pairs = pd.crosstab(evaluation.labels.numpy(), evaluation.predictions.numpy(), normalize="index")
    names = False if many else [name.replace("$", r"\$") for name in classes]
    sns.heatmap(
        pairs.reindex(index=range(len(classes)), columns=range(len(classes)), fill_value=0.0),
        vmin=0, vmax=1, cmap="Blues", square=True, annot=len(classes) <= 10, fmt=".2f",
        annot_kws={"fontsize": 8}, xticklabels=names, yticklabels=names, ax=axes,
    )  # fmt: skip
    axes.set(xlabel="predicted", ylabel="true")
    return figure


def accuracy_against(frame: pd.DataFrame, cost: str) -> Figure:
    """Test accuracy of every run against `cost`: "memory" (training peak) or "time" (training)."""
    column, unit, label = {
        "memory": ("train_peak_bytes", 2**20, "peak training memory (MiB)"),
        "time": ("train_seconds", 1, "training time (s)"),
    }[cost]
    data = frame[frame.status == "ok"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    sns.scatterplot(
        x=data[column] / unit, y=data.test_top1_pct, hue=data.method, style=data.checkpointing,
        hue_order=[m for m in METHODS if m in set(data.method)],
        markers=STRATEGY_MARKERS, s=110, alpha=0.85, ax=axes,
    )  # fmt: skip
    budgets = data.budget.astype(float).unique()
    if cost == "memory" and len(budgets) == 1:
        axes.axvline(budgets[0] / unit, color="black", linestyle="--", linewidth=1, label="budget")
    axes.set(xlabel=label, ylabel="test accuracy (%)", xlim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
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
