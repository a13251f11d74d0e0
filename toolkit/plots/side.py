"""Figures that hold several methods against one another: memory of a step, in total and moment by moment,
and learning curves; and what there is to be learnt in dense prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from toolkit.analysis.statistics import groups, mean_and_interval
from toolkit.datasets import Splits, task_of
from toolkit.datasets.tasks import IGNORED, score_in
from toolkit.forecast.step_memory import MIB, StepMemory
from toolkit.measure.quantities import QUANTITIES
from toolkit.plots.text import plain

_PHASES = {"forward": 3, "backward": 3, "optimizer": 1}  # with the width of their part of the axis
_PHASE_OF = {"recompute": "backward"}
_MARKERS = "osD^v<>PX*hpdH8"
_LINES = ("-", "--", "-.", ":")


def memory_bars(steps: Mapping[str, StepMemory], title: str = "") -> Figure:
    """Peak of a step by method, and how much of it was kept by autograd for backward."""
    names = [plain(name) for name in steps]
    peak, kept = (
        np.array([getattr(step, name) for step in steps.values()]) / MIB
        for name in ("peak_bytes", "kept_bytes")
    )
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.42 * len(names)), layout="constrained")
    colour = sns.color_palette()[0]
    axes.barh(names, peak, color=colour, alpha=0.3, label="peak of the step")
    axes.barh(names, kept, color=colour, height=0.45, label="kept for backward")
    for place, (whole, part) in enumerate(zip(peak, kept)):
        axes.annotate(
            f"kept {part:.3g}, peak {whole:.3g}", (whole, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=10,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="memory of one training step (MiB)", title=plain(title))
    axes.margins(x=0.28)  # for the numbers
    axes.legend(loc="lower right")
    return figure


def memory_over_steps(traces: Mapping[str, Sequence[dict]]) -> Figure:
    """Allocated memory over one training step, a line for each method.

    `traces`: by name, segments as of `measure.memory.MemoryTrace`.  Every phase has one width for all
    methods, whatever its number of operators; what is computed again counts to backward.
    """
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    edges = dict(zip(_PHASES, np.cumsum([0, *_PHASES.values()])))  # where they begin
    colours = sns.color_palette("colorblind", len(traces))
    for number, (name, trace) in enumerate(traces.items()):
        x, y = [], []
        for phase, start in edges.items():
            parts = [part["bytes"] for part in trace if _PHASE_OF.get(part["phase"], part["phase"]) == phase]
            values = [value / MIB for part in parts for value in part]
            x += list(start + _PHASES[phase] * np.linspace(0, 1, len(values)))
            y += values
        axes.plot(
            x, y, color=colours[number], linestyle=_LINES[number % len(_LINES)], linewidth=1.6,
            label=f"{plain(name)}, peak {max(y, default=0):.3g}",
        )  # fmt: skip
    for start in list(edges.values())[1:]:
        axes.axvline(start, color="0.3", linewidth=0.8)
    axes.set_xticks([start + _PHASES[phase] / 2 for phase, start in edges.items()], edges)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="allocated (MiB)", xlim=(0, sum(_PHASES.values())), ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves_by_method(histories: Mapping[str, Sequence[dict]]) -> Figure:
    """Training loss and validation score by epoch, a line for each method; `histories`: of `FitResult`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    label = "score"
    for name, history in histories.items():
        if not history:  # it ended in its first epoch
            continue
        epochs = [row["epoch"] for row in history]
        left.plot(epochs, [row["train_loss"] for row in history], marker="o", label=plain(name))
        scores = [score_in(row, "val") for row in history]
        label = QUANTITIES[scores[-1][0]].title
        values = [float("nan") if value is None else value for _, value in scores]
        right.plot(epochs, values, marker="o", label=plain(name))
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"validation {label}")
    for axes in (left, right):
        top = axes.dataLim.y1
        axes.set_ylim(0, 1.08 * top if math.isfinite(top) and top > 0 else 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="best")
    return figure


def scores_against_memory(records: pd.DataFrame) -> Figure:
    """Test score against peak memory, means over seeds with 95 % intervals; a picture for each data set.

    `records`: as `load_records`, of dense tasks or classification; runs that did not end well are left out.
    """
    ok = records[(records.status == "ok") & (records.phase == "training")]
    datasets = list(dict.fromkeys(ok.dataset))
    figure, every = plt.subplots(
        1, len(datasets), figsize=(1.5 + 4.6 * len(datasets), 4), layout="constrained", squeeze=False
    )
    looks = dict(zip(dict.fromkeys(ok.method), zip(sns.color_palette("husl", ok.method.nunique()), _MARKERS)))
    for axes, dataset in zip(every.flat, datasets):
        metric = task_of(dataset).metric
        for _, group in groups(ok[ok.dataset == dataset]):
            method = group.method.iloc[0]
            score, half_width, _ = mean_and_interval(group[f"test_{metric}"])
            peak, _, _ = mean_and_interval(group.train_peak_bytes / MIB)
            if score is None or peak is None:
                continue
            colour, marker = looks[method]
            axes.errorbar(
                peak, score, yerr=half_width or 0.0, marker=marker, markersize=8, capsize=3, linestyle="none",
                color=colour, label=plain(method),
            )  # fmt: skip
        axes.margins(0.1)
        axes.set(xlabel="peak memory (MiB)", ylabel=QUANTITIES[f"test_{metric}"].title, title=plain(dataset))
        axes.set_xlim(0, None)
    handles = {
        label: handle for axes in every.flat for handle, label in zip(*axes.get_legend_handles_labels())
    }
    if handles:
        every.flat[-1].legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def examples(splits: Splits, count: int = 6) -> Figure:
    """The first training images of a data set for dense prediction; below each the same with its truth."""
    colours = [tuple(round(255 * part) for part in colour) for colour in sns.color_palette("tab10")]
    colours = [colours[label % len(colours)] for label in range(len(splits.classes))]
    figure, rows = plt.subplots(2, count, figsize=(1.7 * count, 4.2), layout="constrained", squeeze=False)
    seen = set()
    for (above, below), row in zip(rows.T, range(count)):
        image, target = splits.train[row]
        drawn, labels = (_with_mask if splits.task == "segmentation" else _with_boxes)(image, target, colours)
        seen |= labels
        for axes, picture in ((above, image), (below, drawn)):
            axes.imshow(picture.permute(1, 2, 0))
            axes.set_axis_off()
    handles = [
        Patch(color=np.array(colours[label]) / 255, label=plain(splits.classes[label]))
        for label in sorted(seen)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9)
    return figure


def _with_mask(
    image: torch.Tensor, mask: torch.Tensor, colours: Sequence[tuple]
) -> tuple[torch.Tensor, set[int]]:
    labels = [label for label in mask.unique().tolist() if label != IGNORED]
    layers = torch.stack([mask == label for label in labels])
    return draw_segmentation_masks(image, layers, 0.65, [colours[n] for n in labels]), set(labels)


def _with_boxes(
    image: torch.Tensor, target: dict[str, torch.Tensor], colours: Sequence[tuple]
) -> tuple[torch.Tensor, set[int]]:
    """Enlarged, so that lines are thin beside objects of few pixels."""
    scale = max(1, 512 // max(image.shape[1:]))
    large = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    boxes, labels = scale * target["boxes"][:, :4], target["boxes"][:, 4].int().tolist()
    return draw_bounding_boxes(large, boxes, colors=[colours[n] for n in labels], width=scale), set(labels)
