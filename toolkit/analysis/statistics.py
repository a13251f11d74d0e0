"""Means, intervals and differences over seeds; what must not be averaged is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import pandas as pd
import scipy.stats

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.registry import PROTOCOLS
from toolkit.budget import STRATEGIES
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment
from toolkit.measure.scores import hypervolume, pareto_rank
from toolkit.methods import METHODS, options_not_of
from toolkit.training.record import SIMULATED

_FIELDS = [*dataclasses.fields(Experiment), *dataclasses.fields(BaselineExperiment)]
# `baseline` and `protocol` stand under `backbone` and `method` in every record.
PARAMETERS = list(dict.fromkeys(f.name for f in _FIELDS if f.name not in ("seed", "baseline", "protocol")))
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


def refuse_mixed(frame: pd.DataFrame, *, rivals: bool = False) -> None:
    """Raise `InputError` if runs that would be averaged were not measured alike (`ALIKE`).

    Those are runs that differ in nothing but the seed; with `rivals` also all runs on the same data, which
    may differ in their budget mode.  A run that could not measure (null, or energy source "none") does
    not clash with one that did.
    """
    if rivals:
        refuse_mixed(frame)
    by = [name for name in (("dataset", *DATA) if rivals else (*PARAMETERS, *DATA)) if name in frame]
    alike = [name for name in ALIKE if name in frame and not (rivals and name == "budget_mode")]
    for _, group in frame[frame.status == "ok"].groupby(by, dropna=False, sort=False):
        for name in alike:
            values = group[name].fillna("default") if name == "alloc_conf" else group[name].dropna()
            found = [value for value in values.unique() if value != "none"]
            if len(found) > 1:
                what = ", ".join(f"{n} {group[n].iloc[0]}" for n in by if n in SHOWN)
                raise InputError(
                    f"runs of {what} differ in {name}: {', '.join(map(str, found))}"
                    f"{_what_differs(group) if name == 'env_hash' else ''}. They are different measurements: "
                    "select one of them, use another folder, or in Python pass mix=True."
                )


def _what_differs(group: pd.DataFrame) -> str:
    names = [name for name in group if name.startswith(("version_", "device_", "cpu_", "driver", "code_"))]
    differing = [name for name in [*names, "threads"] if name in group and group[name].nunique() > 1]
    return f" ({', '.join(differing)})" if differing else ""


def compare(frame: pd.DataFrame, *, mix: bool = False) -> pd.DataFrame:
    """One row per group of runs that differ only in seed: mean, interval and n, as text for people.

    Columns name the parameters in `SHOWN` and any other, or data hash, that varies among runs of one
    phase.  Peak, seconds and joules are of training, and of a baseline of all that takes the place of it
    (see `adaptation`).  Runs that did not end `ok` count under `not ok` and in no mean.  Raises
    `InputError` where runs were not measured alike (`refuse_mixed`) unless `mix`.
    """
    if not mix:
        refuse_mixed(frame)
    rows = []
    for row, group in groups(frame):
        ok = adaptation(without_simulated(group[group.status == "ok"]))
        row["test top-1 %"] = _text(ok.get("test_top1_pct"), 1, 2)
        for title, column in {"test mIoU %": "test_miou_pct", "test mAP %": "test_map_pct"}.items():
            if column in frame and frame[column].notna().any():
                row[title] = _text(ok[column], 1, 2)
        row["peak MiB"] = _text(ok.get("peak_bytes"), 2**20, 2)
        row["in budget"] = "" if ok.empty else "yes" if ok.within_budget.astype(bool).all() else "no"
        row["adapt s"] = _text(ok.get("adapt_seconds"), 1, 1)
        row["adapt J"] = _energy(ok)
        row["trainable"] = "" if ok.empty else f"{int(ok.params_trainable.iloc[0]):,}"
        row["n"] = len(ok)
        row["not ok"] = ", ".join(group.status[group.status != "ok"])
        rows.append(row)
    return pd.DataFrame(rows)


def adaptation(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with `peak_bytes`, `adapt_seconds`, `adapt_joules`: what it took to get the classifier.

    Of a fine-tuned model these are training's, with the time and energy of computing cached features; of a
    baseline those before the first test image (text classifier, features and probe, choice of a scoring rule)
    and the highest moment of all.
    """

    def column(name: str) -> pd.Series:
        return frame[name] if name in frame else pd.Series(index=frame.index, dtype=float)

    features_seconds = column("features_seconds").fillna(0)
    features_joules = column("features_energy_joules").where(features_seconds > 0, 0)
    highest = pd.concat([column("prepare_peak_bytes"), column("test_peak_bytes")], axis=1).max(axis=1)
    prepared = _phase(frame) == "inference"
    return frame.assign(
        phase=_phase(frame),
        peak_bytes=column("train_peak_bytes").where(~prepared, highest),
        adapt_seconds=(column("train_seconds") + features_seconds).where(
            ~prepared, column("prepare_seconds")
        ),
        adapt_joules=(column("train_energy_joules") + features_joules).where(
            ~prepared, column("prepare_joules")
        ),
    )


def _phase(frame: pd.DataFrame) -> pd.Series:
    """Phase of each run; a frame without is of fine-tuned models."""
    if "phase" not in frame:
        return pd.Series("training", index=frame.index)
    return frame.phase.fillna("training")


# By phase: scores, and the costs that ranks are of.
SCORES = {
    phase: {
        "NS": "ns", "NS-E": f"ns_e_{phase}", "NS-M": f"ns_m_{phase}", "NS#": f"ns_sharp_{phase}"
    }
    for phase in ("training", "inference")
}  # fmt: skip
COSTS = {
    "training": ["train_peak_bytes", "train_energy_joules", "train_seconds"],
    "inference": ["test_peak_bytes", "test_energy_joules", "test_seconds"],
}


def standing(frame: pd.DataFrame, phase: str = "training", *, mix: bool = False) -> pd.DataFrame:
    """Scores of the groups of `compare`: NetScores with a phase's costs, and what no unit can move.

    `phase`: "training", or "inference", which baselines have too.  NetScores are means over seeds of each
    run's score, with intervals.  `Pareto rank` and `dominated %` (the group's hypervolume in the box up to
    1.1 times the worst costs) are of mean accuracy, peak memory, energy and time, among the groups of one
    data set; a cost that no run has is left out.  A group
    without a finished run, or without a cost that others have, has neither.  Raises as `compare`, and
    where groups that would be ranked together were not measured alike.
    """
    if not mix:
        refuse_mixed(frame, rivals=True)
    wanted = ("test_top1_pct", *COSTS[check_name("phase", phase, COSTS)])
    rows, points = [], []
    for row, group in groups(frame):
        ok = without_simulated(group[group.status == "ok"])
        rows.append(row | {kind: _text(ok.get(column), 1, 2) for kind, column in SCORES[phase].items()})
        means = {name: mean_and_interval(ok[name])[0] for name in wanted if name in ok}
        points.append(pd.Series(means, dtype=float))
    table, points = pd.DataFrame(rows), pd.DataFrame(points)
    table["Pareto rank"], table["dominated %"] = pd.NA, pd.NA
    for _, rivals in points.groupby([table[name] for name in ("dataset", *DATA) if name in table]):
        whole = rivals.dropna(axis="columns", how="all").dropna()
        if whole.empty or "test_top1_pct" not in whole or len(whole.columns) == 1:
            continue
        accuracy, costs = whole.test_top1_pct, whole.drop(columns="test_top1_pct")
        worst = 1.1 * costs.max()
        table.loc[whole.index, "Pareto rank"] = pareto_rank(accuracy, costs)
        table.loc[whole.index, "dominated %"] = [
            round(100 * hypervolume(accuracy[[i]], costs.loc[[i]], worst), 1) for i in whole.index
        ]
    return table


def groups(frame: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Groups of runs that differ only in seed, with what they share; methods and strategies in order."""
    phases = _phase(frame)
    vary = [
        name for name in PARAMETERS if name in frame and (frame[name].groupby(phases).nunique() > 1).any()
    ]
    vary += [name for name in DATA if name in frame and frame[name].nunique() > 1]
    by = [*SHOWN, *(name for name in vary if name not in SHOWN)]
    protocols = [protocol for family in PROTOCOLS.values() for protocol in family]
    order = {name: position for position, name in enumerate((*METHODS, *protocols, *STRATEGIES))}
    frame = frame.sort_values(
        by, kind="stable", key=lambda column: column.map(lambda value: order.get(value, value))
    )
    for key, group in frame.groupby(by, sort=False, dropna=False):
        yield dict(zip(by, key)), group


def _energy(ok: pd.DataFrame) -> str:
    simulated = "energy_source" in ok and (ok.energy_source == "fake").any()
    return "simulated" if simulated else _text(ok.get("adapt_joules"), 1, 0)


def without_simulated(frame: pd.DataFrame) -> pd.DataFrame:
    """Nulls for what a simulated GPU said: it is no measurement."""
    if "energy_source" not in frame or not (frame.energy_source == "fake").any():
        return frame
    frame = frame.copy()
    columns = [name for name in SIMULATED if name in frame]
    frame[columns] = frame[columns].astype(object).where(frame.energy_source != "fake", None)
    return frame


def _text(values: pd.Series | None, unit: float, digits: int) -> str:
    mean, half_width, n = (None, None, 0) if values is None else mean_and_interval(values / unit)
    if n == 0:
        return "–"
    return f"{mean:.{digits}f}" if half_width is None else f"{mean:.{digits}f} ± {half_width:.{digits}f}"


def _not_shared(first: str, second: str) -> set[str]:
    """Parameters that cannot be alike in runs of these two methods, or need not be."""
    if not {first, second} <= set(METHODS):
        return set()
    alike = set() if first == second else {"batch_norm"}  # "auto" is not the same in all
    return options_not_of(first) | options_not_of(second) | alike


def paired_differences(
    frame: pd.DataFrame, value: str, against: Mapping[str, object], *, mix: bool = False
) -> pd.DataFrame:
    """Difference in `value` of every group from the group `against` names, paired by seed.

    `against`: column -> value, such as `{"method": "full", "checkpointing": "none"}`.  The partner of a
    run has these values, its seed and data, and its other parameters, save what has one value among the
    partners and is a matter of a method: the policy of batch norms, an option that one of the two methods
    does not have, and the learning rate if there is one for each of `against`.  Columns: `SHOWN`, what else
    varies, `mean`, `half_width` (95 % Student-t), `n` pairs, `tied`: the interval contains 0 (None below two
    pairs).  Raises `InputError` for an unknown column, where there is no such group, a seed occurs twice,
    or runs that would be compared were not measured alike (unless `mix`).
    """
    for name in (value, *against):
        if name not in frame:
            raise InputError(f"the records have no column {name!r}.")
    if not mix:
        refuse_mixed(frame, rivals=True)
    ok = without_simulated(frame[frame.status == "ok"])
    ok = ok[ok[value].notna()]
    ok = ok[_phase(ok) == "training"]  # a baseline's seed is of other things
    by = list(dict.fromkeys([*SHOWN, *(n for n in (*PARAMETERS, *DATA) if n in ok and ok[n].nunique() > 1)]))
    if ok.duplicated([*by, "seed"]).any():
        raise InputError("a seed occurs twice in a group; select one run of each.")
    partners = ok[(ok[list(against)] == pd.Series(against)).all(axis=1)]
    if partners.empty:
        raise InputError(f"no finished run has {dict(against)}.")
    own_lr = "lr" in by and (ok.groupby(list(against)).lr.nunique() == 1).all()
    pairs = []
    for method, runs in ok.groupby("method", sort=False):
        own = _not_shared(method, against["method"]) if "method" in against else set()
        own = {name for name in own & set(by) if partners[name].nunique(dropna=False) == 1}
        own |= {"lr"} if own_lr else set()
        key = [name for name in by if name not in against and name not in own] + ["seed"]
        pairs.append(runs.join(partners.set_index(key)[value].rename("_partner"), on=key))
    pairs = pd.concat(pairs).loc[ok.index]
    pairs["_difference"] = pairs[value].astype(float) - pairs["_partner"].astype(float)
    rows = []
    for group_key, group in pairs.groupby(by, sort=False):
        mean, half_width, n = mean_and_interval(group["_difference"])
        tied = None if half_width is None else abs(mean) <= half_width
        rows.append(dict(zip(by, group_key)) | dict(mean=mean, half_width=half_width, n=n, tied=tied))
    return pd.DataFrame(rows)
