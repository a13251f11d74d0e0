"""Means, intervals and differences over seeds; what must not be averaged is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import pandas as pd
import scipy.stats

from toolkit.budget import STRATEGIES
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.methods import METHODS
from toolkit.scores import hypervolume, pareto_rank

PARAMETERS = [field.name for field in dataclasses.fields(Experiment) if field.name != "seed"]
# Runs of one experiment that differ here were not measured alike.
ALIKE = ["env_hash", "memory_source", "budget_mode", "energy_source", "alloc_conf"]
DATA = ["train_sha256", "test_sha256"]
SHOWN = ["dataset", "backbone", "method", "checkpointing"]


def mean_and_interval(values: pd.Series) -> tuple[float | None, float | None, int]:
    """Mean, half width of the 95 % Student-t interval, and n of the values that exist.

    Missing values are left out, never taken as 0; below two values there is no interval.
    """
    values = values.dropna().astype(float)
    n = len(values)
    if n == 0:
        return None, None, 0
    if n == 1:
        return float(values.iloc[0]), None, 1
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, n - 1) * values.sem()), n


def refuse_mixed(frame: pd.DataFrame) -> None:
    """Raise `InputError` if runs of one experiment (seeds apart) were not measured alike (`ALIKE`).

    A run that measured nothing of a kind (None) does not clash with one that did.
    """
    by = [name for name in (*PARAMETERS, *DATA) if name in frame]
    for _, group in frame[frame.status == "ok"].groupby(by, dropna=False, sort=False):
        for name in ALIKE:
            found = group[name].dropna().unique() if name in group else []
            if name == "alloc_conf" and name in group:
                found = group[name].fillna("default").unique()
            if len(found) > 1:
                raise InputError(
                    f"runs of {group.method.iloc[0]} / {group.checkpointing.iloc[0]} differ in {name}: "
                    f"{', '.join(map(str, found))}{_what_differs(group) if name == 'env_hash' else ''}. "
                    "Their mean would be of two different measurements: select one of them, "
                    "use another folder, or pass mix=True."
                )


def _what_differs(group: pd.DataFrame) -> str:
    names = [name for name in group if name == "device_name" or name.startswith(("version_", "driver"))]
    differing = [name for name in [*names, "threads"] if name in group and group[name].nunique() > 1]
    return f" ({', '.join(differing)})" if differing else ""


def compare(frame: pd.DataFrame, *, mix: bool = False) -> pd.DataFrame:
    """One row per group of runs that differ only in seed: mean, interval and n, as text for people.

    Columns name the parameters in `SHOWN` and any other, or data hash, that varies in `frame`.  Runs
    that did not end `ok` count under `not ok` and in no mean.  Raises `InputError` where runs were not
    measured alike (`refuse_mixed`) unless `mix`.
    """
    rows = []
    for row, group in _groups(frame, mix):
        ok = group[group.status == "ok"]
        row["test top-1 %"] = _text(ok.get("test_top1_pct"), 1, 2)
        row["peak MiB"] = _text(ok.get("train_peak_bytes"), 2**20, 2)
        row["in budget"] = "" if ok.empty else "yes" if ok.within_budget.astype(bool).all() else "no"
        row["train s"] = _text(ok.get("train_seconds"), 1, 1)
        row["train J"] = _energy(ok)
        row["trainable"] = "" if ok.empty else f"{int(ok.params_trainable.iloc[0]):,}"
        row["n"] = len(ok)
        row["not ok"] = ", ".join(group.status[group.status != "ok"])
        rows.append(row)
    return pd.DataFrame(rows)


SCORES = {"NS": "ns", "NS-E": "ns_e_training", "NS-M": "ns_m_training", "NS#": "ns_sharp_training"}
COSTS = ["train_peak_bytes", "train_energy_joules", "train_seconds"]


def standing(frame: pd.DataFrame, *, mix: bool = False) -> pd.DataFrame:
    """Scores of the groups of `compare`: NetScores with training's costs, and what no unit can move.

    NetScores are means over seeds of each run's score, with intervals.  `Pareto rank` and `dominated %`
    (the group's hypervolume in the box up to 1.1 times the worst costs of the table) are of mean
    accuracy, peak memory, energy and time; a cost that no run has is left out.  A group without a
    finished run, or without a cost that others have, has neither.  Raises as `compare`.
    """
    rows, points = [], []
    for row, group in _groups(frame, mix):
        ok = group[(group.status == "ok") & (group.get("energy_source") != "fake")]
        rows.append(row | {kind: _text(ok.get(column), 1, 2) for kind, column in SCORES.items()})
        means = {name: mean_and_interval(ok[name])[0] for name in ("test_top1_pct", *COSTS) if name in ok}
        points.append(pd.Series(means, dtype=float))
    table, points = pd.DataFrame(rows), pd.DataFrame(points).dropna(axis="columns", how="all")
    whole = points.dropna()
    table["Pareto rank"], table["dominated %"] = pd.NA, pd.NA
    if len(whole) and len(whole.columns) > 1:
        accuracy, costs = whole.test_top1_pct, whole.drop(columns="test_top1_pct")
        worst = 1.1 * costs.max()
        table.loc[whole.index, "Pareto rank"] = pareto_rank(accuracy, costs)
        table.loc[whole.index, "dominated %"] = [
            round(100 * hypervolume(accuracy[[i]], costs.loc[[i]], worst), 1) for i in whole.index
        ]
    return table


def _groups(frame: pd.DataFrame, mix: bool) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Groups of runs that differ only in seed, with what they share; methods and strategies in order."""
    if not mix:
        refuse_mixed(frame)
    vary = [name for name in (*PARAMETERS, *DATA) if name in frame and frame[name].nunique() > 1]
    by = [*SHOWN, *(name for name in vary if name not in SHOWN)]
    order = {name: position for position, name in enumerate((*METHODS, *STRATEGIES))}
    frame = frame.sort_values(
        by, kind="stable", key=lambda column: column.map(lambda value: order.get(value, value))
    )
    for key, group in frame.groupby(by, sort=False, dropna=False):
        yield dict(zip(by, key)), group


def _energy(ok: pd.DataFrame) -> str:
    """Joules; those of a simulated GPU are no measurement and are not printed as one."""
    if "energy_source" in ok and (ok.energy_source == "fake").any():
        return "simulated"
    return _text(ok.get("train_energy_joules"), 1, 0)


def _text(values: pd.Series | None, unit: float, digits: int) -> str:
    mean, half_width, n = (None, None, 0) if values is None else mean_and_interval(values / unit)
    if n == 0:
        return "–"
    return f"{mean:.{digits}f}" if half_width is None else f"{mean:.{digits}f} ± {half_width:.{digits}f}"


def paired_differences(
    frame: pd.DataFrame, value: str, against: Mapping[str, object], *, mix: bool = False
) -> pd.DataFrame:
    """Difference in `value` of every group from the group `against` names, paired by seed.

    `against`: column -> value, such as `{"method": "full", "checkpointing": "none"}`; the partner of a
    run has these values, its own seed, and its own everything else.  Columns: `SHOWN`, what else
    varies, `mean`, `half_width` (95 % Student-t), `n` pairs, `tied`: the interval contains 0 (None
    below two pairs).  Raises `InputError` for an unknown column, where there is no such group, a seed
    occurs twice, or runs were not measured alike (unless `mix`).
    """
    for name in (value, *against):
        if name not in frame:
            raise InputError(f"the records have no column {name!r}.")
    if not mix:
        refuse_mixed(frame)
    ok = frame[(frame.status == "ok") & frame[value].notna()]
    by = list(dict.fromkeys([*SHOWN, *(n for n in PARAMETERS if n in ok and ok[n].nunique() > 1)]))
    if ok.duplicated([*by, "seed"]).any():
        raise InputError("a seed occurs twice in a group; select one run of each.")
    key = [name for name in by if name not in against] + ["seed"]
    partner = ok[(ok[list(against)] == pd.Series(against)).all(axis=1)].set_index(key)[value]
    if partner.empty:
        raise InputError(f"no finished run has {dict(against)}.")
    pairs = ok.join(partner.rename("_partner"), on=key)
    pairs["_difference"] = pairs[value].astype(float) - pairs["_partner"].astype(float)
    rows = []
    for group_key, group in pairs.groupby(by, sort=False):
        mean, half_width, n = mean_and_interval(group["_difference"])
        tied = None if half_width is None else abs(mean) <= half_width
        rows.append(dict(zip(by, group_key)) | dict(mean=mean, half_width=half_width, n=n, tied=tied))
    return pd.DataFrame(rows)
