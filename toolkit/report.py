"""One self-contained page of what finished runs say: tables, figures, tests, and published claims.

`write_report` reads the records below a folder and writes an HTML file that loads nothing and runs nothing,
with every table beside it as CSV, LaTeX and Markdown.  Each section is a function here, which
`notebooks/report.ipynb` calls one by one.  The same records give the same bytes.

Names, errors and paths are other people's text: control characters are written out (`visible`), and each
format escapes the rest.
"""

from __future__ import annotations

import html
import json
import os
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as short
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup

from toolkit import pareto
from toolkit.budget import format_bytes
from toolkit.claims import QUANTITIES, change, differences, findings, holm, interval
from toolkit.errors import InputError
from toolkit.files import write_atomically
from toolkit.records import FILE_NAME, FINISHED, SCHEMA_VERSION, load_records
from toolkit.statistics import (
    DATA,
    PARAMETERS,
    SHOWN,
    _groups,
    _without_simulated,
    adaptation,
    mean_and_interval,
    standing,
)

TEXT = ("experiment_id", "status", "phase", "dataset", "backbone", "method", "checkpointing", "budget")
# What a column holds numbers of is in its name; null where it was not measured.
NUMBER = re.compile(r"seed|threads|n_\w+|params_\w+|ns|ns_\w+|\w+_(bytes|seconds|pct|joules|watts|blocks)")
ALWAYS = (  # columns that the tables use, whether or not a record has them
    *TEXT, *PARAMETERS, *DATA, "seed", "folder", "error", "env_hash", "memory_source", "energy_source",
    "budget_mode", "code_sha256", "device_name", "driver", "python", "threads", "version_torch",
    "version_timm", "version_peft", "n_classes", "n_train", "n_val", "n_test", "n_broken", "test_top1_pct",
    "train_peak_bytes", "predicted_peak_bytes", "within_budget", "checkpointed_blocks", "params_trainable",
)  # fmt: skip
COLUMNS = {  # of the table of results: column of `adaptation`, its unit in units of the column, digits
    "accuracy (%)": ("test_top1_pct", 1, 2),
    "peak memory (MiB)": ("peak_bytes", 2**20, 2),
    "time (s)": ("adapt_seconds", 1, 1),
    "energy (J)": ("adapt_joules", 1, 0),
}
FIELDS = {  # under which names records say why one is missing; of training, of a baseline
    "peak_bytes": ("train_peak_bytes", "prepare_peak_bytes"),
    "adapt_seconds": ("train_seconds", "prepare_seconds"),
    "adapt_joules": ("train_energy_joules", "prepare_joules"),
}
REFERENCES = {"method": {"method": "full"}, "checkpointing": {"checkpointing": "none"}}
FORMULA = tuple("=+-@＝＋－＠")  # what spreadsheets take for the beginning of one
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@dataclass(frozen=True)
class Table:
    """A table for people, and the same with plain numbers for programs."""

    name: str  # of its files
    text: pd.DataFrame
    numbers: tuple[str, ...] = ()  # columns of `text` that are set flush right
    values: pd.DataFrame | None = None  # for the CSV; None: `text`
    notes: tuple[str, ...] = ()  # what [a], [b], ... in cells mean
    links: tuple[str, ...] = ()  # file that the last column of each row leads to; empty: none

    @property
    def lines(self) -> list[str]:
        """The notes with their letters."""
        return [f"{_letter(number)} {note}" for number, note in enumerate(self.notes)]

    def csv(self) -> str:
        """RFC 4180; text that a spreadsheet would take for a formula has an apostrophe before it."""
        frame = self.text if self.values is None else self.values
        return frame.map(_no_formula).rename(columns=_no_formula).to_csv(index=False, lineterminator="\r\n")

    def latex(self) -> str:
        """A `tabular` in the style of booktabs, notes as comments below."""
        layout = "".join("r" if column in self.numbers else "l" for column in self.text)
        table = self.text.to_latex(index=False, escape=True, column_format=layout)
        # After the end of a row, a bracket or star would be its argument.
        return re.sub(r"^(?=[\[*])", "{}", table, flags=re.M) + "".join(f"% {line}\n" for line in self.lines)

    def markdown(self) -> str:
        """A pipe table, notes below."""
        rule = ["--:" if column in self.numbers else "---" for column in self.text]
        rows = [[_markdown(cell) for cell in row] for row in (self.text.columns, *self.text.to_numpy())]
        lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
        return "\n".join([*lines, *(f"\n{_markdown(line)}" for line in self.lines), ""])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self.lines)
        return self.text.to_html(index=False, border=0) + notes


def _letter(number: int) -> str:
    return f"[{'abcdefghijklmnopqrstuvwxyz'[number % 26]}{number // 26 or ''}]"


def _no_formula(value: object) -> object:
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    return value if re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value) else f"'{value}"


def _markdown(text: str) -> str:
    """Escaped, but for the points and signs of numbers."""
    text = re.sub(r"([\\`*_{}\[\]()#|!~$:@^=])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"(?<!\d)[.+-]", r"\\\g<0>", text)


def visible(text: str) -> str:
    """`text` on one line: control characters, direction marks and lone surrogates as Python writes them."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Runs:
    """What lies below a folder."""

    folder: Path
    frame: pd.DataFrame  # as `load_records`, with `environment`: finished runs of one may be compared
    skipped: dict[str, str]  # file, relative to the folder -> why it was left out

    @property
    def finished(self) -> pd.DataFrame:
        """Runs that ended with a result, out of memory and not-a-number among them."""
        return self.frame[self.frame.status.isin(FINISHED)]


def read_runs(folder: Path) -> Runs:
    """The records below `folder`; what is none, or none of this version, is named under `skipped`.

    Raises `InputError` if `folder` is a file.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder in which runs are kept.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = load_records(folder)
    parts = (str(warning.message).partition(" is no record and was left out: ") for warning in caught)
    skipped = {path: f"no record: {why}" for path, _, why in parts}
    seen, kept = {}, []
    for row in frame.to_dict("records"):
        why = _why_not(row)
        same = tuple(str(row.get(name)) for name in ("experiment_id", "env_hash", "train_sha256"))
        if why is None and (first := seen.setdefault(same, row["folder"])) != row["folder"]:
            why = f"a second record of the experiment in {Path(first).name}"
        kept.append(why is None)
        if why:
            skipped[str(Path(row["folder"], FILE_NAME))] = why
    frame = frame[kept].reset_index(drop=True)
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *ALWAYS])))
    for name in frame:
        if NUMBER.fullmatch(name):
            frame[name] = pd.to_numeric(frame[name])
        elif name != "folder":
            frame[name] = frame[name].map(lambda value: visible(value) if isinstance(value, str) else value)
    if len(frame):  # methods and strategies in their order
        frame = pd.concat([group for _, group in _groups(frame)], ignore_index=True)
    frame["environment"] = _environments(frame)
    named = {visible(os.path.relpath(path, folder)): visible(why) for path, why in skipped.items()}
    return Runs(folder, frame, dict(sorted(named.items())))


def _why_not(row: dict) -> str | None:
    """Why a record cannot be reported on, None if it can."""
    version = row.get("schema_version")
    if version != SCHEMA_VERSION:
        return f"schema version {short(version)}; this report reads version {SCHEMA_VERSION}"
    for name in TEXT:
        if not isinstance(row.get(name), str):
            return f"{name} is {short(row.get(name))}, not text"
    if not (row["budget"].isascii() and row["budget"].isdigit()):
        return f"budget is {short(row['budget'])}, not a number of bytes"
    for name, value in row.items():
        missing = value is None or value != value  # NaN
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if isinstance(value, (list, dict)) or (NUMBER.fullmatch(name) and not (missing or number)):
            return f"{name} is {short(value)}, not one {'number' if NUMBER.fullmatch(name) else 'value'}"
        if name == "seed" and missing:
            return "it has no seed"
    return None


def _environments(frame: pd.DataFrame) -> pd.Series:
    """E1, E2, ... by number of finished runs: equal for runs that may be averaged, "–" for the unfinished.

    A run that could not measure goes with those of its environment that could.
    """
    kind = frame.env_hash.astype(str)
    for name in ("memory_source", "energy_source"):
        known = frame[name].where(frame[name] != "none")
        kind = kind + "|" + known.fillna(known.groupby(kind).transform("first")).fillna("").astype(str)
    counts = kind[frame.status.isin(FINISHED)].value_counts()
    order = sorted(counts.index, key=lambda name: (-counts[name], name))
    labels = kind.map({name: f"E{number}" for number, name in enumerate(order, start=1)})
    return labels.where(frame.status.isin(FINISHED), "–")


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
    for environment, part in runs.finished.groupby("environment"):
        for key, group in _groups(part):
            names = dict.fromkeys([*SHOWN, "budget", *key])
            key = {name: str(group[name].iloc[0]) for name in names} | {"environment": environment}
            ok = group[group.status == "ok"]
            ended = ", ".join(f"{count} {status}" for status, count in group.status.value_counts().items())
            row = key | {"budget": format_bytes(int(key["budget"])), "n": str(len(ok))}
            numbers = key | {"n": len(ok), "ended": ended}
            figures = adaptation(_without_simulated(ok))
            for title, (column, unit, digits) in COLUMNS.items():
                mean, half, n = mean_and_interval(pd.to_numeric(figures[column]))
                numbers |= {f"{column}_mean": mean, f"{column}_half_width": half, f"{column}_n": n}
                if n == 0:
                    why = _why_missing(group, column)
                    row[title] = f"– {_letter(notes.setdefault(why, len(notes)))}"
                    continue
                row[title] = f"{mean / unit:,.{digits}f}"
                row[title] += "" if half is None else f" ± {half / unit:,.{digits}f}"
                row[title] += f" (n = {n})" if n < len(ok) else ""
            text.append(row | {"ended": ended})
            values.append(numbers)
    table = _without_idle(pd.DataFrame(text))
    return Table("results", table, ("n", *COLUMNS), pd.DataFrame(values), tuple(notes))


def _why_missing(group: pd.DataFrame, column: str) -> str:
    """Why no run of a group has a figure, as their records say."""
    ok = group[group.status == "ok"]
    if ok.empty:
        return "no run ended ok"
    if column == "adapt_joules" and (ok.energy_source == "fake").any():
        return "simulated GPU: its joules are no measurement"
    reasons = {}
    for run in ok.itertuples():
        missing = json.loads(Path(run.folder, FILE_NAME).read_text()).get("missing")
        name = FIELDS.get(column, (column, column))[run.phase == "inference"]
        why = missing.get(name) if isinstance(missing, dict) else None
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
    """Published claims, our figures, and a verdict on each."""
    table = pd.DataFrame([asdict(finding) for finding in findings(runs.frame)])
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
        figures = adaptation(_without_simulated(part))
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


def write_report(runs: Path, output: Path) -> Path:
    """Write the report on the records below `runs` to the file `output`, its tables to `<stem>_tables/`.

    A folder without records makes a report that says so.  Raises `InputError` if `runs` is a file or
    `output` a folder.
    """
    output = Path(output).resolve()
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the file to write, such as {output / 'report.html'}.")
    read = read_runs(runs)
    made = [what_ran(read), environments(read), data_sets(read), results(read), budgets(read), claims(read)]
    made += [scores(read, phase) for phase in ("training", "inference")]
    made += [effects(read, of) for of in REFERENCES] + [failures(read), left_out(read)]
    made = {table.name: table for table in made}
    folder = output.with_name(f"{output.stem}_tables")

    def href(path: str | Path) -> str:
        return quote(os.fsencode(os.path.relpath(path, output.parent)))

    page = _PAGES.get_template("report.html.jinja").render(
        runs=read, tables=made, statuses=read.frame.status.value_counts(), facts=facts(made), href=href,
        folder=folder, pictures=[(title, Markup(svg)) for title, svg in pictures(read)], letter=_letter,
    )  # fmt: skip
    for table in made.values():
        for ending, text in (("csv", table.csv()), ("tex", table.latex()), ("md", table.markdown())):
            write_atomically(folder / f"{table.name}.{ending}", text.encode())
    write_atomically(output, page.encode())
    return output


_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("toolkit"), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
