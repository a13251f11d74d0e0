"""Paired tests: what methods and strategies change.

Every difference is paired by seed (`statistics.paired_differences`); costs are compared as logarithms, so
that their differences are ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.stats

from toolkit.analysis.statistics import (
    DATA,
    PARAMETERS,
    SHOWN,
    adaptation,
    paired_differences,
    without_simulated,
)
from toolkit.errors import InputError

QUANTITIES = {  # column of `statistics.adaptation`; accuracy is compared in points, costs in per cent
    "accuracy": "test_top1_pct",
    "peak memory": "peak_bytes",
    "time": "adapt_seconds",
    "energy": "adapt_joules",
}
FIGURES = ["mean", "half_width", "n", "p"]
ROUNDING = 1e-9  # half width of an interval that is nothing but rounding of equal numbers


def differences(frame: pd.DataFrame, quantity: str, against: Mapping[str, object]) -> pd.DataFrame:
    """`paired_differences` of one of `QUANTITIES` from the groups `against` names, these left out.

    `frame`: runs of one environment.  Columns: `SHOWN`, the budget, what else varies; `mean` and
    `half_width` (95 %; of accuracy in points, of costs as natural logarithms of ratios: see `change`), `n`
    pairs and `p` (two-sided t-test), which is missing below two pairs, and where all pairs agree, which
    leaves no spread to test against.  Empty if there is nothing to pair.
    """
    column = QUANTITIES[quantity]
    frame = adaptation(without_simulated(frame[(frame.status == "ok") & (frame.phase == "training")]))
    frame[column] = pd.to_numeric(frame[column])
    if quantity != "accuracy":
        frame[column] = np.log(frame[column].where(frame[column] > 0))
    keys = [*SHOWN, "budget", *(n for n in (*PARAMETERS, *DATA) if n in frame and frame[n].nunique() > 1)]
    keys = list(dict.fromkeys(keys))
    frame = frame[[*keys, "seed", "status", "phase", column]]  # many small tables: width is what they cost
    try:
        table = paired_differences(frame, column, against, mix=True).drop(columns="tied")
    except InputError:  # no run is the reference, or none has the quantity
        return pd.DataFrame(columns=[*keys, *FIGURES])
    for name in set(keys) - set(table):
        table[name] = frame.loc[frame[column].notna(), name].iloc[0]
    table = table[(table[list(against)] != pd.Series(against)).any(axis=1) & (table.n > 0)]
    table["p"] = [_p(row) for row in table.itertuples()]
    return table[[*keys, *FIGURES]]


def _p(row: tuple) -> float:
    if row.n < 2 or row.half_width <= ROUNDING:
        return math.nan
    t = row.mean / row.half_width * scipy.stats.t.ppf(0.975, row.n - 1)
    return float(2 * scipy.stats.t.sf(abs(t), row.n - 1))


def change(quantity: str, value: float) -> float:
    """A mean or an end of an interval of `differences`, in points (accuracy) or per cent (costs)."""
    return value if quantity == "accuracy" else 100 * math.expm1(value)


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjustment for testing all of `p` at once: below 0.05, at most one in 20 such sets errs.

    Missing values stay missing and do not count.
    """
    known = p.dropna().sort_values()
    adjusted = (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0)
    return adjusted.reindex(p.index)


def interval(quantity: str, mean: float, half_width: float | None, unit: str = "") -> str:
    """A difference and its interval as text: `−2.1 [−3.0, −1.2]`, or `−2.1 [=]` if all pairs agree."""
    middle = _signed(quantity, mean) + unit
    if half_width is None or math.isnan(half_width):
        return middle
    if half_width <= ROUNDING:
        return f"{middle} [=]"
    return f"{middle} [{_signed(quantity, mean - half_width)}, {_signed(quantity, mean + half_width)}]"


def _signed(quantity: str, value: float) -> str:
    digits = 2 if quantity == "accuracy" else 1
    rounded = round(change(quantity, value), digits) + 0.0  # no −0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
