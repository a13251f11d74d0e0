"""Which method for this device: finished runs ranked by score, and the choice inside two limits.

A recommendation is made of means over seeds with their intervals.  Where intervals overlap the runs cannot
tell the methods apart, so the one that takes less memory is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from toolkit.analysis.results import read
from toolkit.analysis.statistics import groups, means, parameters, with_environments
from toolkit.analysis.tables import write_table
from toolkit.budget import format_bytes
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast.step import step_of
from toolkit.measure.quantities import QUANTITIES, Quantity, register
from toolkit.methods.optimizer import optimizer_flops

register(Quantity("flops_per_step", "FLOPs of a step", "M", 1, "less", "no training step was traced"))
register(Quantity("optimizer_flops_per_step", "FLOPs of the optimizer", "M", 1, "less"))
NEEDED = ["score_pct", "peak_bytes", "flops_per_step"]


def ranking(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each fine-tuning experiment with a finished run; within a data set the best score first.

    Columns: those of `means`; `variant`, which tells the rows of one method apart; `flops_per_step` (forward,
    backward, recomputed and optimizer) and `optimizer_flops_per_step`, of a step of the whole batch.
    """
    records = with_environments(records)
    ok = records[(records.status == "ok") & (records.phase == "training")] if len(records) else records
    table = means(ok)
    if table.empty:
        return table
    flops = [_flops(group.iloc[0]) for _, group in groups(ok)]
    table["flops_per_step"], table["optimizer_flops_per_step"] = zip(*flops)
    table["variant"] = ""
    keys = [name for name in table if name in parameters() and name not in ("dataset", "method")]
    for _, rows in table.groupby(["dataset", "environment", "method"]):
        varying = [name for name in keys if rows[name].nunique() > 1]
        for row in rows.index:
            settings = {name: rows[name][row] for name in varying if pd.notna(rows[name][row])}
            table.loc[row, "variant"] = ", ".join(_setting(*pair) for pair in settings.items())
    by = ["environment", "dataset", "score_pct", "peak_bytes"]
    return table.sort_values(by, ascending=[True, True, False, True], kind="stable", ignore_index=True)


def _flops(run: pd.Series) -> tuple[float, float]:
    """FLOPs of a whole step of `run`, and of its optimizer alone; NaN where no step was traced."""
    phases = [run[f"{phase}_flops_per_image"] for phase in ("forward", "backward", "recompute")]
    if pd.isna([*phases, run.get("n_classes"), run.get("batch_size")]).any():
        return float("nan"), float("nan")
    types = {"int": int, "float": float, "bool": bool, "str": str, "Size": int}
    kinds = {name: types[kind] for name, kind in Experiment.flat_types().items()}
    own = {name: kind(run[name]) for name, kind in kinds.items() if pd.notna(run.get(name))}
    # What the optimizer does depends on the weights alone, wherever the run was.
    experiment = Experiment.flat(**own | {"device": "cpu", "precision": "fp32"})
    optimizer = optimizer_flops(step_of(experiment, int(run.n_classes)).optimizer).per_step
    return float(sum(phases)) * int(run.batch_size) + optimizer, float(optimizer)


def _setting(name: str, value: object) -> str:
    if name == "budget_bytes":
        return f"budget {format_bytes(value)}"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    value = f"{value:g}" if isinstance(value, float) else value
    return f"on {value}" if name == "backbone" else f"{name.replace('_', ' ')} {value}"


def ranking_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of `ranking`, or of a recommendation's table, that people compare."""
    shown = ["environment", "dataset", "backbone", "method", "variant", "n"]
    for name in ("score_pct", "peak_bytes", "adapt_seconds", "adapt_joules"):
        shown += [name, f"{name}_half_width", f"{name}_n"]
    shown += ["flops_per_step", "optimizer_flops_per_step", "fits"]
    return frame[[name for name in shown if name in frame]]


def write_ranking(runs: Path, output: Path) -> pd.DataFrame:
    """Write the ranking of all runs below `runs` to `output` with the endings .csv, .md and .tex.

    Raises `InputError` where there is nothing to rank.
    """
    table = ranking(read(runs)[0])
    if table.empty:
        raise InputError(
            f"no run below {runs} ended with a result: run `python -m toolkit sweep --preset edge` first."
        )
    write_table(table, Path(output).with_suffix(""), ranking_table(table), label="tab:ranking")
    return table


@dataclass(frozen=True)
class Recommendation:
    """The method for a device, and why."""

    method: str | None  # None: nothing fits
    variant: str  # of the method; empty if there is only one
    why: str  # a sentence
    table: pd.DataFrame  # all methods; `fits` says which are as good, and why others are not chosen


def recommend(frame: pd.DataFrame, memory_bytes: float, flops_per_step: float) -> Recommendation:
    """The method with the best score that takes at most `memory_bytes` and `flops_per_step`.

    `frame`: rows of `ranking` on one data set.  Methods whose intervals overlap that of the best one count as
    equally good, and the one with the lowest peak wins, then the one with fewer FLOPs.  A row without an
    interval (one seed) equals only its own mean.  A row without score, peak or FLOPs cannot be recommended.
    Raises `InputError` for a frame without rows or of several data sets, and for limits not above 0.
    """
    if frame.empty or frame.dataset.nunique() > 1:
        raise InputError("choose among the rows of `ranking(records)` on one data set.")
    for name, value in {"memory_bytes": memory_bytes, "flops_per_step": flops_per_step}.items():
        if not value > 0:
            raise InputError(f"{name} must be a positive number, got {value!r}.")
    frame = frame.sort_values(["score_pct", "peak_bytes"], ascending=[False, True], ignore_index=True)
    known = frame[NEEDED].notna().all(axis=1)
    small, light = frame.peak_bytes <= memory_bytes, frame.flops_per_step <= flops_per_step
    fitting = frame[known & small & light]
    mflop = QUANTITIES["flops_per_step"].text(flops_per_step)
    limits = f"{format_bytes(memory_bytes)} and {mflop} MFLOP a step"
    half_widths = frame.score_pct_half_width.astype(float).fillna(0)
    equal = fitting
    if len(fitting):
        best = fitting.index[0]
        level = frame.score_pct[best] - fitting.score_pct <= half_widths[fitting.index] + half_widths[best]
        equal = fitting[level].sort_values(["peak_bytes", "flops_per_step"], kind="stable")
    cases = {
        "not measured": ~known,
        "no: memory and FLOPs": ~small & ~light,
        "no: memory": ~small,
        "no: FLOPs": ~light,
        "yes, as good as the best": frame.index.isin(equal.index),
    }
    table = frame.assign(fits=np.select(list(cases.values()), list(cases), "yes, worse"))
    if equal.empty:
        return Recommendation(None, "", f"nothing fits into {limits}.", table)
    chosen = equal.iloc[0]
    which = "the best" if len(equal) == 1 else f"the smallest of {len(equal)} as good as the best"
    why = f"{title(chosen)} is {which} within {limits}"
    if fitting.score_pct_half_width.isna().any():
        why += "; some rows are of one seed, which says nothing about chance"
    return Recommendation(chosen.method, chosen.variant, f"{why}.", table)


def title(row: pd.Series) -> str:
    """Method and variant of a row."""
    return f"{row.method} ({row.variant})" if row.variant else str(row.method)
