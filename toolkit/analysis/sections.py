"""What finished runs say, one function per table or kind of picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from toolkit.analysis.claims_checkpointing import findings
from toolkit.analysis.paired import QUANTITIES, change, differences, holm, interval
from toolkit.analysis.reading import Runs
from toolkit.analysis.statistics import (
    DATA,
    PARAMETERS,
    SHOWN,
    adaptation,
    groups,
    mean_and_interval,
    standing,
    without_simulated,
)
from toolkit.analysis.tables import Table, letter, visible
from toolkit.budget import format_bytes
from toolkit.plots import pareto
from toolkit.training.record import FILE_NAME

COLUMNS = {  # of the table of results: column of `adaptation`, its unit in units of the column, digits
    "accuracy (%)": ("test_top1_pct", 1, 2),
    "peak memory (MiB)": ("peak_bytes", 2**20, 2),
    "time (s)": ("adapt_seconds", 1, 1),
    "energy (J)": ("adapt_joules", 1, 0),
}
DENSE = {
    "mean IoU (%)": ("test_miou_pct", 1, 2),
    "box mAP (%)": ("test_map_pct", 1, 2),
}  # where there are any
FIELDS = {  # under which names records say why one is missing; of training, of a baseline
    "peak_bytes": ("train_peak_bytes", "prepare_peak_bytes"),
    "adapt_seconds": ("train_seconds", "prepare_seconds"),
    "adapt_joules": ("train_energy_joules", "prepare_joules"),
}
REFERENCES = {"method": {"method": "full"}, "checkpointing": {"checkpointing": "none"}}


def what_ran(runs: Runs) -> Table:
    """Runs by data set, kind and status."""
    kind = runs.frame.phase.map(lambda phase: "baselines" if phase == "inference" else "fine-tuning")
    table = pd.crosstab([runs.frame.dataset, kind.rename("kind")], runs.frame.status)
    table = table.reset_index().rename_axis(columns=None).astype(str)
    return Table("runs", table, tuple(table.columns[2:]))


def environments(runs: Runs) -> Table:
    """Where finished runs ran, and where their figures come from."""
    rows = []
    for name, part in runs.finished.groupby("environment"):
        row = {"environment": name, "runs": str(len(part)), "device": _all(part.device_name)}
        row |= {package: _all(part[f"version_{package}"]) for package in ("torch", "timm", "peft")}
        row |= {"python": _all(part.python), "driver": _all(part.driver), "threads": _all(part.threads)}
        row |= {"code": _all(part.code_sha256.astype(str).str[:8]), "budget mode": _all(part.budget_mode)}
        energy = part.energy_source.replace("fake", "simulated GPU, no measurement")
        rows.append(row | {"memory from": _all(part.memory_source), "energy from": _all(energy)})
    return Table("environments", pd.DataFrame(rows), ("runs",))


def _all(values: pd.Series) -> str:
    """The different values, as text."""
    shown = (f"{value:,.10g}" if isinstance(value, float) else str(value) for value in values.dropna())
    return ", ".join(dict.fromkeys(shown)) or "–"


def data_sets(runs: Runs) -> Table:
    """Sizes of the data that finished runs saw, and the beginnings of their sha256."""
    rows = []
    for (name, train, test), part in runs.finished.groupby(["dataset", *DATA], dropna=False):
        sizes = {"classes": "n_classes", "training": "n_train", "validation": "n_val", "test": "n_test"}
        row = {"dataset": name, "runs": str(len(part))}
        row |= {title: _all(part[column]) for title, column in (sizes | {"broken": "n_broken"}).items()}
        rows.append(row | {"sha256 of training": str(train)[:12], "sha256 of test": str(test)[:12]})
    return Table("data", pd.DataFrame(rows), ("runs", *sizes, "broken") if rows else ())


def results(runs: Runs) -> Table:
    """Means over seeds with 95 % Student-t intervals, of runs that differ in nothing but the seed."""
    text, values, notes = [], [], {}
    columns = {title: what for title, what in DENSE.items() if runs.frame[what[0]].notna().any()} | COLUMNS
    for environment, part in runs.finished.groupby("environment"):
        for key, group in groups(part):
            names = dict.fromkeys([*SHOWN, "budget", *key])
            key = {name: str(group[name].iloc[0]) for name in names} | {"environment": environment}
            ok = group[group.status == "ok"]
            ended = ", ".join(f"{count} {status}" for status, count in group.status.value_counts().items())
            row = key | {"budget": format_bytes(int(key["budget"])), "n": str(len(ok))}
            numbers = key | {"n": len(ok), "ended": ended}
            figures = adaptation(without_simulated(ok))
            for title, (column, unit, digits) in columns.items():
                mean, half, n = mean_and_interval(pd.to_numeric(figures[column]))
                numbers |= {f"{column}_mean": mean, f"{column}_half_width": half, f"{column}_n": n}
                if n == 0:
                    why = _why_missing(group, column)
                    row[title] = f"– {letter(notes.setdefault(why, len(notes)))}"
                    continue
                row[title] = f"{mean / unit:,.{digits}f}"
                row[title] += "" if half is None else f" ± {half / unit:,.{digits}f}"
                row[title] += f" (n = {n})" if n < len(ok) else ""
            text.append(row | {"ended": ended})
            values.append(numbers)
    table = _without_idle(pd.DataFrame(text))
    return Table("results", table, ("n", *columns), pd.DataFrame(values), tuple(notes))


def _why_missing(group: pd.DataFrame, column: str) -> str:
    """Why no run of a group has a figure, as their records say."""
    ok = group[group.status == "ok"]
    if ok.empty:
        return "no run ended ok"
    if column == "adapt_joules" and (ok.energy_source == "fake").any():
        return "simulated GPU: its joules are no measurement"
    reasons = {}
    for folder, phase in zip(ok.folder, ok.phase):
        missing = json.loads(Path(folder, FILE_NAME).read_text()).get("missing")
        name = FIELDS.get(column, (column, column))[phase == "inference"]
        why = missing.get(name) if isinstance(missing, dict) else None
        if column in (dense[0] for dense in DENSE.values()):
            why = why or "not the score of this data set's task"
        reasons[visible(why) if isinstance(why, str) else "the record gives no reason"] = True
    return "; ".join(reasons)


def _without_idle(table: pd.DataFrame) -> pd.DataFrame:
    """Without parameters that tell no two rows apart: learning rates that follow from the method."""
    keys = [name for name in table if name in (*PARAMETERS, *DATA, "environment")]
    for name in [name for name in keys if name not in (*SHOWN, "budget")]:
        rest = [key for key in keys if key != name]
        if not table.duplicated(rest).any():
            keys, table = rest, table.drop(columns=name)
    return table


def scores(runs: Runs, phase: str) -> Table:
    """NetScores in decibels and what no unit can move (`statistics.standing`), with a phase's costs."""
    parts = runs.finished if phase == "inference" else runs.finished[runs.finished.phase == "training"]
    # Runs of one environment were measured alike.
    tables = [standing(p, phase, mix=True).assign(environment=e) for e, p in parts.groupby("environment")]
    if not tables:
        return Table(f"scores_{phase}", pd.DataFrame())
    table = pd.concat(tables, ignore_index=True)
    figures = ("NS", "NS-E", "NS-M", "NS#", "Pareto rank", "dominated %")
    if "budget" in table:
        table["budget"] = [format_bytes(int(budget)) for budget in table.budget]
    table = _without_idle(table)
    table = table[[*(name for name in table if name not in figures), *figures]].astype(object)
    return Table(f"scores_{phase}", table.where(table.notna(), "–").astype(str), figures)


def effects(runs: Runs, of: str) -> Table:
    """What each method ("method", against full) or strategy ("checkpointing", against none) changes."""
    parts = [
        differences(part, quantity, REFERENCES[of]).assign(quantity=quantity, environment=environment)
        for environment, part in runs.finished.groupby("environment")
        for quantity in QUANTITIES
    ]
    parts = [part for part in parts if len(part)]
    if not parts:
        return Table(f"effects_of_{of}", pd.DataFrame())
    tests = pd.concat(parts, ignore_index=True)
    tests["p_holm"] = tests.groupby("quantity").p.transform(holm)
    ends = tests["mean"] - tests.half_width, tests["mean"], tests["mean"] + tests.half_width
    for name, values in zip(("low", "change", "high"), ends):
        tests[name] = [change(*pair) for pair in zip(tests.quantity, values.astype(float))]
    keys = [name for name in tests if name in (*PARAMETERS, *DATA, "environment")]
    rows = []
    for key, group in tests.groupby(keys, sort=False, dropna=False):
        row = dict(zip(keys, map(str, key))) | {"budget": format_bytes(int(group.budget.iloc[0]))}
        found = {test.quantity: test for test in group.itertuples()}
        for quantity in QUANTITIES:
            test, title = found.get(quantity), f"{quantity} ({'points' if quantity == 'accuracy' else '%'})"
            row[title] = "–" if test is None else interval(quantity, test.mean, test.half_width)
            row[title] += " *" if test is not None and test.p_holm < 0.05 else ""
        rows.append(row | {"n": _all(group.n)})
    table = _without_idle(pd.DataFrame(rows))
    tests = tests.drop(columns=["mean", "half_width"])
    return Table(f"effects_of_{of}", table, tuple(table.columns[-1 - len(QUANTITIES) :]), tests)


def budgets(runs: Runs) -> Table:
    """Whether each strategy kept its budget, and how well the peak was predicted."""
    rows, values = [], []
    keys = ["dataset", "backbone", "checkpointing", "environment"]
    for key, group in runs.finished[runs.finished.phase == "training"].groupby(keys, sort=False):
        ok, row = group[group.status == "ok"], dict(zip(keys, key))
        used = 100 * ok.train_peak_bytes / ok.budget.astype(float)
        error = (100 * (ok.train_peak_bytes / ok.predicted_peak_bytes - 1)).dropna()
        within, oom = int(ok.within_budget.eq(True).sum()), int((group.status == "oom").sum())
        values.append(
            row | {"ok": len(ok), "within": within, "oom": oom, "highest_peak_pct_of_budget": used.max()}
            | {"predicted": len(error), "lowest_error_pct": error.min(), "highest_error_pct": error.max()}
        )  # fmt: skip
        off = f"{error.min():+.2f} to {error.max():+.2f} (n = {len(error)})".replace("-", "−")
        rows.append(
            row | {"within budget": f"{within} of {len(ok)}", "out of memory": str(oom)}
            | {"highest peak (% of budget)": f"{used.max():,.1f}" if used.notna().any() else "–"}
            | {"measured less predicted (%)": off if len(error) else "–"}
        )  # fmt: skip
    table = _without_idle(pd.DataFrame(rows))
    return Table("budget", table, tuple(table.columns[-4:]), pd.DataFrame(values))


def claims(runs: Runs) -> Table:
    """Published claims, our figures, and a verdict on each; those on CNNs if there are such runs."""
    from toolkit.analysis.claims_cnns import edge_findings, is_about_edge  # which are made of this package

    found = findings(runs.frame)
    if is_about_edge(runs.frame):
        found += edge_findings(runs.frame)
    table = pd.DataFrame([asdict(finding) for finding in found])
    table["n"] = table.n.astype(str).where(table.n > 0, "–")
    return Table("claims", table.rename(columns={"tested_on": "tested on"}), ("n",))


def failures(runs: Runs) -> Table:
    """Runs that did not end well, with their error and executed notebook."""
    rows, links = [], []
    for run in runs.frame[runs.frame.status != "ok"].to_dict("records"):
        notebook = min(Path(run["folder"]).glob("*.ipynb"), default=None)
        row = {name: run[name] for name in SHOWN} | {"budget": format_bytes(int(run["budget"]))}
        row |= {"seed": f"{run['seed']:.0f}", "status": run["status"]}
        row["error"] = run["error"] if isinstance(run["error"], str) else "–"
        links.append(str(notebook or ""))
        rows.append(row | {"notebook": visible("/".join(notebook.parts[-2:])) if notebook else "–"})
    return Table("failures", pd.DataFrame(rows), ("seed",), links=tuple(links))


def left_out(runs: Runs) -> Table:
    """Files that are no record that this version can report on."""
    return Table("skipped", pd.DataFrame({"file": runs.skipped.keys(), "why": runs.skipped.values()}))


def pictures(runs: Runs) -> list[tuple[str, str]]:
    """Title and SVG of accuracy against each cost that was measured, by data set and environment."""
    found = []
    for (dataset, environment), part in runs.finished.groupby(["dataset", "environment"]):
        figures = adaptation(without_simulated(part))
        for cost, (column, _, label) in pareto.COSTS.items():
            n = int((figures[column].notna() & figures.test_top1_pct.notna()).sum())
            if n:
                title = f"{dataset}, environment {environment}: accuracy against {label}, n = {n} runs"
                found.append((title, pareto.svg(part, cost)))
    return found


def facts(made: dict[str, Table]) -> list[str]:
    """What a reader in a hurry should know, one sentence each; `made`: the tables by name."""
    found, means = [], made["results"].values
    means = means if means.empty else means.dropna(subset="test_top1_pct_mean")
    for (dataset, environment), group in means.groupby(["dataset", "environment"]) if len(means) else ():
        top = group.loc[group.test_top1_pct_mean.idxmax()]
        half = "" if top.test_top1_pct_n < 2 else f" ± {top.test_top1_pct_half_width:.2f}"
        found.append(
            f"{dataset}, environment {environment}: the highest mean accuracy is "
            f"{top.test_top1_pct_mean:.2f}{half} %, {top.method} on {top.backbone} (n = {top.n})."
        )
    if not made["budget"].text.empty:
        kept = made["budget"].values.groupby("checkpointing", sort=False)[["within", "ok"]].sum()
        shares = (f"{name} {row.within} of {row.ok}" for name, row in kept.iterrows())
        found.append(f"Runs within their budget: {', '.join(shares)}.")
    verdicts = made["claims"].text.verdict.str[2:].value_counts()
    return [*found, f"Published claims: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}."]
