"""`run`, `sweep`: experiments in batch; `report`, `ranking`: what came out; `plan`, `baselines`: their cost.

Each flag is a parameter of `Experiment`, or with `--baseline` of `BaselineExperiment`.  `run` without flags
runs the default comparison on the embedded data; its flags take one value or several, and their product is
run.  `plan` and `baselines` need no GPU and no weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import Field, fields
from pathlib import Path

import pandas as pd

from toolkit.analysis import as_text, compare, ranking_table, write_ranking
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.memory_estimate import estimate_table
from toolkit.batch.dry_run import dry_run, summary
from toolkit.batch.report import write_report
from toolkit.batch.sweep import DEFAULT_COMPARISON, grid, run_experiments
from toolkit.batch.sweep_file import check_count, preset, read_sweep
from toolkit.budget import format_bytes
from toolkit.errors import InputError
from toolkit.experiment import Experiment, Parameters, option_fields
from toolkit.files import FIGURES, RUNS
from toolkit.forecast.forecasts import forecast
from toolkit.training.record import load_records


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all runs finished, 1 some failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m toolkit", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        help="run experiments and compare them",
        description=__doc__.split("\n\n")[1],
        allow_abbrev=False,
    )
    sweep = commands.add_parser(
        "sweep", help="run what a sweep file names and compare it", allow_abbrev=False
    )
    source = sweep.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="a sweep file, see toolkit/batch/sweep_file.py")
    source.add_argument("--preset", metavar="NAME", help="demo, edge, edge_paper or paper")
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and start none")
    sweep.add_argument("--yes", action="store_true", help="run more than 1,000 experiments")
    run.add_argument(
        "--figures",
        type=Path,
        metavar="FOLDER",
        help=f"default: {FIGURES} for the default comparison, else the folder of the runs",
    )
    report = commands.add_parser("report", help="write one HTML file about all runs, and its tables")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html among the runs")
    ranking = commands.add_parser("ranking", help="all finished runs by accuracy, as CSV, Markdown and LaTeX")
    ranking.add_argument("--output", type=Path, metavar="FILE", help="default: ranking.* among the runs")
    for command in (run, sweep, report, ranking):
        command.add_argument(
            "--runs", type=Path, default=RUNS, metavar="FOLDER", help=f"where runs are kept ({RUNS})"
        )
    for command in (run, sweep):
        command.add_argument(
            "--workers",
            type=int,
            metavar="COUNT",
            help="experiments at a time on this machine (default: one per GPU; on the CPU one)",
        )
        command.add_argument(
            "--scheduler", default="", metavar="ADDRESS", help="run on the workers of this dask scheduler"
        )
    plan = commands.add_parser(
        "plan",
        help="what one experiment's training takes, and how it fits the budget",
        description=__doc__.split("\n\n")[1],
        allow_abbrev=False,
    )
    plan.add_argument("--num-classes", type=int, default=100, metavar="VALUE", help="default: 100")
    needs = commands.add_parser(
        "baselines", help="what evaluating each foundation model takes, and whether it fits a budget"
    )
    needs.add_argument("--budget", default="2GB", metavar="VALUE", help="default: 2GB")
    own = [field for field in fields(Experiment) if field.name != "options"]
    both = {field.name: field for field in (*fields(BaselineExperiment), *own)}
    _add_parameters(run, both.values(), nargs="+")
    _add_parameters(plan, own)
    _add_options(run, nargs="+")
    _add_options(plan)
    options = vars(parser.parse_args(arguments))
    values = {name: options[name] for name in (*both, *option_fields()) if name in options}
    try:
        if options["command"] == "baselines":
            print(estimate_table(options["budget"]).round(2).to_string(index=False))
            return 0
        if options["command"] == "plan":
            given = {name: values.pop(name) for name in option_fields() if name in values}
            print(_plan(Experiment(**values, options=given), options["num_classes"]))
            return 0
        runs = options["runs"].resolve()
        if options["command"] == "sweep":
            experiments = preset(options["preset"]) if options["preset"] else read_sweep(options["file"])
            if options["dry_run"]:
                print(_dry_run(experiments, runs))
                return 0
            check_count(experiments, yes=options["yes"])
            return _run(experiments, runs, runs, options)
        if options["command"] == "report":
            print(write_report(runs, (options["output"] or runs / "report.html").resolve()))
            return 0
        if options["command"] == "ranking":
            table = write_ranking(runs, (options["output"] or runs / "ranking.md").resolve())
            print(as_text(ranking_table(table)).to_string(index=False))
            return 0
        figures = options["figures"] or (runs if values else FIGURES)
        kind = BaselineExperiment if "baseline" in values else Experiment
        for name in values:
            if name not in kind.flat_types():
                flag = f"--{name.replace('_', '-')}"
                needs = "needs --baseline" if kind is Experiment else "is not for baselines"
                raise InputError(f"{flag} {needs}; see `python -m toolkit run --help`.")
        return _run(grid(kind, **(values or DEFAULT_COMPARISON)), runs, figures.resolve(), options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _add_parameters(command: argparse.ArgumentParser, parameters: Iterable[Field], **options: object) -> None:
    """A flag for each of these fields of a dataclass."""
    for field in parameters:
        command.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="VALUE",
            type=_TYPES[field.type], help=f"default: {field.default!r}", **options,
        )  # fmt: skip


def _add_options(command: argparse.ArgumentParser, **more: object) -> None:
    """A flag for each option of a method or a strategy."""
    for name, owners in option_fields().items():
        helps: dict[str, list[str]] = {}  # what the option means, and who means it
        for owner, field in owners.items():
            helps.setdefault(f"{field.metadata['help']} (default: {field.default!r})", []).append(owner)
        command.add_argument(
            f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="VALUE",
            type=_TYPES[next(iter(owners.values())).type],
            help="; ".join(f"{', '.join(who)}: {text}" for text, who in helps.items()).replace("%", "%%"),
            **more,
        )  # fmt: skip


def _plan(experiment: Experiment, num_classes: int) -> str:
    """What an experiment's training step takes; under `planned`, the plan as a table."""
    if not experiment.strategy.plans:
        found = forecast(experiment, num_classes)
        if found.peak_bytes is None:
            raise InputError(found.reason)
        return (
            f"strategy {experiment.checkpointing}, {found.micro_batch_size} images per pass\n"
            f"predicted peak {format_bytes(found.peak_bytes)} of {format_bytes(found.budget_bytes)}: "
            f"{'fits' if found.fits else 'DOES NOT FIT'}\n"
            f"recomputed {found.recompute_pct:.1f} % of the forward pass"
        )
    from toolkit.budget import plan
    from toolkit.forecast.steps import step_of
    from toolkit.training.loop import held_bytes

    step = step_of(experiment, num_classes)
    return plan(
        step.model, experiment.budget, step.batch, precision=experiment.precision, loss=step.loss,
        micro_batches=experiment.micro_batch_size or True,
        held_bytes=held_bytes(step.model, step.hooks, plans=True),
        optimizer=step.optimizer,
    ).explain()  # fmt: skip


def _dry_run(experiments: list[Parameters], runs: Path) -> str:
    """What a sweep would do, a line a run, and in sum."""
    table = dry_run(experiments, runs)
    shown = pd.DataFrame(
        {
            "run": table["name"],
            "finished": table.finished.map({True: "yes", False: ""}),
            "predicted peak": table.predicted_peak_bytes.map(format_bytes, na_action="ignore").fillna("–"),
            "in budget": table.within_budget,
            "seconds": table.seconds.map("{:.0f}".format, na_action="ignore").fillna("–"),
            "estimate from": table.estimate_from,
        }
    )
    return f"{shown.to_string(index=False)}\n{summary(table)}"


def _run(experiments: list[Parameters], runs: Path, figures: Path | None, options: dict) -> int:
    """Run, compare and report; `figures`: a folder for the pictures of these experiments."""
    failed = run_experiments(experiments, runs, workers=options["workers"], scheduler=options["scheduler"])
    ids = [experiment.id for experiment in experiments]
    records = load_records(runs)
    records = records[records.experiment_id.isin(ids)]
    print(compare(records).to_string(index=False))
    if not (records.status == "ok").any():
        figures = None
    print(f"report   {write_report(runs, runs / 'report.html', figures, ids)}")
    if figures:
        print(f"figures  {figures}")
    print(f"records  {runs}/*/record.json, with the executed notebook of each run beside it")
    if failed:
        print(f"{len(failed)} of {len(experiments)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _to_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


_TYPES = {"str": str, "int": int, "float": float, "bool": _to_bool, "Size": str}


if __name__ == "__main__":
    sys.exit(main())
