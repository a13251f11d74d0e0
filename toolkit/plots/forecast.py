"""The picture of `forecast.what_fits`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from toolkit.plots.text import plain

_TITLES = {
    "none": "as it is: whole batch, nothing checkpointed",
    "planned": "as planned: recomputed and in micro-batches",
}


def plot_what_fits(frame: pd.DataFrame) -> Figure:
    """Backbones by methods: the smallest budget (GB), coloured by the smallest card that holds it.

    `frame`: as of `what_fits`.  A step that cannot be built is grey with a dash.
    """
    cards = [*frame.card.cat.categories, f"more than {frame.card.cat.categories[-1]}"]
    # Lighter is smaller, also in black and white; the numbers say the same.
    colours = ListedColormap(sns.color_palette("cividis_r", len(cards)))
    strategies = list(dict.fromkeys(frame.strategy))
    backbones, methods = (list(dict.fromkeys(frame[name])) for name in ("backbone", "method"))
    figure, all_axes = plt.subplots(
        1, len(strategies), figsize=(1 + 0.75 * len(methods) * len(strategies), 1.6 + 0.55 * len(backbones)),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, strategy in zip(all_axes.flat, strategies):
        rows = frame[frame.strategy == strategy]
        number = rows.smallest_bytes.astype(float) / 1e9
        place = rows.card.cat.codes.replace(-1, len(cards) - 1).where(number.notna(), np.nan)
        tables = [
            rows.assign(value=values).pivot(index="backbone", columns="method", values="value")
            .reindex(index=backbones, columns=methods)
            for values in (place, number.map(_text))
        ]  # fmt: skip
        axes.set_facecolor("0.85")
        sns.heatmap(
            tables[0].astype(float), annot=tables[1], fmt="", mask=tables[0].isna(), cmap=colours,
            norm=BoundaryNorm(np.arange(len(cards) + 1) - 0.5, len(cards)), cbar=False, linewidths=1,
            yticklabels=[plain(name) for name in backbones], annot_kws={"fontsize": 9}, ax=axes,
        )  # fmt: skip
        for row, column in np.argwhere(tables[0].isna().to_numpy()):
            axes.text(column + 0.5, row + 0.5, "–", ha="center", va="center", color="0.3")
        axes.set(title=_TITLES[strategy], xlabel="", ylabel="")
        axes.tick_params(axis="both", labelrotation=0, length=0)
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=45, ha="right")
    keys = [Patch(facecolor=colours(place), edgecolor="0.5", label=card) for place, card in enumerate(cards)]
    figure.legend(
        handles=keys, title="smallest budget (GB), coloured by the smallest card that holds it",
        loc="outside lower center", ncols=len(keys), frameon=False,
    )  # fmt: skip
    return figure


def _text(gigabytes: float) -> str:
    return "" if np.isnan(gigabytes) else f"{gigabytes:#.2g}" if gigabytes < 1 else f"{gigabytes:.1f}"
