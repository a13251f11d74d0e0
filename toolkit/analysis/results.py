"""What finished runs show, one function per table; `as_text` and `show` format them for people."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from toolkit.analysis.statistics import (
    COSTS,
    DATA,
    SHOWN,
    differences,
    holm,
    interval,
    means,
    numbers,
    parameters,
    with_environments,
)
from toolkit.analysis.statistics import change as changed
from toolkit.analysis.tables import as_text, show
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.files import RUNS
from toolkit.measure.quantities import QUANTITIES
from toolkit.methods import METHODS
from toolkit.training.record import (
    FILE_NAME,
    FINISHED,
    RunRecord,
    load_curves,
    load_records,
    read_record,
)

REFERENCES = {"method": {"method": "full"}, "checkpointing": {"checkpointing": "none"}}


def read(folder: Path | str = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Records below `folder` ("": the usual one) with their `environment`, and the files that were left out.

    Copies of a record are left out as well.  Raises `InputError` if `folder` is a file.
    """
    folder = Path(folder or RUNS)
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder in which runs are kept.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = load_records(folder)
    left_out = [str(warning.message) for warning in caught]
    if len(records):
        copies = records.duplicated(["experiment_id", *(n for n in ("env_hash", *DATA) if n in records)])
        left_out += [f"{run} holds a copy of another record" for run in records.folder[copies]]
        records = records[~copies]
    return with_environments(records.reset_index(drop=True)), pd.DataFrame({"left out": left_out})


def runs_of(records: pd.DataFrame, experiments: Iterable[Experiment]) -> pd.DataFrame:
    """The rows of `records` that are runs of `experiments`, on any device."""
    wanted = pd.DataFrame([experiment.flat_dict() for experiment in experiments])
    keys = [
        "seed",
        *(name for name in parameters() if name in wanted and name in records and name != "device"),
    ]
    if records.empty or wanted.empty:
        return records[:0]
    chosen = (
        records[keys]
        .astype(object)
        .merge(wanted[keys].astype(object).drop_duplicates(), how="left", indicator=True)
    )
    return records[(chosen._merge == "both").to_numpy()]


def compare(records: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    """The means of runs that differ only in their seed, as text (see `means`).

    Constant columns, and quantities that no run has, are left out.
    """
    table = means(records, *quantities)
    if table.empty:
        return table
    rarely = ("environment", "budget_bytes", "not_ok")
    constant = [name for name in rarely if table[name].nunique() <= 1]
    constant += ["score_pct", "score_pct_half_width", "score_pct_n"]  # each task's own score is there
    absent = [name for name in (*COSTS.values(), *quantities) if table[name].isna().all()]
    return as_text(table.drop(columns=[*constant, *absent]))


def validation_losses(records: pd.DataFrame) -> pd.DataFrame:
    """Validation loss after the last epoch, mean over seeds: learning rates by methods.

    Raises `InputError` if no run ended ok.
    """
    ok = records[records.status == "ok"] if len(records) else records
    if ok.empty:
        raise InputError("no run ended ok; see the errors in the records.")
    losses = [load_curves(folder)["history"][-1]["val_loss"] for folder in ok.folder]
    return ok.assign(loss=losses).pivot_table(index="lr", columns="method", values="loss", aggfunc="mean")


def best_learning_rates(losses: pd.DataFrame, backbone: str) -> pd.DataFrame:
    """The rate of the lowest of `validation_losses` by method, next to the one that the method declares."""
    rows = []
    for method, best in losses.idxmin().items():
        declared = METHODS[method].learning_rate(backbone)
        ends = best in (losses.index[0], losses.index[-1])
        rows.append((method, best, "yes" if ends else "", declared.lr, declared.source))
    columns = ["method", "best rate", "at the end of the range", "declared rate", "source"]
    return pd.DataFrame(rows, columns=columns)


def what_ran(records: pd.DataFrame) -> pd.DataFrame:
    """Number of runs by data set, phase and status."""
    if records.empty:
        return records
    table = pd.crosstab([records.dataset, records.phase], records.status)
    return table.reset_index().rename_axis(columns=None)


def environments(records: pd.DataFrame) -> pd.DataFrame:
    """Where runs ran, and where their figures come from."""
    columns = ["device_name", "version_torch", "version_timm", "version_peft", "python", "driver", "threads"]
    columns += ["code_sha256", "budget_mode", "memory_source", "energy_source"]
    return _values(records, ["environment"], columns)


def data_sets(records: pd.DataFrame) -> pd.DataFrame:
    """Sizes of the data sets that runs saw, and the beginnings of their hashes."""
    return _values(records, ["dataset", *DATA], ["n_classes", "n_train", "n_val", "n_test", "n_broken"])


def _values(records: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """One row per group of `by`: the number of runs, and the different values in each of `columns`."""
    if records.empty:
        return records
    finished = records[records.status.isin(FINISHED)].reindex(columns=[*by, *columns])
    rows = []
    for key, group in finished.groupby(by, dropna=False):
        values = {name: ", ".join(map(_short, group[name].dropna().unique())) or None for name in columns}
        rows.append(dict(zip(by, map(_short, key))) | {"runs": len(group)} | values)
    return pd.DataFrame(rows)


def _short(value: object) -> str:
    """A value as text; a hash by its beginning."""
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def missing(records: pd.DataFrame) -> pd.DataFrame:
    """Why figures of runs that ended ok are missing, as their records say, and for how many runs; also what
    FLOPs leave out."""
    names = [
        "train_peak_bytes",
        "train_seconds",
        "train_energy_joules",
        "prepare_peak_bytes",
        "prepare_joules",
    ]
    counts: Counter = Counter()
    for folder in records.folder[records.status == "ok"] if len(records) else ():
        record = read_record(Path(folder, FILE_NAME))
        reasons = record.get("missing", {})
        counts.update((QUANTITIES[name].label, str(why)) for name, why in reasons.items() if name in names)
        if left_out := record["flops"].get("uncounted_operators"):
            counts["part of the FLOPs", f"no formula for {left_out}"] += 1
    rows = [(figure, why, runs) for (figure, why), runs in sorted(counts.items())]
    return pd.DataFrame(rows, columns=["figure", "missing because", "runs"])


def overview(record: RunRecord) -> Styler:
    """The figures of one run by their names for people; below, what was not measured and why."""
    table = record.overview()
    table["figure"] = [QUANTITIES[name].label if name in QUANTITIES else name for name in table.index]
    missing = table[table["missing because"] != ""]
    reasons = missing.groupby("missing because", sort=False)["figure"].agg(", ".join)
    caption = " ".join(f"No {figures}: {reason}." for reason, figures in reasons.items())
    if record.flops.get("uncounted_operators"):
        caption = f"{caption} Not in FLOPs and multiply-adds: {record.flops['uncounted_operators']}.".strip()
    measured = table[(table.value != "–") & (table["missing because"] == "")]
    return show(measured[["figure", "value"]], caption)


def effects(records: pd.DataFrame, of: str) -> pd.DataFrame:
    """What each method ("method", against full) or strategy ("checkpointing", against none) changes.

    One row per group and quantity: `low`, `change` and `high` in points (scores) or per cent (costs), `n`
    pairs, `p` of a paired t-test, and `p_holm`, corrected for all tests of the quantity.
    """
    quantities = ["score_pct", *COSTS.values()]
    parts = [differences(records, name, REFERENCES[of]).assign(quantity=name) for name in quantities]
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame()
    tests = pd.concat(parts, ignore_index=True)
    tests["p_holm"] = tests.groupby("quantity").p.transform(holm)
    for name, side in (("low", -1), ("change", 0), ("high", 1)):
        ends = tests["mean"] + side * tests.half_width.fillna(0 if side == 0 else float("nan"))
        tests[name] = [changed(*pair) for pair in zip(tests.quantity, ends)]
    return tests


def effects_table(tests: pd.DataFrame) -> pd.DataFrame:
    """`effects` with one row per group, as text; a star: p < 0.05 after Holm's correction."""
    if tests.empty:
        return tests
    keys = [name for name in tests if name in (*SHOWN, "environment", *parameters(), *DATA)]
    cells = []
    for test in tests.to_dict("records"):
        text = interval(test["quantity"], test["mean"], test["half_width"])
        cells.append(text + (" *" if test["p_holm"] < 0.05 else ""))
    titles = tests.quantity.map(
        lambda name: "score (points)" if name == "score_pct" else f"{QUANTITIES[name].label} (%)"
    )
    rows = tests.assign(cell=cells, title=titles)
    by = [name for name in keys if rows[name].notna().any()]
    groups = rows[by].astype(object).where(rows[by].notna(), "–")
    table = rows.assign(**groups).pivot_table("cell", by, "title", aggfunc="first", sort=False)
    n = rows.assign(**groups).groupby(by, sort=False).n.min()
    return as_text(table.fillna("–").assign(n=n).reset_index().rename_axis(columns=None))


def budgets(records: pd.DataFrame) -> pd.DataFrame:
    """Whether each strategy kept its budget, and how well the peak was predicted."""
    rows = []
    tuned = (
        records[(records.phase == "training") & records.status.isin(FINISHED)] if len(records) else records
    )
    by = ["dataset", "backbone", "checkpointing", "environment"]
    for key, group in tuned.groupby(by, sort=False) if len(tuned) else ():
        ok = group[group.status == "ok"]
        peak_bytes = numbers(ok, "train_peak_bytes")
        used = 100 * peak_bytes / numbers(ok, "budget_bytes")
        error = 100 * (peak_bytes / numbers(ok, "predicted_peak_bytes") - 1)
        rows.append(
            dict(zip(by, key))
            | {"ended_ok": len(ok), "kept_budget": int(ok.within_budget.eq(True).sum())}
            | {"out_of_memory": int((group.status == "oom").sum()), "highest_use_of_budget_pct": used.max()}
            | {"lowest_error_of_prediction_pct": error.min(), "highest_error_of_prediction_pct": error.max()}
        )
    return pd.DataFrame(rows)


def failures(records: pd.DataFrame) -> pd.DataFrame:
    """Runs that did not end well, with their error and their executed notebook."""
    if records.empty:
        return records
    table = records[records.status != "ok"].reindex(
        columns=[*SHOWN, "budget_bytes", "seed", "status", "error"]
    )
    notebooks = [min(Path(folder).glob("*.ipynb"), default=None) for folder in records.folder[table.index]]
    return table.assign(notebook=[path and f"{path.parent.name}/{path.name}" for path in notebooks])


def side_by_side(records: pd.DataFrame, first: int, second: int) -> pd.DataFrame:
    """Parameters, data, environment and figures in which two rows of `records` differ, a row each."""
    names = ["status", "seed", *parameters(), *DATA, "environment", "score_pct", *COSTS.values()]
    pair = as_text(records.loc[[first, second], [name for name in names if name in records]])
    pair = pair.set_axis(["first", "second"]).T
    return pair[pair["first"] != pair["second"]].rename_axis("parameter").reset_index()
