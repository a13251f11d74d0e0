"""The look of all figures: theme, colours, markers, escaping of names, and saving."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from toolkit.budget import format_bytes
from toolkit.methods import METHODS

THEME = sns.axes_style("whitegrid") | sns.plotting_context("notebook")
# Of Okabe and Ito (2008): they also differ for people with red-green weakness.  Yellow is faint on white
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#000000", "#f0e442")
FILLS = ("full", "none")  # of the symbols of the first methods, and of those beyond the palette
THEME |= {"axes.prop_cycle": cycler(color=PALETTE)}
BASELINE_MARKER = "P"


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorate a function that draws: it uses the theme of this package and leaves the user's alone."""

    @functools.wraps(draw)
    def inside(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(THEME):
            return draw(*args, **kwargs)

    return inside


def grid_of(
    rows: int, columns: int, width: float, height: float, **options
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` times `columns` axes of `width` times `height` inches each."""
    size = (1.5 + width * columns, 0.5 + height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)


def plain(text: str) -> str:
    """`text` with its dollar signs escaped, which matplotlib reads as the start of a formula."""
    return text.replace("$", r"\$")


def method_look(method: str) -> dict[str, str]:
    """Colour and fill of a method's symbols, the same in every figure; grey for others, such as baselines."""
    if method not in METHODS:
        return {"color": "0.35", "fillstyle": FILLS[0]}
    again, place = divmod(list(METHODS).index(method), len(PALETTE))
    return {"color": PALETTE[place], "fillstyle": FILLS[again % len(FILLS)]}


def legend_outside(axes: Axes, *others: Axes) -> None:
    """One legend to the right of `axes`, for these axes and `others`; each label once, points first."""
    handles = {}
    for each in (*others, axes):
        found = zip(*each.get_legend_handles_labels())
        for handle, label in sorted(found, key=lambda pair: not isinstance(pair[0], ErrorbarContainer)):
            handles.setdefault(label, handle)
    if handles:
        columns = 1 + len(handles) // 14  # more lines would squeeze the axes
        axes.legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)


def note(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, axes = plt.subplots(figsize=(6, 1))
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center")
    return figure


def save(figure: Figure, name: str, folder: Path, ending: str = ".png") -> Path:
    """Write `figure` to `folder` as `name` with the ending .png, .svg or .pdf; equal figures, equal files."""
    path = Path(folder) / f"{name}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(path, dpi=120, bbox_inches="tight", metadata=undated[ending])
    return path


def budget_at_edge(axes: Axes, budget_bytes: float, along: str = "y") -> None:
    """Name a budget that is so far beyond the data that drawing it would make them invisible."""
    x, y, arrow = (0.99, 0.97, "↑") if along == "y" else (0.99, 0.03, "→")
    text = f"budget {format_bytes(budget_bytes)} {arrow}"
    axes.text(
        x, y, text, ha="right", va="top" if along == "y" else "bottom", transform=axes.transAxes,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8},
    )  # fmt: skip


def png(figure: Figure) -> bytes:
    """`figure` as PNG for a widget; it is closed, so that a notebook does not show it a second time."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=72)
        plt.close(figure)
        return file.getvalue()
