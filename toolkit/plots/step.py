"""Figures of one training step: its memory over time, what budgets cost, and what fits on which card."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from toolkit.budget import STRATEGIES
from toolkit.forecast.explorer import StepPicture, kinds_of
from toolkit.plots.style import budget_at_edge, grid_of, legend_outside, plain, styled

MIB = 2**20
FAR = 3  # times the highest memory: a budget beyond it would dwarf the data
PHASES = ("forward", "backward", "optimizer")  # recomputation is a part of backward


@styled
def memory_over_step(
    traces: Mapping[str, Sequence[dict]] | Sequence[dict],
    budget_bytes: int | None = None,
    peak_bytes: int | None = None,
) -> Figure:
    """Allocated memory over one training step; the phases have the same width for all traces.

    `traces`: segments of `measure.memory.MemoryTrace`, of one step or by name of several.  `budget_bytes` and
    `peak_bytes` (the highest of all steps of a run) are drawn as lines.
    """
    traces = traces if isinstance(traces, Mapping) else {"one step": traces}
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    colours = sns.color_palette(n_colors=len(traces))
    for colour, (name, trace) in zip(colours, traces.items()):
        share, mib = _moments(trace)
        axes.step(
            share, mib, where="post", linewidth=1.2, color=colour, label=f"{plain(name)}, peak {max(mib):.3g}"
        )
        if len(traces) == 1:
            axes.fill_between(share, mib, step="post", alpha=0.3, linewidth=0, color=colour)
    highest = max(max(segment["bytes"], default=0) for trace in traces.values() for segment in trace)
    for name, size, style in (("budget", budget_bytes, "--"), ("peak of all steps", peak_bytes, ":")):
        if size is not None and size < FAR * highest:
            axes.axhline(size / MIB, color="black", linestyle=style, linewidth=1, label=name)
        elif size is not None:
            budget_at_edge(axes, size)
    for border in range(1, len(PHASES)):
        axes.axvline(border, color="0.3", linewidth=0.8)
    axes.set_xticks([place + 0.5 for place in range(len(PHASES))], PHASES)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="allocated (MiB)", xlim=(0, len(PHASES)), ylim=(0, None))
    legend_outside(axes)
    return figure


def _moments(trace: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Time in phases (0 to 3) and memory in MiB after each operator of `trace`."""
    bytes_of = {phase: [] for phase in PHASES}
    for segment in trace:
        phase = "backward" if segment["phase"] == "recompute" else segment["phase"]
        bytes_of[phase] += segment["bytes"]
    times = [place + np.linspace(0, 1, len(values)) for place, values in enumerate(bytes_of.values())]
    return np.concatenate(times), np.concatenate([*map(np.asarray, bytes_of.values())]) / MIB


class StepFigure:
    """A planned step under its budget; below, what each block keeps and recomputes.

    One figure shows one picture after the other (`show`), for a slider.  `kinds`: everything that blocks do
    in any of the pictures, each with its colour.  All pictures must be of one model.
    """

    @styled
    def __init__(self, figure: Figure, picture: StepPicture, kinds: Sequence[str]):
        self.figure = figure
        self.above, self.below = figure.subplots(2, 1, height_ratios=(3, 2))
        self._colours = dict(zip(kinds, sns.color_palette("crest", len(kinds))))
        nothing = {"x": [0], "y1": [0], "step": "post", "linewidth": 0}
        self._without = self.above.fill_between(**nothing, color="0.85", label="without checkpointing")
        self._memory = self.above.fill_between(**nothing, alpha=0.7, label="this plan")
        # Peaks are narrower than a pixel: a line keeps them visible.
        (self._line,) = self.above.step([0], [0], where="post", linewidth=0.6, color="C0")
        fixed = "weights, batch,\noptimizer state"
        self._fixed = self.above.axhspan(0, 0, color="0.45", linewidth=0, label=fixed)
        self._budget = self.above.axhline(0, color="black", linestyle="--", linewidth=1, label="budget")
        self.above.set(
            xlabel="share of one training step's operators (%): forward, then backward",
            ylabel="allocated (MiB)", xlim=(0, 100),
        )  # fmt: skip
        names = _short([block.name for block in picture.blocks])
        self._bars = self.below.bar(range(len(names)), 0)
        annotated = len(names) if len(names) <= 16 else 0
        self._notes = [
            self.below.text(x, 0, "", ha="center", va="bottom", fontsize=9) for x in range(annotated)
        ]
        self.below.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 4 else 90)
        self.below.grid(axis="x", visible=False)
        self.below.set(xlabel="block", ylabel="kept for\nbackward (MiB)", xlim=(-0.6, len(names) - 0.4))
        legend_outside(self.above)
        patches = [
            Patch(color=colour, label=kind.replace(", ", ",\n")) for kind, colour in self._colours.items()
        ]
        self.below.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1))
        self.show(picture)

    def show(self, picture: StepPicture) -> None:
        """Change the figure to `picture`, without rendering it."""
        memory, without = (np.divide(of, MIB) for of in (picture.memory_bytes, picture.without_bytes))
        moments = np.linspace(0, 100, len(memory))
        self._without.set_data(np.linspace(0, 100, len(without)), without, 0)
        self._memory.set_data(moments, memory, 0)
        self._line.set_data(moments, memory)
        self._fixed.set_height(picture.fixed_bytes / MIB)
        _draw_budget(self.above, self._budget, picture.budget_bytes / MIB, max(memory.max(), without.max()))

        kept = [block.kept_bytes / MIB for block in picture.blocks]
        for bar, block, height in zip(self._bars, picture.blocks, kept):
            bar.set(height=height, facecolor=self._colours[block.kind])
        for note, block, height in zip(self._notes, picture.blocks, kept):
            lines = [f"{block.recompute_pct:.0f} %"] if block.recompute_pct else []
            lines += [f"{block.slices} slices"] if block.slices > 1 else []
            note.set(text="\n".join(lines), y=height)
        self.below.set_ylim(0, 1.25 * (max(kept) or 1))

    def png(self, picture: StepPicture) -> bytes:
        """`picture` as PNG."""
        self.show(picture)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        self.figure.set_layout_engine("none")  # laid out once: it takes as long as drawing
        with io.BytesIO() as file:
            Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "png", compress_level=1)
            return file.getvalue()


def _draw_budget(axes: Axes, line, budget: float, highest: float) -> None:
    """Show the budget as a line if it is near the memory, otherwise as text."""
    near = budget < FAR * highest
    line.set(ydata=[budget, budget], visible=near)
    for text in list(axes.texts):
        text.remove()
    if not near:
        budget_at_edge(axes, budget * MIB)
    axes.set_ylim(0, 1.05 * max(highest, budget if near else 0))


def _short(names: list[str]) -> list[str]:
    """The last parts of module names, as many as tell them apart."""
    short = [name.rsplit(".", 1)[-1] if name[-1].isdigit() else name for name in names]
    if len(set(short)) < len(short):  # each stage numbers its own blocks
        short = [".".join(name.split(".")[-3:]) for name in names]
    return [plain(name) for name in short]


@styled
def step_figure(picture: StepPicture, kinds: Sequence[str] = ()) -> Figure:
    """Memory over a planned step, with the budget; below, what each block keeps and recomputes."""
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    return StepFigure(figure, picture, kinds or kinds_of([picture])).figure


@styled
def recompute_against_budget(frame: pd.DataFrame) -> Figure:
    """Recomputed share of the forward pass against the memory that is held, by strategy.

    `frame`: as from `Explorer.curve`.  "planned" is a curve.  Others are a point at the peak that they reach,
    and a cross at the budget that they were given, which is a line, if they broke it.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for colour, (strategy, rows) in zip(sns.color_palette(), frame.groupby("strategy", sort=False)):
        rows = rows.sort_values("budget_bytes")
        peak, budget = rows.peak_bytes / MIB, rows.budget_bytes / MIB
        style = {"color": colour, "marker": STRATEGIES[strategy].marker, "label": strategy}
        if strategy == "planned":
            axes.plot(peak, rows.recompute_pct, markersize=5, **style)
            continue
        axes.plot(peak, rows.recompute_pct, markersize=9, linestyle="none", zorder=3, clip_on=False, **style)
        broken = (peak > budget) & STRATEGIES[strategy].reads_memory  # it knows its budget
        axes.hlines(rows.recompute_pct[broken], budget[broken], peak[broken], color=colour, linestyles=":")
        if broken.any():
            cross = {"color": colour, "markersize": 10, "markeredgewidth": 2.5, "label": "its budget, broken"}
            axes.plot(budget[broken], rows.recompute_pct[broken], "x", **cross)
    for budget in frame.budget_bytes[frame.strategy != "planned"].unique():
        if budget < 1.2 * frame.peak_bytes.max():
            axes.axvline(budget / MIB, color="black", linestyle="--", linewidth=1, label="budget")
        else:
            budget_at_edge(axes, budget, along="x")
    axes.set(
        xlabel="peak memory of the step (MiB)", ylabel="recomputed (% of forward FLOPs)", ylim=(-3, None)
    )
    whole = frame.loc[frame.strategy == "none", "peak_bytes"]
    if len(whole):
        percent = whole.iloc[0] / MIB / 100
        share = axes.secondary_xaxis("top", functions=(lambda x: x / percent, lambda x: x * percent))
        share.set_xlabel("share of the peak without checkpointing (%)")
    axes.legend(loc="upper right")
    return figure


@styled
def smallest_budgets(frame: pd.DataFrame) -> Figure:
    """The smallest budget (GB) of each backbone and method, darker for each larger card that it needs.

    `frame`: as from `forecast.what_fits`.  A step that cannot be built is grey with a dash.
    """
    cards = [*frame.card.cat.categories, f"more than {frame.card.cat.categories[-1]}"]
    colours = ListedColormap(sns.color_palette("cividis_r", len(cards)))
    card = frame.card.cat.codes.replace(-1, len(cards) - 1).astype(float)
    frame = frame.assign(gigabytes=frame.smallest_bytes.astype(float) / 1e9)
    frame["card"] = card.where(frame.gigabytes.notna())
    methods, backbones = frame.method.nunique(), frame.backbone.nunique()
    strategies = list(dict.fromkeys(frame.strategy))
    size = (0.85 * methods + 0.5, 0.5 * backbones + 0.9)
    figure, rows = grid_of(len(strategies), 1, *size, sharex=True)
    for (axes,), strategy in zip(rows, strategies):
        table = frame[frame.strategy == strategy].set_index(["backbone", "method"])
        cells, places = table.gigabytes.unstack(sort=False), table.card.unstack(sort=False)
        texts = cells.map(lambda value: "–" if np.isnan(value) else f"{value:.2g}")
        axes.set_facecolor("0.85")
        sns.heatmap(places, cmap=colours, vmin=-0.5, vmax=len(cards) - 0.5, cbar=False, linewidths=1, ax=axes)
        for (y, x), text in np.ndenumerate(texts.to_numpy()):
            dark = places.to_numpy()[y, x] >= len(cards) / 2
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color="w" if dark else "k")
        axes.set(title=f"checkpointing {strategy}", xlabel="", ylabel="")
        axes.set_yticklabels([plain(name) for name in places.index], rotation=0)
        axes.set_xticklabels(places.columns, rotation=45, ha="right")
    keys = [Patch(facecolor=colours(place), edgecolor="0.5", label=card) for place, card in enumerate(cards)]
    figure.legend(
        handles=keys, title="smallest card that holds it", loc="outside lower center", ncols=len(keys)
    )
    return figure
