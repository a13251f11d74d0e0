"""Figures of plans: a step under a budget, what budgets cost, and how many images fit.

`StepFigure` shows one plan after the other in one figure, for a slider: what stays is drawn once, and the
rest on top of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from toolkit.budget.plan import Plan
from toolkit.plots.runs import STRATEGY_MARKERS
from toolkit.plots.text import plain

MARKS = tuple(gigabytes * 10**9 for gigabytes in (2, 4, 6, 8))  # of common cards
_MIB = 2**20
_MOMENTS = 1500  # that a picture has pixels for


@dataclass(frozen=True)
class BlockUse:
    """What one block does in a planned step."""

    name: str
    kind: str  # keep, recompute norms and cheap operators, ...
    kept_bytes: int  # for the backward pass
    recompute_pct: float  # of the block's own FLOPs
    slices: int  # that its batch runs in


@dataclass(frozen=True)
class StepPicture:
    """What the picture of a planned step shows."""

    budget_bytes: int
    fixed_bytes: int  # weights, batch, optimizer state
    memory_bytes: np.ndarray  # highest at each moment
    without_bytes: np.ndarray  # of the step that recomputes nothing; empty if it has other moments
    blocks: tuple[BlockUse, ...]


def picture_of(plan: Plan, without: Plan | None = None) -> StepPicture:
    """What to show of `plan`; `without`: the plan of the same step that recomputes nothing."""
    rows = [(name, option) for name, option in zip(plan.segments, plan.options) if name]
    blocks = []
    for name, option in rows:
        kind = plan.levels[name].split(" (")[0].split(", in ")[0]
        flops = sum(op.flops for op in option.segment.ops)
        recompute_pct = 100 * option.level.flops / flops if option.level.flops else 0.0
        blocks.append(BlockUse(name, kind, option.kept, recompute_pct, option.slices))
    comparable = without is not None and len(without.memory) == len(plan.memory)
    return StepPicture(
        plan.budget_bytes - plan.reserve_bytes,
        sum(plan.fixed.get(kind, 0) for kind in ("weights", "batch", "optimizer")),
        _few(plan.memory),
        _few(without.memory) if comparable else np.empty(0, np.int64),
        tuple(blocks),
    )


def _few(values: np.ndarray) -> np.ndarray:
    """Not more values than a picture can show, each the highest of its neighbours."""
    if len(values) <= _MOMENTS:
        return values
    return np.maximum.reduceat(values, np.linspace(0, len(values), _MOMENTS, endpoint=False).astype(int))


def kinds_of(pictures: Sequence[StepPicture]) -> list[str]:
    """All that blocks do in these pictures, from keeping all to computing most again."""
    kinds = {block.kind for picture in pictures for block in picture.blocks}
    return sorted(kinds, key=lambda kind: (kind != "keep", len(kind)))


class StepFigure:
    """Memory over a step with the budget; below, what each block keeps and computes again.

    `kinds`: all that the blocks of the pictures to come do, each with its colour.  All pictures are of
    one model.
    """

    def __init__(self, figure: Figure, picture: StepPicture, kinds: Sequence[str]):
        self.figure, self._background = figure, None
        self.above, self.below = figure.subplots(2, 1, height_ratios=(3, 2))
        self._colours = dict(zip(kinds, sns.color_palette("crest", len(kinds))))
        nothing = {"x": [0], "y1": [0], "step": "post", "linewidth": 0}
        self._without = self.above.fill_between(**nothing, color="0.85", label="without checkpointing")
        self._memory = self.above.fill_between(**nothing, alpha=0.7, label="this plan")
        # Peaks are narrower than a pixel: a line keeps them visible.
        (self._line,) = self.above.step([0], [0], where="post", linewidth=0.6, color="C0")
        self._fixed = self.above.axhspan(
            0, 0, color="0.45", linewidth=0, label="weights, batch,\noptimizer state"
        )
        self._budget = self.above.axhline(0, color="black", linestyle="--", linewidth=1, label="budget")
        self.above.set(
            xlabel="share of one training step's operators (%): forward, then backward",
            ylabel="allocated (MiB)", xlim=(0, 100),
        )  # fmt: skip
        names = _short([block.name for block in picture.blocks])
        self._bars = self.below.bar(range(len(names)), 0)
        higher = self.below.transData + ScaledTranslation(0, 2 / 72, figure.dpi_scale_trans)
        self._notes = [
            self.below.text(x, 0, "", ha="center", fontsize=9, transform=higher)
            for x in range(len(names) if len(names) <= 16 else 0)
        ]
        self.below.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 4 else 90)
        self.below.grid(axis="x", visible=False)
        self.below.set(xlabel="block", ylabel="kept for\nbackward (MiB)", xlim=(-0.6, len(names) - 0.4))
        for axes in (self.above, self.below):
            axes.yaxis.set_label_coords(-0.08, 0.5)  # found anew in every picture otherwise
        self.show(picture)

    def show(self, picture: StepPicture) -> None:
        """Change the figure to `picture`, without drawing it."""
        memory = picture.memory_bytes / _MIB
        moments = np.linspace(0, 100, len(memory))
        without = picture.without_bytes / _MIB if len(picture.without_bytes) else np.zeros_like(memory)
        self._without.set_data(moments, without, 0)
        self._memory.set_data(moments, memory, 0)
        self._line.set_data(moments, memory)
        self._fixed.set_height(picture.fixed_bytes / _MIB)
        highest = max(memory.max(), without.max())
        budget = picture.budget_bytes / _MIB
        near = budget < 3 * highest  # else it would be all that can be seen
        self._budget.set(ydata=[budget, budget], visible=near)
        self.above.set(ylim=(0, 1.05 * max(highest, budget * near)))

        kept = [block.kept_bytes / _MIB for block in picture.blocks]
        for bar, block, height in zip(self._bars, picture.blocks, kept):
            bar.set(height=height, facecolor=self._colours[block.kind])
        for note, block, height in zip(self._notes, picture.blocks, kept):
            lines = [f"{block.recompute_pct:.0f} %"] if block.recompute_pct else []
            lines += [f"{block.slices} slices"] if block.slices > 1 else []
            note.set(text="\n".join(lines), y=height)
        self.below.set_ylim(0, 1.25 * (max(kept) or 1))

    def legends(self) -> tuple[list, list]:
        """Handles with labels: of the memory, and of what blocks do."""
        memory = [self._without, self._memory, self._fixed, self._budget]
        return memory, [Patch(color=colour, label=kind) for kind, colour in self._colours.items()]

    def png(self, picture: StepPicture) -> bytes:
        """`picture` as PNG.  Text takes longest, so what is the same in all of them is drawn once."""
        self.show(picture)
        axes = (self.above, self.below)
        changing = [
            self.above.yaxis, self._without, self._memory, self._line, self._fixed,
            self._budget, self.below.yaxis, *self._bars, *self._notes,
        ]  # fmt: skip
        if self._background is None:
            canvas = FigureCanvasAgg(self.figure)
            self.figure.set_layout_engine("constrained")
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            for one in axes:
                box = one.get_position()
                one.set_position((box.x0 + 0.02, box.y0, box.width - 0.02, box.height))  # longer numbers
            for artist in changing:
                artist.set_animated(True)
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.figure.bbox)
        canvas = self.figure.canvas
        canvas.restore_region(self._background)
        for artist in changing:
            artist.axes.draw_artist(artist)
        with io.BytesIO() as file:
            Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(file, "png", compress_level=1)
            return file.getvalue()


def plan_over_step(plan: Plan, without: Plan | None = None) -> Figure:
    """Memory over a planned step, with the budget; below, what each block keeps and computes again.

    `without`: the plan of the same step that recomputes nothing, drawn behind.
    """
    picture = picture_of(plan, without)
    return step_figure(picture, kinds_of([picture]))


def step_figure(picture: StepPicture, kinds: Sequence[str]) -> Figure:
    """One picture as a figure with legends."""
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    shown = StepFigure(figure, picture, kinds)
    memory, blocks = shown.legends()
    seen = {block.kind for block in picture.blocks}
    blocks = [handle for handle in blocks if handle.get_label() in seen]
    for axes, handles in ((shown.above, memory), (shown.below, blocks)):
        labels = [handle.get_label().replace(", ", ",\n") for handle in handles]
        axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _short(names: list[str]) -> list[str]:
    """The last parts of module names, as many as tell them apart."""
    short = [name.rsplit(".", 1)[-1] if name[-1].isdigit() else name for name in names]
    if len(set(short)) < len(short):  # stages that count their blocks each for itself
        short = [".".join(name.split(".")[-3:]) for name in names]
    return [plain(name) for name in short]


def batch_sizes_against_memory(frame: pd.DataFrame) -> Figure:
    """Images in one forward pass against the memory that they take, with the common cards.

    `frame`: strategy, images, peak_bytes, as `Explorer.batch_sizes` gives them.  Between its rows
    peaks are drawn as growing evenly, the most they can be; that is no straight line on these axes.
    """
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for mark in MARKS:
        axes.axvline(mark / 1e9, color="0.4", linestyle=":", linewidth=1.2)
    for colour, style, (strategy, rows) in zip(
        sns.color_palette(), ("-", "--", "-."), frame.sort_values("images").groupby("strategy", sort=False)
    ):
        images = np.union1d(np.geomspace(rows.images.min(), rows.images.max(), 200), rows.images)
        axes.plot(
            np.interp(images, rows.images, rows.peak_bytes) / 1e9, images, color=colour, linestyle=style,
            marker=STRATEGY_MARKERS[strategy], markevery=np.searchsorted(images, rows.images).tolist(),
            label=strategy,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlim=(frame.peak_bytes.min() / 2e9, 1.25 * MARKS[-1] / 1e9),
        ylim=(0.9 * frame.images.min(), 1.5 * frame.images.max()),
        xlabel="peak memory (GB)", ylabel="images in one forward pass",
    )  # fmt: skip
    axes.set_xticks(ticks := [tick for tick in (0.01, 0.1, 0.5, 1, 2, 4, 6, 8) if tick >= axes.get_xlim()[0]])
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(loc="upper left")
    return figure
