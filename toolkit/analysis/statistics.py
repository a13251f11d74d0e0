"""Means over seeds with intervals, differences paired by seed, and which runs may be compared at all.

Runs of one *environment* (same machine, versions, settings and sources of their figures) were measured alike.
Times and energies of different environments are never averaged, ranked or paired.  Scores and bytes are, if
the environments differ in nothing that changes results: they have a *pool* in common.  Nothing here mixes
different data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import scipy.stats

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.registry import PROTOCOLS
from toolkit.budget import STRATEGIES
from toolkit.datasets.tasks import TASKS
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment, option_fields
from toolkit.measure.environment import PACKAGES
from toolkit.measure.quantities import QUANTITIES, Quantity, register
from toolkit.measure.scores import pareto_rank
from toolkit.methods import METHODS

DATA = ["train_sha256", "test_sha256"]
SHOWN = ["dataset", "backbone", "method", "checkpointing"]
SCORES = [f"test_{task.metric}" for task in TASKS.values()]
COSTS = {"memory": "peak_bytes", "time": "adapt_seconds", "energy": "adapt_joules"}  # columns of `adaptation`
register(Quantity("score_pct", "test score", "%", better="more"))  # of the data set's task, see `adaptation`
register(
    Quantity("recompute_pct", "recomputed share of the forward pass", "%", 1, "less", "no step was traced")
)
FIGURES = ["mean", "half_width", "n", "p"]  # of `differences`
# What environments may differ in, as people say it: these change scores or bytes, ...
OF_RESULTS = {
    "gpu": "{}", "cuda": "CUDA {}", "cudnn": "cuDNN {}", "memory_source": "memory from {}",
    "energy_source": "energy from {}", "budget_mode": "{} budget", "deterministic": "deterministic {}",
    "cudnn_tf32": "TF32 {}", "matmul_precision": "{} matmul precision", "alloc_conf": "allocator {}",
    **{f"version_{name}": f"{name} {{}}" for name in PACKAGES},
}  # fmt: skip
OF_SPEED = {  # ... these only times and energies
    "cpu_name": "{}", "threads": "{} threads", "driver": "driver {}", "power_limit_watts": "limit of {} W",
    "cudnn_benchmark": "cuDNN benchmark {}", "python": "Python {}", "version_toolkit": "toolkit {}",
    "code_sha256": "code {:.7}", "os": "{}",
}  # fmt: skip
KNOWN = ("status", "phase", "error", "seed", "env_hash", "device", "device_name", *DATA)
ROUNDING = 1e-9  # half width of an interval that is nothing but rounding of equal numbers


def parameters() -> list[str]:
    """Columns of records that hold parameters and options of experiments, but for the seed."""
    names = [f.name for kind in (Experiment, BaselineExperiment) for f in dataclasses.fields(kind)]
    # Records hold a baseline and its protocol under `backbone` and `method`.
    hidden = ("seed", "baseline", "protocol", "budget", "options")
    names += option_fields()
    return ["budget_bytes", *(name for name in dict.fromkeys(names) if name not in hidden)]


# --- which runs belong together ---


def with_environments(records: pd.DataFrame) -> pd.DataFrame:
    """`records` with all known columns, and with `environment` (E1, E2, ..., the one with most runs first).

    A run that could not measure memory or energy (source "none") goes with those of its machine that could.
    `pool`: the first environment with equal results, which is one that differs in `OF_SPEED` only.
    `attrs["environments"]`: name of each environment -> the same with what tells it from the others in words.
    """
    if "pool" in records or records.empty:
        return records
    names = dict.fromkeys((*KNOWN, *SHOWN, "budget_bytes", *QUANTITIES, *OF_RESULTS, *OF_SPEED))
    absent = [name for name in names if name not in records]
    nothing = pd.DataFrame(None, records.index, absent, dtype=object)
    records = pd.concat([records, nothing], axis="columns")
    records["phase"] = records.phase.fillna("training")
    if "environment" in records:
        return records.assign(pool=records.environment)
    kind = records.env_hash.fillna("").astype(str)
    sources = {}
    for name in ("memory_source", "energy_source"):
        known = records[name].where(records[name] != "none")
        sources[name] = known.fillna(known.groupby(kind).transform("first")).fillna("").astype(str)
        kind = kind + "|" + sources[name]
    counts = kind.value_counts()
    order = sorted(counts.index, key=lambda name: (-counts[name], name))
    number = kind.map({name: i for i, name in enumerate(order, start=1)})
    gpu = records.device_name.where(records.device == "cuda")
    fields = records[[*OF_RESULTS, *OF_SPEED]].assign(gpu=gpu, **sources)
    fields = fields.groupby(number).first().map(lambda value: "" if pd.isna(value) else str(value))
    # Environments that differ in nothing that is recorded differ in something unknown: no pool.
    alike = fields[[*OF_RESULTS]].assign(unknown=fields.groupby([*fields]).cumcount())
    pool = fields.index.to_series().groupby([column for _, column in alike.items()]).transform("min")
    records = records.assign(environment="E" + number.astype(str), pool="E" + number.map(pool).astype(str))
    records.attrs["environments"] = _in_words(fields)
    return records


def _in_words(fields: pd.DataFrame) -> dict[str, str]:
    """The name of each environment, with what tells it from the others; `fields`: a row each."""
    words = {name: text for name, text in (OF_RESULTS | OF_SPEED).items() if fields[name].nunique() > 1}
    names = {}
    for number, row in fields.iterrows():
        told = ", ".join(text.format(row[name]) for name, text in words.items() if row[name])
        names[f"E{number}"] = f"E{number}: {told}" if told else f"E{number}"
    return names


def adaptation(records: pd.DataFrame) -> pd.DataFrame:
    """`records` with `peak_bytes`, `adapt_seconds` and `adapt_joules`: what it took to get the model.

    For a fine-tuned model these are training's, with the time and energy of computing cached features.  For a
    baseline they are those before the first test image (text classifier, features and probe, choice of a
    scoring rule), and the highest peak of all.  `score_pct` is the test score of the data set's task,
    `recompute_pct` the FLOPs computed twice in per cent of the forward pass's.
    """
    records = with_environments(records)
    baseline = records.phase == "inference"
    features_seconds = numbers(records, "features_seconds").fillna(0)
    features_joules = numbers(records, "features_energy_joules").where(features_seconds > 0, 0)
    train_seconds = numbers(records, "train_seconds") + features_seconds
    train_joules = numbers(records, "train_energy_joules") + features_joules
    highest = np.fmax(numbers(records, "prepare_peak_bytes"), numbers(records, "test_peak_bytes"))
    forward, recompute = (numbers(records, f"{phase}_flops_per_image") for phase in ("forward", "recompute"))
    score = pd.Series(np.nan, index=records.index)
    for name in SCORES:
        score = score.fillna(numbers(records, name))
    return records.assign(
        score_pct=score,
        recompute_pct=100 * recompute / forward.where(forward > 0),
        peak_bytes=numbers(records, "train_peak_bytes").where(~baseline, highest),
        adapt_seconds=train_seconds.where(~baseline, numbers(records, "prepare_seconds")),
        adapt_joules=train_joules.where(~baseline, numbers(records, "prepare_joules")),
    )


def numbers(records: pd.DataFrame, name: str) -> pd.Series:
    """A column of `records` as floats; NaN for what is no number, and where there is no such column."""
    column = records[name] if name in records else pd.Series(None, index=records.index, dtype=object)
    return pd.to_numeric(column, errors="coerce").astype(float)


def groups(records: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Groups of runs that differ only in their seed, with what tells them apart; methods in their order.

    Groups of one pool that differ only in their environment have the same number in their column `setting`.
    What tells them apart: `SHOWN`, environment, budget, and parameters that vary among runs that share these.
    A learning rate that follows from the method is not among them.
    """
    records = with_environments(records)
    if records.empty:
        return
    always = [*SHOWN, "environment", "budget_bytes"]
    vary = [name for name in (*parameters(), *DATA) if name in records and name not in always]
    vary = [name for name in vary if records[name].nunique(dropna=False) > 1]  # few: the next line is slow
    vary = [name for name in vary if (records[name].groupby(records.phase).nunique(dropna=False) > 1).any()]
    settings = records.groupby(always, dropna=False)
    varying = [name for name in vary if (settings[name].nunique(dropna=False) > 1).any()]
    records = records.sort_values([*always, *vary], kind="stable", key=_in_order)
    pooled = [*SHOWN, "pool", "budget_bytes", *vary]
    records["setting"] = records.groupby(pooled, dropna=False).ngroup()
    for _, group in records.groupby([*always, *vary], sort=False, dropna=False):
        yield group[[*always, *varying]].iloc[0].to_dict(), group


def _in_order(column: pd.Series) -> pd.Series:
    """Sort keys of a column: methods, protocols and strategies as in their tables, others by value."""
    if column.name in ("method", "checkpointing"):
        protocols = [protocol for family in PROTOCOLS.values() for protocol in family]
        order = {name: place for place, name in enumerate((*METHODS, *protocols, *STRATEGIES))}
        return column.map(lambda name: order.get(name, len(order)))
    return column.astype(str) if column.dtype == object else column


# --- means ---


def mean_and_interval(values: pd.Series) -> tuple[float, float, int]:
    """Mean, half width of the 95 % Student-t interval, and n of the values that exist.

    Missing values are left out, never taken as 0.  The mean of nothing is NaN, and so is the half width of
    fewer than two values.
    """
    values = pd.to_numeric(values).dropna().astype(float)
    n = len(values)
    half_width = float(scipy.stats.t.ppf(0.975, n - 1) * values.sem()) if n > 1 else math.nan
    return float(values.mean()) if n else math.nan, half_width, n


def means(records: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    """One row per group of runs that differ in nothing but the seed (see `groups`).

    Columns: what tells the groups apart; `n` seeds with a run that ended ok, and `not_ok`, how others ended;
    `within_budget` (all of them) and `params_trainable`; and of each quantity its mean, `_half_width` and
    `_n` (see `mean_and_interval`).  Quantities are the test scores that the runs have, `score_pct`, `COSTS`,
    and the columns named in `quantities`.  Times, energies and what is made of them are those of the row's
    environment, all else is that of its pool.  Repeated runs of a seed count as one, by their mean.
    """
    records = adaptation(records).reset_index(drop=True) if len(records) else records
    scores = [name for name in SCORES if name in records and records[name].notna().any()]
    names = dict.fromkeys((*scores, "score_pct", *COSTS.values(), *quantities))
    found = list(groups(records))
    if not found:
        return pd.DataFrame()
    ok = records[records.status == "ok"]
    setting = pd.concat([group.setting for _, group in found])[ok.index]
    place = pd.Series({row: place for place, (_, group) in enumerate(found) for row in group.index})[ok.index]
    pooled = _by_seed(ok, setting, [name for name in names if not _depends_on_speed(name)])
    pooled["n"] = ok.seed.groupby(setting).nunique(dropna=False)
    pooled["within_budget"] = ok.within_budget.eq(True).groupby(setting).all()
    pooled["params_trainable"] = ok.params_trainable.groupby(setting).first()
    own = _by_seed(ok, place, [name for name in names if _depends_on_speed(name)])
    settings = [group.setting.iloc[0] for _, group in found]
    figures = [pooled.reindex(settings).reset_index(drop=True), own.reindex(range(len(found)))]
    rows = [key | {"not_ok": ", ".join(map(str, g.status[g.status != "ok"]))} for key, g in found]
    table = pd.concat([pd.DataFrame(rows), *figures], axis="columns")
    counts = ["n", *(f"{name}_n" for name in names)]
    table[counts] = table[counts].fillna(0).astype(int)
    order = [f"{name}{end}" for name in names for end in ("", "_half_width", "_n")]
    table = table[[*found[0][0], "n", "not_ok", "within_budget", "params_trainable", *order]]
    table.attrs["environments"] = records.attrs.get("environments", {})
    return table


def _by_seed(ok: pd.DataFrame, by: pd.Series, names: list[str]) -> pd.DataFrame:
    """`mean_and_interval` of each quantity for each value of `by`; the runs of a seed count as one."""
    values = pd.DataFrame({name: numbers(ok, name) for name in names}, ok.index)
    found = values.groupby([by, ok.seed], dropna=False).mean().groupby(level=0)
    mean, n = found.mean(), found.count()
    half_width = found.sem() * scipy.stats.t.ppf(0.975, (n - 1).where(n > 1))
    return pd.concat([mean, half_width.add_suffix("_half_width"), n.add_suffix("_n")], axis="columns")


def _depends_on_speed(quantity: str) -> bool:
    """Whether a quantity is a time, an energy, or made of them."""
    return quantity in QUANTITIES and QUANTITIES[quantity].unit in ("s", "J", "W", "dB")


# By phase: the NetScores, and the costs that ranks are made of.
NETSCORES = {
    phase: ["ns", f"ns_e_{phase}", f"ns_m_{phase}", f"ns_sharp_{phase}"]
    for phase in ("training", "inference")
}
RANKED = {
    "training": ["train_peak_bytes", "train_energy_joules", "train_seconds"],
    "inference": ["test_peak_bytes", "test_energy_joules", "test_seconds"],
}


def standing(records: pd.DataFrame, phase: str = "training") -> pd.DataFrame:
    """Means of the NetScores with a phase's costs, and two ranks that do not depend on units.

    `phase`: "training", or "inference", which baselines have too.  `pareto_rank` and `dominated_pct` are of
    mean score, peak memory, energy and time, among the groups of one data set and environment; a cost that no
    run has is left out.  `dominated_pct` is the share that a group dominates of the box from 0 % and 1.1
    times the worst costs to 100 % and no cost.  A group without a finished run, or without a cost that others
    have, has neither.
    """
    costs = RANKED[check_name("phase", phase, RANKED)]
    table = means(records, *NETSCORES[phase], *costs)
    if table.empty:
        return table
    table["pareto_rank"], table["dominated_pct"] = pd.NA, np.nan
    by = [name for name in ("dataset", "environment", *DATA) if name in table]
    for _, rivals in table.groupby(by, dropna=False):
        points = rivals[["score_pct", *costs]].dropna(axis="columns", how="all").dropna()
        if points.empty or "score_pct" not in points or len(points.columns) == 1:
            continue
        scores, costs_of = points.score_pct, points.drop(columns="score_pct")
        worst = 1.1 * costs_of.max()
        table.loc[points.index, "pareto_rank"] = pareto_rank(scores, costs_of)
        dominated_pct = scores * (1 - costs_of / worst).prod(axis="columns")
        table.loc[points.index, "dominated_pct"] = dominated_pct.astype(float).round(1)
    keys = [name for name in table.columns if name in (*SHOWN, "environment", *parameters(), *DATA)]
    shown = [name for name in table if name.startswith(tuple(NETSCORES[phase]))]
    return table[[*keys, "n", *shown, "pareto_rank", "dominated_pct"]]


# --- paired differences ---


def differences(records: pd.DataFrame, quantity: str, against: Mapping[str, object]) -> pd.DataFrame:
    """How the runs of each group differ in `quantity` from the runs that `against` names, paired by seed.

    `against`: column -> value, such as `{"method": "full"}`.  The partner of a run has these values, its
    environment, seed and data, and its other parameters, except for what is a matter of the method and has
    one value among the partners: an option that only one of the two methods has, the policy of batch norms,
    and the learning rate if each group of `against` has one.

    Columns: what tells the groups apart; `mean` and `half_width` (95 %) of scores in points, of costs as
    logarithms of ratios (`change` translates); `n` pairs; `p` of a two-sided t-test, missing below two pairs
    and where all pairs agree.  Empty if there is nothing to pair.  Runs of a pool can be partners, except in
    times and energies, and those of one seed count as one, by their mean.  Raises `InputError` for a seed
    that is repeated in an environment.
    """
    ok = with_environments(records)
    ok = adaptation(ok[ok.status == "ok"]) if len(ok) else ok
    for name in (quantity, *against):
        if len(ok) and name not in ok:
            raise InputError(f"the records have no column {name!r}.")
    if len(ok):
        ok = ok[
            (ok.phase == "training") & numbers(ok, quantity).notna()
        ]  # a baseline's seed means something else
    if ok.empty or not (partners := (ok[list(against)] == pd.Series(against)).all(axis=1)).any():
        return pd.DataFrame(columns=[*SHOWN, "environment", *FIGURES])
    values = numbers(ok, quantity)
    ok["_value"] = np.log(values.where(values > 0)) if _is_cost(quantity) else values
    by = [*SHOWN, "environment"]
    by += [n for n in (*parameters(), *DATA) if n in ok and n not in by and ok[n].nunique(dropna=False) > 1]
    if ok.duplicated([*by, "seed"]).any():
        raise InputError("a seed occurs twice in a group; select one run of each.")
    if not _depends_on_speed(quantity):
        ok["environment"] = ok.pool
    for name in by:  # an option that a method does not have equals itself
        ok[name] = ok[name].astype(object).where(ok[name].notna(), "–")
    ok["_value"] = ok.groupby([*by, "seed"], dropna=False)["_value"].transform("mean")
    ok = ok.drop_duplicates([*by, "seed"])
    partners = partners[ok.index]
    one_lr = "lr" in by and (ok.groupby(list(against)).lr.nunique() == 1).all()
    parts = []
    for method, runs in ok.groupby("method", sort=False):
        own = _own_options(method, against["method"]) if "method" in against else set()
        if "checkpointing" in against:
            own |= {name for strategy in STRATEGIES.values() for name in strategy.names()}
        own = {name for name in own & set(by) if ok.loc[partners, name].nunique(dropna=False) == 1}
        own |= {"lr"} if one_lr else set()
        key = [name for name in by if name not in own and name not in against] + ["seed"]
        found = ok[partners].set_index(key)["_value"].rename("_partner")
        parts.append(runs.join(found, on=key))
    pairs = pd.concat(parts).loc[ok.index]
    pairs["_difference"] = pairs["_value"] - pairs["_partner"]
    rows = []
    for key, group in groups(pairs[~partners].drop(columns="_value")):
        mean, half_width, n = mean_and_interval(group["_difference"])
        if n:
            figures = (mean, half_width, n, _p(mean, half_width, n))
            rows.append(key | dict(zip(FIGURES, figures)))
    return pd.DataFrame(rows, columns=None if rows else [*SHOWN, "environment", *FIGURES])


def _own_options(method: str, other: str) -> set[str]:
    """Parameters that need not be alike in runs of two methods."""
    if method == other or not {method, other} <= set(METHODS):
        return set()
    # Two methods share an option if it is declared once for both.
    shared = {name for name, owners in option_fields().items() if owners.get(method, 0) is owners.get(other)}
    return {*option_fields()} - shared | {"batch_norm"}  # "auto" differs between methods


def _is_cost(quantity: str) -> bool:
    return QUANTITIES[quantity].better == "less"


def _p(mean: float, half_width: float, n: int) -> float:
    if n < 2 or half_width <= ROUNDING:
        return math.nan
    t = mean / half_width * scipy.stats.t.ppf(0.975, n - 1)
    return float(2 * scipy.stats.t.sf(abs(t), n - 1))


def change(quantity: str, value: float) -> float:
    """A mean or an end of an interval of `differences`, in points (scores) or per cent (costs)."""
    return 100 * math.expm1(value) if _is_cost(quantity) else value


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjustment for testing all of `p` at once: below 0.05, at most one in 20 such sets errs.

    Missing values stay missing and do not count.
    """
    known = p.dropna().sort_values()
    adjusted = (known * np.arange(len(known), 0, -1)).cummax().clip(upper=1.0)
    return adjusted.reindex(p.index)


def interval(quantity: str, mean: float, half_width: float, unit: str = "") -> str:
    """A difference and its interval as text: `−2.1 [−3.0, −1.2]`, or `−2.1 [=]` if all pairs agree."""
    middle = _signed(quantity, mean) + unit
    if math.isnan(half_width):
        return middle
    if half_width <= ROUNDING:
        return f"{middle} [=]"
    return f"{middle} [{_signed(quantity, mean - half_width)}, {_signed(quantity, mean + half_width)}]"


def _signed(quantity: str, value: float) -> str:
    digits = 1 if _is_cost(quantity) else 2
    rounded = round(change(quantity, value), digits) + 0.0  # no −0.0
    return f"{rounded:+.{digits}f}".replace("-", "−") if rounded else f"{0:.{digits}f}"
