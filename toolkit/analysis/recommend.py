"""Which method for this device: finished runs ranked by accuracy, and the choice inside two limits.

A recommendation is made of means over seeds with their intervals.  Where intervals overlap the runs cannot
tell the methods apart, so the one that takes less memory is taken, and the others are named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd

from toolkit.analysis.reading import read_runs
from toolkit.analysis.statistics import (
    PARAMETERS,
    adaptation,
    groups,
    mean_and_interval,
    refuse_mixed,
    without_simulated,
)
from toolkit.analysis.tables import Table, visible
from toolkit.budget import format_bytes
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.files import write_atomically
from toolkit.forecast.steps import step_of
from toolkit.methods.optimizer import optimizer_flops

SETTINGS = {  # how a variant says what a parameter is; others by their names
    "backbone": "on {}",
    "checkpointing": "checkpointing {}",
    "batch_size": "batch {}",
    "lora_rank": "rank {}",
    "galore_rank": "rank {}",
    "galore_gap": "gap {}",
}
NEEDED = ("dataset", "method", "accuracy_pct", "half_width", "n", "peak_bytes", "flops_per_step")
MOST_NAMED = 3  # methods in one part of a reason


def ranking(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each experiment with a finished run, seeds averaged; by data set, the most accurate first.

    `records`: as `load_records`.  Columns: `dataset`, `backbone`, `method`; `variant`, which tells a
    method's rows apart; `accuracy_pct` on the test split, `half_width` of its 95 % Student-t interval (NaN:
    one seed), `n` seeds; means of `peak_bytes`, `flops_per_step` (forward, backward, recomputed and
    optimizer, of which `optimizer_flops_per_step` with its share of the decompositions), `seconds` and
    `joules` of training; `missing`: why one of these is NaN; and the parameters.  Baselines and runs that
    did not end well are left out.  Raises `InputError` where runs were not measured alike.
    """
    ok = records[records.status == "ok"] if len(records) else records
    if len(ok):
        ok = adaptation(without_simulated(ok))
        ok = ok[ok.phase == "training"]
    if ok.empty:
        return pd.DataFrame(columns=[*NEEDED, "backbone", "variant", "missing"])
    refuse_mixed(ok, rivals=True)
    frame = pd.DataFrame([_row(group) for _, group in groups(ok)])
    frame["variant"] = ""
    for _, rows in frame.groupby(["dataset", "method"]):
        frame.loc[rows.index, "variant"] = _variants(rows)
    by = ["dataset", "accuracy_pct", "peak_bytes"]
    return frame.sort_values(by, ascending=[True, False, True], kind="stable", ignore_index=True)


def _row(group: pd.DataFrame) -> dict:
    first = group.iloc[0]
    row = {name: first[name] for name in PARAMETERS if name in group and pd.notna(first[name])}
    row["accuracy_pct"], row["half_width"], row["n"] = mean_and_interval(group.test_top1_pct)
    row["peak_bytes"] = mean_and_interval(group.peak_bytes)[0]
    row["seconds"] = mean_and_interval(group.adapt_seconds)[0]
    row["joules"] = mean_and_interval(group.adapt_joules)[0]
    row["flops_per_step"], row["optimizer_flops_per_step"], why = _flops(first, row)
    reasons = [why] if why else []
    if row["joules"] is None:
        reasons.append("energy was not measured")
    return row | {"missing": "; ".join(reasons)}


def _flops(first: pd.Series, parameters: dict) -> tuple[float | None, float | None, str]:
    """FLOPs of a whole step, of the optimizer alone, and why they are missing."""
    phases = [first.get(f"{phase}_flops_per_image") for phase in ("forward", "backward", "recompute")]
    if any(pd.isna(phase) for phase in phases):
        return None, None, "no training step was traced"
    types = {"int": int, "float": float, "bool": bool, "str": str}
    try:
        own = {f.name: types[f.type](parameters[f.name]) for f in fields(Experiment) if f.name in parameters}
        # What the optimizer does depends on the weights alone, wherever the run was.
        experiment = Experiment(**own | {"device": "cpu", "precision": "fp32"})
        optimizer = optimizer_flops(step_of(experiment, int(first.n_classes)).optimizer).per_step
    except (InputError, TypeError, ValueError, OverflowError) as error:
        return None, None, visible(f"the optimizer's FLOPs cannot be counted: {error}")
    return float(sum(phases)) * int(first.batch_size) + optimizer, optimizer, ""


def _variants(rows: pd.DataFrame) -> list[str]:
    """What differs among the rows of one method, as text."""
    varying = [name for name in PARAMETERS if name in rows and name != "dataset" and rows[name].nunique() > 1]
    return [
        ", ".join(_setting(name, value) for name, value in row.items())
        for row in rows[varying].to_dict("records")
    ]


def _setting(name: str, value: object) -> str:
    if name == "budget" and str(value).isdigit():
        return f"budget {format_bytes(int(value))}"
    return SETTINGS.get(name, f"{name.replace('_', ' ')} {{}}").format(value)


def ranking_table(frame: pd.DataFrame) -> Table:
    """`ranking` for people, with plain numbers beside it for programs."""
    text = pd.DataFrame(
        {
            "data": frame.dataset.map(visible),
            "backbone": frame.backbone.map(visible),
            "method": [title(row) for row in frame.to_dict("records")],
            "accuracy (%)": [_accuracy(row) for row in frame.to_dict("records")],
            "n": frame.n.astype(str),
            "peak memory (MiB)": _column(frame, "peak_bytes", 2**20, 2),
            "MFLOP a step": _column(frame, "flops_per_step", 1e6, 1),
            "of these optimizer": _column(frame, "optimizer_flops_per_step", 1e6, 1),
            "time (s)": _column(frame, "seconds", 1, 1),
            "energy (J)": _column(frame, "joules", 1, 0),
            "missing because": frame.missing,
        },
        dtype=str,
    )
    return Table("ranking", text, tuple(text.columns[3:-1]), values=frame)


def write_ranking(runs: Path, output: Path) -> Table:
    """The ranking of all runs below `runs`, written to `output` with the endings .csv, .md and .tex.

    Runs of different environments are ranked apart.  Raises `InputError` where there is nothing to rank.
    """
    frame = read_runs(runs).finished
    parts = [
        ranking(part).assign(environment=environment) for environment, part in frame.groupby("environment")
    ]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise InputError(
            f"no run below {runs} ended with a result: run `python -m toolkit sweep --preset edge` first."
        )
    table = ranking_table(pd.concat(parts, ignore_index=True))
    table.text.insert(0, "environment", table.values.environment)
    for ending, content in ((".csv", table.csv()), (".md", table.markdown()), (".tex", table.latex())):
        write_atomically(Path(output).with_suffix(ending), content.encode())
    return table


@dataclass(frozen=True)
class Recommendation:
    """The method for a device, and why."""

    method: str | None  # None: nothing fits
    variant: str  # of the method; empty where there is one
    why: str  # a sentence
    table: pd.DataFrame  # all methods, as text for people


def recommend(frame: pd.DataFrame, memory_bytes: float, flops_per_step: float) -> Recommendation:
    """The most accurate method that takes at most `memory_bytes` and `flops_per_step`.

    `frame`: as `ranking`, of one data set; at least the columns `NEEDED`, of which `half_width` may be
    missing.  Methods whose intervals overlap that of the most accurate one count as equally accurate, and
    the one with the lowest peak wins, then the one with fewer FLOPs.  A row without interval (one seed)
    equals nothing but its own mean.  What has no accuracy, peak or FLOPs cannot be recommended.  Raises
    `InputError` for a frame that lacks columns or rows or has several data sets, and for limits that are not
    positive.
    """
    frame = _checked(frame, {"memory_bytes": memory_bytes, "flops_per_step": flops_per_step})
    known = frame[["accuracy_pct", "peak_bytes", "flops_per_step"]].notna().all(axis=1)
    small, light = frame.peak_bytes <= memory_bytes, frame.flops_per_step <= flops_per_step
    fitting = frame[known & small & light]
    limits = f"{format_bytes(memory_bytes)} and {_mflop(flops_per_step)} a step"
    if fitting.empty:
        return Recommendation(None, "", _nothing(frame[known], limits), _table(frame, known, small, light))
    best = fitting.sort_values(["accuracy_pct", "peak_bytes"], ascending=[False, True]).iloc[0]
    level = _overlaps(frame, best)
    equal = fitting[level[fitting.index]].sort_values(["peak_bytes", "flops_per_step"], kind="stable")
    chosen, *others = equal.to_dict("records")
    better = frame[known & ~(small & light) & (frame.accuracy_pct > best.accuracy_pct) & ~level]
    why = [
        f"{title(chosen)}: {_accuracy(chosen)} % of the test images right, fits with "
        f"{format_bytes(chosen['peak_bytes'])} and {_mflop(chosen['flops_per_step'])} into {limits}"
    ]
    if others:
        why.append(
            _listed(others, "as accurate, but takes no less memory", "as accurate, but take no less memory")
        )
    if len(better):
        rows = better.sort_values("accuracy_pct", ascending=False).to_dict("records")
        why.append(_listed(rows, "more accurate, but does not fit", "more accurate, but do not fit"))
    if fitting.half_width.isna().any():
        why.append("some rows are of one seed, which says nothing about chance")
    table = _table(frame, known, small, light, list(equal.index))
    return Recommendation(chosen["method"], chosen["variant"], "; ".join(why) + ".", table)


def _checked(frame: pd.DataFrame, limits: dict[str, float]) -> pd.DataFrame:
    absent = [name for name in NEEDED if name not in frame and name != "dataset"]
    if absent or frame.empty:
        what = f"lacks the columns {', '.join(absent)}" if absent else "has no row"
        raise InputError(
            f"the frame to choose from {what}; make it with toolkit.analysis.recommend.ranking(records)."
        )
    if "dataset" in frame and frame.dataset.nunique() > 1:
        names = ", ".join(map(str, frame.dataset.unique()))
        raise InputError(f"the frame holds several data sets ({names}); select the rows of one.")
    for name, value in limits.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, got {value!r}.")
    numbers = frame[list(NEEDED[2:])].apply(pd.to_numeric, errors="coerce").astype(float)
    given = frame.variant.fillna("") if "variant" in frame else ""
    return frame.assign(**numbers, variant=given).reset_index(drop=True)


def _overlaps(frame: pd.DataFrame, best: pd.Series) -> pd.Series:
    """Whose interval shares a point with that of `best`; without a half width an interval is its mean."""
    widths = frame.half_width.fillna(0.0) + (0.0 if pd.isna(best.half_width) else best.half_width)
    return (frame.accuracy_pct - best.accuracy_pct).abs() <= widths


def _nothing(known: pd.DataFrame, limits: str) -> str:
    if known.empty:
        return f"nothing fits into {limits}: no row has accuracy, peak memory and FLOPs."
    small, light = known.loc[known.peak_bytes.idxmin()], known.loc[known.flops_per_step.idxmin()]
    return (
        f"nothing fits into {limits}: the least memory is {format_bytes(small.peak_bytes)} "
        f"({title(small)}, with {_mflop(small.flops_per_step)}), the fewest FLOPs are "
        f"{_mflop(light.flops_per_step)} ({title(light)}, with {format_bytes(light.peak_bytes)})."
    )


def _listed(rows: Sequence[dict], one: str, several: str) -> str:
    named = [
        f"{title(row)} ({_accuracy(row)} %, {format_bytes(row['peak_bytes'])}, "
        f"{_mflop(row['flops_per_step'])})"
        for row in rows[:MOST_NAMED]
    ]
    rest = [f"{len(rows) - MOST_NAMED} more"] if len(rows) > MOST_NAMED else []
    verb = "is" if len(rows) == 1 else "are"
    return f"{', '.join(named + rest)} {verb} {one if len(rows) == 1 else several}"


def _table(
    frame: pd.DataFrame, known: pd.Series, small: pd.Series, light: pd.Series, equal: Sequence[int] = ()
) -> pd.DataFrame:
    """Every method with what stands in its way."""
    reasons = []
    for place in frame.index:
        limits = [name for name, fits in (("memory", small), ("FLOPs", light)) if not fits[place]]
        if not known[place]:
            reasons.append("not measured")
        elif limits:
            reasons.append(f"no: {' and '.join(limits)}")
        else:
            reasons.append("yes, as accurate as the best" if place in equal else "yes, less accurate")
    rows = frame.to_dict("records")
    table = pd.DataFrame(
        {
            "method": [title(row) for row in rows],
            "accuracy (%)": [_accuracy(row) for row in rows],
            "n": [f"{row['n']:.0f}" for row in rows],
            "peak memory (MiB)": _column(frame, "peak_bytes", 2**20, 2),
            "MFLOP a step": _column(frame, "flops_per_step", 1e6, 1),
            "fits": reasons,
        }
    )
    return table.loc[frame.sort_values("accuracy_pct", ascending=False, kind="stable").index]


def title(row: dict | pd.Series) -> str:
    """Method and variant of a row."""
    return visible(f"{row['method']} ({row['variant']})" if row["variant"] else str(row["method"]))


def _accuracy(row: dict) -> str:
    if pd.isna(row["accuracy_pct"]):
        return "–"
    half = "" if pd.isna(row["half_width"]) else f" ± {row['half_width']:.1f}"
    return f"{row['accuracy_pct']:.1f}{half}"


def _mflop(count: float) -> str:
    return f"{count / 1e9:,.2f} GFLOP" if count >= 1e9 else f"{count / 1e6:,.1f} MFLOP"


def _column(frame: pd.DataFrame, name: str, unit: float, digits: int) -> pd.Series:
    values = frame[name] / unit
    return values.map(lambda value: "–" if pd.isna(value) else f"{value:,.{digits}f}")
