"""Accuracy against cost as SVG text: every run a point with a tooltip, and the Pareto front of all of them.

Written by hand, not by matplotlib: a tooltip is one element inside its point, hundreds of points take
milliseconds, and without ids several pictures can stand in one page.  Each point has the number of its
method and the shape of its strategy, so that it can be told without colour.
"""

from __future__ import annotations

import collections
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from toolkit.analysis.statistics import DATA, adaptation
from toolkit.budget import format_bytes
from toolkit.errors import check_name
from toolkit.methods import METHODS

COSTS = {  # column of `statistics.adaptation`, unit of the axis in units of the column, and label
    "memory": ("peak_bytes", 2**20, "peak memory (MiB)"),
    "time": ("adapt_seconds", 1, "time to adapt (s)"),
    "energy": ("adapt_joules", 1, "energy to adapt (J)"),
}
SHAPES = {  # paths around (0, 0) in px; the strategies' as in `plots`
    "none": "M-8,0a8,8 0 1,0 16,0a8,8 0 1,0 -16,0z",
    "static": "M-7.5,-7.5h15v15h-15z",
    "threshold": "M0,-11L11,8H-11z",
    "planned": "M0,-11L11,0L0,11L-11,0z",
    "other": "M-9,-5L0,-10L9,-5V5L0,10L-9,5z",
    "baseline": "M-4,-10h8v6h6v8h-6v6h-8v-6h-6v-8h6z",
}
COLOURS = [c for c in sns.color_palette("colorblind").as_hex() if c != "#ece133"]  # yellow: too faint
DASHES = ("none", "2 3", "10 3 2 3", "16 4")  # of the fronts, one for each data set
LEFT, TOP, WIDTH, HEIGHT = 58, 14, 500, 330  # of the axes, px
ROW, LEGEND = 20, 270  # px: height of the rows and width of the legend
UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x80-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def front(frame: pd.DataFrame, cost: str) -> pd.Series:
    """Which rows of `frame` are on the Pareto front, bool, with its index.

    Those for which no other row on the same data has an accuracy at least as high at lower or equal cost,
    one of both strictly better.  A row without accuracy or cost is not.  `cost`: "memory" (peak), "time" or
    "energy", as in `statistics.adaptation`; what a simulated GPU said is no energy.  Rows are single runs,
    of which a lucky seed can be on the front; `statistics.standing` ranks means.
    """
    return _points(frame, cost).on_front.set_axis(frame.index)


def _points(frame: pd.DataFrame, cost: str) -> pd.DataFrame:
    """What is drawn of each row: figures (NaN: missing) and text."""
    column, unit, _ = COSTS[check_name("cost", cost, COSTS)]
    frame = adaptation(frame.reset_index(drop=True))
    costs = _numbers(frame, column) / unit
    if cost == "energy" and "energy_source" in frame:
        costs = costs.where(frame.energy_source != "fake")
    names = ("dataset", "backbone", "method", "checkpointing", "seed")
    text = pd.DataFrame(
        {name: frame[name].fillna("–").astype(str) if name in frame else "–" for name in names},
        index=frame.index,
        dtype=object,  # faster to walk through
    )
    points = text.assign(
        cost=costs,
        accuracy=_numbers(frame, "test_top1_pct"),
        budget_bytes=_numbers(frame, "budget"),
        shape=text.checkpointing.where(text.checkpointing.isin(list(SHAPES)), "other"),
    )
    baseline = frame.phase == "inference"
    points.loc[baseline, "shape"] = "baseline"
    points["name"] = text.method.where(~baseline, text.backbone + " " + text.method)
    data = [name for name in ("dataset", *DATA) if name in frame]
    points["data"] = frame.groupby(data, dropna=False).ngroup() if data else 0
    points["on_front"] = False
    for _, rivals in points.dropna(subset=["cost", "accuracy"]).groupby("data"):
        dearer = rivals.sort_values("cost").groupby("cost").accuracy.max()
        best = dearer.cummax()  # accuracy to be had for this cost
        steps = best[best > best.shift(fill_value=-np.inf)]
        points.loc[rivals.index, "on_front"] = rivals.accuracy == rivals.cost.map(steps)
    return points


def _numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    if column not in frame:
        return pd.Series(np.nan, index=frame.index)
    return pd.to_numeric(frame[column], errors="coerce").astype(float).replace([np.inf, -np.inf], np.nan)


def svg(frame: pd.DataFrame, cost: str) -> str:
    """The runs of `frame` over `cost` as stand-alone `<svg>` text: points with tooltips, and their front.

    Runs on several data sets have a front each.  A dashed line is the budget, if all runs have the same.
    Runs without accuracy or cost are counted below.  `cost`: as for `front`.
    """
    every = _points(frame, cost)
    points, label = every.dropna(subset=["cost", "accuracy"]), COSTS[cost][2]
    order = [*METHODS, *sorted(set(points.name) - set(METHODS))]  # a method keeps its number and colour
    numbers = {name: number for number, name in enumerate(order, start=1) if name in set(points.name)}
    shapes = [shape for shape in SHAPES if shape in set(points["shape"])]
    fronts = _front_names(points)
    absent = len(points) < len(every) or every.empty
    foot = TOP + HEIGHT + 60 if len(points) else 30
    height = max(
        foot + 12 if absent else foot - 12, TOP + ROW * (len(numbers) + len(shapes) + len(fronts) + 4)
    )
    picture = _element(
        None, "svg", xmlns="http://www.w3.org/2000/svg", role="img", width=LEFT + WIDTH + LEGEND,
        height=height, viewBox=f"0 0 {LEFT + WIDTH + LEGEND} {height}", font_family="sans-serif",
        font_size=13, fill="#222", style="max-width:100%", aria_label=f"test accuracy against {label}",
    )  # fmt: skip
    _element(picture, "rect", width="100%", height="100%", fill="#fff")
    if absent:
        what = f"{len(every) - len(points)} of {len(every)} runs are not shown:"
        what += f" no test accuracy, or no {label.rsplit(' ', 1)[0]}; their records say why"
        _element(picture, "text", what, x=LEFT, y=foot, fill="#555")
    if not points.empty:
        budgets = every.budget_bytes.unique()
        budget = budgets[0] if cost == "memory" and len(budgets) == 1 else np.inf
        seen = budget / 2**20 <= 3 * points.cost.max()  # else it would be all that can be seen
        limits = 0, 1.05 * max(points.cost.max(), budget / 2**20 if seen else 0) or 1
        _draw(picture, points, limits, numbers, label, budget / 2**20 if seen else None)
        _legend(picture, numbers, shapes, fronts, f"budget {format_bytes(budget)}" if seen else None)
    return printable(ElementTree.tostring(picture, encoding="unicode"))


def printable(text: str) -> str:
    """`text` with � for what no HTML or XML can hold: control characters and halves of pairs."""
    return UNPRINTABLE.sub("�", text)


def _front_names(points: pd.DataFrame) -> list[str]:
    """A name for each front, in the order of `points.data`."""
    names = points.groupby("data").dataset.first()
    if len(names) == 1:
        return ["Pareto front"]
    twice = names.duplicated(keep=False)  # another split, or other images under the name
    return list("Pareto front, " + names.where(~twice, names + " (data " + names.index.astype(str) + ")"))


def _draw(
    picture: ElementTree.Element,
    points: pd.DataFrame,
    limits: tuple[float, float],
    numbers: dict[str, int],
    label: str,
    budget: float | None,
) -> None:
    """Axes, budget line, fronts and points; `limits` and `budget` in the unit of the cost."""
    low, high = points.accuracy.min(), points.accuracy.max()
    margin = max(0.1 * (high - low), (5 - (high - low)) / 2)  # at least 5 points: less is mostly chance
    levels = low - margin, min(high + margin, 101)

    def across(cost: pd.Series | float) -> np.ndarray:
        return np.interp(cost, limits, (LEFT, LEFT + WIDTH)).round(1)

    def up(accuracy: pd.Series | float) -> np.ndarray:
        return np.interp(accuracy, levels, (TOP + HEIGHT, TOP)).round(1)

    for tick in _ticks(*limits):
        _line(picture, f"M{across(tick)},{TOP}v{HEIGHT}", stroke="#ddd")
        _element(picture, "text", f"{tick:g}", x=across(tick), y=TOP + HEIGHT + 18, text_anchor="middle")
    for tick in _ticks(*levels):
        _line(picture, f"M{LEFT},{up(tick)}h{WIDTH}", stroke="#ddd")
        _element(picture, "text", f"{tick:g}", x=LEFT - 6, y=up(tick) + 4, text_anchor="end")
    _line(picture, f"M{LEFT},{TOP}h{WIDTH}v{HEIGHT}h{-WIDTH}z", stroke="#888")
    _element(picture, "text", label, x=LEFT + WIDTH / 2, y=TOP + HEIGHT + 38, text_anchor="middle")
    _element(
        picture, "text", "test accuracy (%)", text_anchor="middle",
        transform=f"translate(14 {TOP + HEIGHT / 2}) rotate(-90)",
    )  # fmt: skip
    if budget:
        _line(picture, f"M{across(budget)},{TOP}v{HEIGHT}", stroke="#000", stroke_dasharray="6 4")
    fronts = points[points.on_front].sort_values("cost").groupby("data")
    for (_, best), dashes in zip(fronts, itertools.cycle(DASHES)):
        x, y = across(best.cost), up(best.accuracy)
        stairs = "".join(f"H{right}V{top}" for right, top in zip(x, y))
        path = f"M{x[0]},{TOP + HEIGHT}{stairs}H{LEFT + WIDTH}"
        _line(picture, path, stroke="#222", stroke_width=1.5, stroke_dasharray=dashes)
    points = points.assign(x=across(points.cost), y=up(points.accuracy))
    drawn = list(points.sort_values("on_front", kind="stable").itertuples())  # the front on top
    tips = collections.defaultdict(list)
    for point in drawn:
        tips[point.x, point.y].append(_tip(point, label))
    for point in drawn:
        group = _element(picture, "g", transform=f"translate({point.x} {point.y})")
        _element(
            group, "path", d=SHAPES[point.shape], fill="#fff", stroke=_colour(numbers[point.name]),
            stroke_width=3 if point.on_front else 1.5,
        )  # fmt: skip
        _element(group, "text", numbers[point.name], y=4, font_size=10, text_anchor="middle")
        _element(group, "title", "\n\n".join(tips[point.x, point.y]))  # of those that it hides, too


def _tip(point: tuple, label: str) -> str:
    budget = "–" if np.isnan(point.budget_bytes) else format_bytes(point.budget_bytes)
    name, unit = label[:-1].split(" (")
    return (
        f"{point.method} on {point.backbone}, {point.dataset}\n"
        f"checkpointing {point.checkpointing}, budget {budget}, seed {point.seed}\n"
        f"accuracy {point.accuracy:.2f} %, {name} {point.cost:,.1f} {unit}"
        + ("\non the Pareto front" if point.on_front else "")
    )


def _legend(
    picture: ElementTree.Element,
    numbers: dict[str, int],
    shapes: list[str],
    fronts: list[str],
    budget: str | None,
) -> None:
    left, rows = LEFT + WIDTH + 30, iter(range(TOP + 8, 100_000, ROW))
    _element(picture, "text", "number: method", x=left - 10, y=next(rows) + 4, font_weight="bold")
    for name, number in numbers.items():
        y = next(rows)
        _line(picture, f"M{left - 10},{y - 6}h20v13h-20z", stroke=_colour(number), stroke_width=2)
        _element(picture, "text", number, x=left, y=y + 4, font_size=10, text_anchor="middle")
        _element(picture, "text", _short(name), x=left + 18, y=y + 4)
    _element(picture, "text", "shape: checkpointing", x=left - 10, y=next(rows) + 4, font_weight="bold")
    for shape in shapes:
        y = next(rows)
        _line(picture, SHAPES[shape], stroke="#222", transform=f"translate({left} {y}) scale(0.75)")
        _element(picture, "text", shape, x=left + 18, y=y + 4)
    for name, dashes in zip(fronts, itertools.cycle(DASHES)):
        y = next(rows)
        path = f"M{left - 10},{y + 5}h10v-10h10"
        _line(picture, path, stroke="#222", stroke_width=1.5, stroke_dasharray=dashes)
        _element(picture, "text", _short(name), x=left + 18, y=y + 4)
    if budget:
        y = next(rows)
        _line(picture, f"M{left - 10},{y}h20", stroke="#000", stroke_dasharray="6 4")
        _element(picture, "text", budget, x=left + 18, y=y + 4)


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _ticks(low: float, high: float) -> list[float]:
    return [
        tick
        for tick in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        if low <= tick <= high
    ]


def _line(picture: ElementTree.Element, path: str, **attributes: object) -> None:
    _element(picture, "path", d=path, fill="none", **attributes)


def _element(
    parent: ElementTree.Element | None, tag: str, text: object = None, **attributes: object
) -> ElementTree.Element:
    """A new element below `parent`; `_` in the names of attributes is `-`."""
    element = ElementTree.Element(tag, {name.replace("_", "-"): str(v) for name, v in attributes.items()})
    if text is not None:
        element.text = str(text)
    if parent is not None:
        parent.append(element)
    return element
