"""The command line: `python -m toolkit`, or `toolkit` where the package is installed.

`run` and `sweep` do experiments in batch, `plan` and `baselines` tell beforehand what they take (without a
GPU and without weights), `report` and `ranking` show the results; `predict`, `export` and `push` use the
model of a finished run.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

import toolkit
from toolkit.errors import InputError, check_name, printable, stop_signals
from toolkit.files import CACHE, DOWNLOADS, RUNS

# What a command needs is imported by the command: torch and pandas take seconds, and `--help` none of them.
if TYPE_CHECKING:
    from toolkit.experiment import Experiment, Parameters


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 all runs finished, 1 some failed, 2 bad input, 130 interrupted (143: not by Ctrl-C)."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with stop_signals():
            _load_plugins(arguments)
            given = _parser(arguments).parse_args(arguments)
            return given.command(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        name = printable(f"{error.filename}: ") if error.filename else ""
        print(f"error: {name}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return getattr(stop, "status", 130)


def _load_plugins(arguments: list[str]) -> None:
    """Import the modules named by `--plugin`, here and in the kernels that this process starts.

    Before the flags are made, since the options of a plugin's methods are among them.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--plugin", action="append", default=[])
    given, arguments[:] = first.parse_known_args(arguments)
    for name in given.plugin:
        path = Path(name).resolve()
        folder = path.parent if name.endswith(".py") else Path.cwd()
        sys.path.insert(0, str(folder))
        for variable, value, separator in (
            ("TOOLKIT_PLUGINS", path.stem if name.endswith(".py") else name, ","),
            ("PYTHONPATH", str(folder), os.pathsep),  # kernels start in another folder
        ):
            os.environ[variable] = separator.join(filter(None, (value, os.environ.get(variable))))


# Flags of experiments by what they are about; all others are about training.
_GROUPS = {
    "data and model": ("dataset", "backbone", "pretrained", "resolution", "head"),
    "method": ("method", "batch_norm", "feature_cache"),
    "memory": ("budget", "checkpointing", "micro_batch_size", "precision"),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help with a line per flag: argparse's `VALUE [VALUE ...]` leaves no room for its meaning."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)
        self._action_max_length = 28  # meanings begin in one column, in all groups

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return (
            f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)
        )


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines: the nearest flag, and where to find the others."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        unknown = [word for word in message.split() if word.startswith("--") and "unrecognized" in message]
        for word in unknown:
            for nearest in difflib.get_close_matches(word.split("=")[0], flags, n=1, cutoff=0.75):
                message += f"; did you mean {nearest}?"
        self.exit(2, f"error: {message}\nsee `{self.prog} --help`\n")

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does; a command reports its unknown flags itself, as it knows its flags."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the flags of the one that `arguments` name."""
    parser = _Parser("toolkit", description=__doc__.split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"toolkit {toolkit.__version__}")
    text = "import this module or file first, which registers own methods, data sets, metrics or backbones"
    parser.add_argument("--plugin", metavar="MODULE", help=text)  # `_load_plugins` has taken it out
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (function, add_flags, text) in COMMANDS.items():
        takes = {"predict": "FOLDER IMAGES ... ", "export": "FOLDER ", "push": "FOLDER REPO "}.get(name, "")
        added = commands.add_parser(
            name, usage=f"toolkit {name} {takes}[flags]", description=f"{text}.", help=text,
            allow_abbrev=False, formatter_class=_Help,
        )  # fmt: skip
        added.set_defaults(command=function)
        if name in arguments[:1]:
            add_flags(added)
    return parser


def _add_run_flags(run: argparse.ArgumentParser) -> None:
    from toolkit.baselines.experiment import BaselineExperiment
    from toolkit.experiment import Experiment

    _add_experiment_flags(run, nargs="+")
    foundation = run.add_argument_group("baselines", "foundation models, evaluated as they are")
    known = Experiment.names()
    _add_flags(foundation, [f for f in fields(BaselineExperiment) if f.name not in known], nargs="+")
    output = _add_runs_flag(run)
    text = "also draw accuracy against memory and time into this folder"
    output.add_argument("--figures", type=Path, metavar="FOLDER", help=text)
    _add_where_flags(run)


def _add_sweep_flags(sweep: argparse.ArgumentParser) -> None:
    from toolkit.batch.sweep_file import presets

    source = sweep.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", type=Path, help="a sweep file, see toolkit/batch/sweep_file.py")
    source.add_argument("--preset", metavar="NAME", help=", ".join(presets()))
    sweep.add_argument("--dry-run", action="store_true", help="list the runs and what they take; start none")
    sweep.add_argument("--yes", action="store_true", help="run more than 1,000 experiments")
    _add_runs_flag(sweep)
    _add_where_flags(sweep)


def _add_plan_flags(plan: argparse.ArgumentParser) -> None:
    _add_experiment_flags(plan)
    text = "to plan for, where no data set is named (default 100)"
    plan.add_argument("--num-classes", type=int, metavar="INT", help=text)
    text = "also draw memory over the planned step, and recomputation at all budgets, into this folder"
    plan.add_argument("--figures", type=Path, metavar="FOLDER", help=text)


def _add_baselines_flags(needs: argparse.ArgumentParser) -> None:
    needs.add_argument("--budget", default="2GB", metavar="SIZE", help="device memory; default: 2GB")


def _add_report_flags(report: argparse.ArgumentParser) -> None:
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html among the runs")
    _add_runs_flag(report)


def _add_ranking_flags(ranking: argparse.ArgumentParser) -> None:
    ranking.add_argument("--output", type=Path, metavar="FILE", help="default: ranking.* among the runs")
    _add_runs_flag(ranking)


def _add_clean_flags(clean: argparse.ArgumentParser) -> None:
    text = "remove what is kept of these kinds: it is made again when it is needed"
    clean.add_argument("--remove", nargs="+", default=[], metavar="KIND", help=text)


def _add_runs_flag(command: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    output = command.add_argument_group("output")
    output.add_argument("--runs", type=Path, default=RUNS, metavar="FOLDER", help=f"default: {RUNS}")
    return output


def _add_where_flags(command: argparse.ArgumentParser) -> None:
    where = command.add_argument_group("where to run")
    text = "experiments at a time on this machine; default: one per GPU, without a GPU one"
    where.add_argument("--workers", type=int, metavar="COUNT", help=text)
    text = "run on the workers of this dask scheduler"
    where.add_argument("--scheduler", default="", metavar="ADDRESS", help=text)
    text = "also copy finished runs to this tracker: tensorboard | trackio | mlflow | wandb"
    where.add_argument("--track", default="", metavar="NAME", help=text)
    text = "run again what ended so, as when another process held the memory: oom"
    where.add_argument("--retry", nargs="+", choices=("oom",), default=(), metavar="STATUS", help=text)


def _add_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", type=Path, metavar="FOLDER", help="`model` in the folder of a run")


def _add_predict_flags(predict: argparse.ArgumentParser) -> None:
    _add_folder(predict)
    predict.add_argument("pictures", nargs="+", metavar="IMAGES", help="files, or folders of pictures")
    predict.add_argument("--csv", action="store_true", help="comma-separated values instead of a table")


def _add_export_flags(export: argparse.ArgumentParser) -> None:
    _add_folder(export)
    export.add_argument("--format", default="onnx", help="onnx | torch-export; default: onnx")


def _add_push_flags(push: argparse.ArgumentParser) -> None:
    _add_folder(push)
    push.add_argument("repository", metavar="REPO", help="such as NAME/flowers; private if it is new")


def _add_experiment_flags(command: argparse.ArgumentParser, **settings: object) -> None:
    """A flag for each field of `Experiment`, and for each option of a method or strategy, which the epilog
    explains: one name may be an option of several, with a meaning in each."""
    from toolkit.budget import STRATEGIES
    from toolkit.experiment import Experiment, option_fields
    from toolkit.methods import METHODS

    named = {name for names in _GROUPS.values() for name in names}
    own = {field.name: field for field in fields(Experiment) if field.name != "options"}
    for title, names in (_GROUPS | {"training": [name for name in own if name not in named]}).items():
        _add_flags(command.add_argument_group(title), [own[name] for name in names], **settings)
    for declared in option_fields().values():
        _add_flag(command, next(iter(declared.values())), argparse.SUPPRESS, **settings)

    explained = []
    for flag, kinds in (
        ("method", {n: m.options for n, m in METHODS.items()}),
        ("checkpointing", STRATEGIES),
    ):
        for kind in dict.fromkeys(kinds.values()):
            owners = ", ".join(name for name, other in kinds.items() if other is kind)
            section = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS, formatter_class=_Help)
            group = section.add_argument_group(f"options of --{flag} {owners}")
            _add_flags(group, fields(kind), **settings)
            explained.append(section.format_help())
    command.epilog = "\n".join(filter(None, explained))


def _add_flags(group: argparse._ActionsContainer, parameters: Iterable[Field], **settings: object) -> None:
    for field in parameters:
        _add_flag(group, field, _meaning(field).replace("%", "%%"), **settings)


def _add_flag(group: argparse._ActionsContainer, field: Field, text: str, **settings: object) -> None:
    convert = {"int": int, "float": float, "bool": _to_bool}.get(field.type, str)
    shown = {"int": "INT", "float": "NUMBER", "bool": "BOOL", "Size": "SIZE"}.get(field.type, "NAME")
    group.add_argument(
        f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, metavar=shown, type=convert,
        help=text, **settings,
    )  # fmt: skip


def _meaning(field: Field) -> str:
    """One line about a field: its text, its choices and its default."""
    choices = " | ".join(field.metadata.get("choices", ()))
    text = ", ".join(filter(None, (field.metadata.get("help"), choices)))
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    return text if default == "" else f"{text} (default {default})"


def _to_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _parameters(given: argparse.Namespace, kind: type[Parameters]) -> dict:
    """The flags given of this kind of experiment; raises `InputError` for those of the other kind."""
    from toolkit.baselines.experiment import BaselineExperiment
    from toolkit.experiment import Experiment

    tuned = Experiment.flat_types()
    both = {*tuned, *BaselineExperiment.names()}
    values = {name: value for name, value in vars(given).items() if name in both}
    for name in values:
        flag = f"--{name.replace('_', '-')}"
        if kind is Experiment and name not in tuned:
            raise InputError(f"{flag} needs --baseline; see `python -m toolkit run --help`.")
        if kind is BaselineExperiment and name not in kind.names():
            raise InputError(f"{flag} is not for baselines; see `python -m toolkit run --help`.")
    return values


def _run(given: argparse.Namespace) -> int:
    from toolkit.baselines.experiment import BaselineExperiment
    from toolkit.batch.sweep import DEFAULT_COMPARISON, grid
    from toolkit.experiment import Experiment

    kind = BaselineExperiment if hasattr(given, "baseline") else Experiment
    values = _parameters(given, kind)
    return _finish(grid(kind, **(values or DEFAULT_COMPARISON)), given, given.figures)


def _sweep(given: argparse.Namespace) -> int:
    import pandas as pd

    from toolkit.batch.dry_run import dry_run, summary
    from toolkit.batch.sweep_file import check_count, preset, read_sweep
    from toolkit.budget import format_bytes

    experiments = preset(given.preset) if given.preset else read_sweep(given.file)
    if given.dry_run:
        table = dry_run(experiments, given.runs.resolve())
        shown = pd.DataFrame(
            {
                "run": table["name"],
                "finished": table.finished.map({True: "yes", False: ""}),
                "predicted peak": table.predicted_peak_bytes.astype(object).map(
                    format_bytes, na_action="ignore"
                ),
                "in budget": table.within_budget,
                "seconds": table.seconds.astype(object).map("{:.0f}".format, na_action="ignore"),
                "estimate from": table.estimate_from,
            }
        )
        print(shown.to_string(index=False, na_rep="–"), summary(table), sep="\n")
        return 0
    check_count(experiments, yes=given.yes)
    return _finish(experiments, given)


def _finish(experiments: list[Parameters], given: argparse.Namespace, figures: Path | None = None) -> int:
    """Run, compare and report; `figures`: a folder for the figures of these experiments, if any."""
    from toolkit.analysis import compare, plain_table
    from toolkit.batch.report import write_report
    from toolkit.batch.sweep import run_experiments
    from toolkit.training.record import load_records

    runs = given.runs.resolve()
    how = {name: getattr(given, name) for name in ("workers", "scheduler", "retry", "track")}
    failed = run_experiments(experiments, runs, **how)
    ids = [experiment.id for experiment in experiments]
    records = load_records(runs)
    records = records[records.experiment_id.isin(ids)]
    print(plain_table(compare(records)))
    figures = figures.resolve() if figures and (records.status == "ok").any() else None
    print(f"report   {write_report(runs, runs / 'report.html', figures, ids)}")
    if figures:
        print(f"figures  {figures}")
    print(f"records  {runs}/*/record.json, each next to the executed notebook of its run")
    if failed:
        print(f"{len(failed)} of {len(experiments)} runs failed; the same command tries them again")
    return 1 if failed else 0


def _plan(given: argparse.Namespace) -> int:
    from toolkit.batch.sweep import grid
    from toolkit.experiment import Experiment
    from toolkit.forecast.forecasts import FORECASTS, TrainingStep

    values = _parameters(given, Experiment)
    (experiment,) = grid(**{name: [value] for name, value in values.items()})
    step = TrainingStep(experiment, _classes(given))
    if experiment.strategy.plans:
        with phases("building the model", "running a step on fakes", "choosing what to keep") as begin:
            begin()
            step.step  # noqa: B018
            begin()
            step.chain(experiment.batch_size)
            begin()
            plan = step.planner.plan(
                experiment.budget_bytes, micro_batches=experiment.micro_batch_size or True
            )
        print(plan.explain())
        if given.figures:
            _draw_plans(experiment, step.num_classes, given.figures)
        return 0
    if given.figures:
        raise InputError(f"--figures draws plans, and checkpointing {experiment.checkpointing!r} has none.")
    with phases("running a step on fakes") as begin:
        begin()
        found = step.forecast(experiment, FORECASTS)
    if found.peak_bytes is None:
        raise InputError(found.reason)
    print(found.explain())
    return 0


def _classes(given: argparse.Namespace) -> int:
    """The number of classes to plan for: of the data set, if one is named."""
    from toolkit.datasets import find_dataset, load_dataset

    if not hasattr(given, "dataset"):
        return 100 if given.num_classes is None else given.num_classes
    if given.num_classes is not None:
        raise InputError(
            "--num-classes is for plans without data; --dataset counts its classes: leave one out."
        )
    return find_dataset(given.dataset).classes or len(load_dataset(given.dataset).classes)


@contextlib.contextmanager
def phases(*names: str, after: float = 2) -> Iterator[Callable[[], None]]:
    """A bar in a terminal, `after` these seconds; the function that it yields begins the next phase."""
    todo, ended = enumerate(names), threading.Event()
    bar_format = "{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    # disable=None: no bar where it cannot move
    with tqdm(total=len(names), leave=False, delay=after, disable=None, bar_format=bar_format) as bar:

        def begin() -> None:
            bar.n, name = next(todo)
            bar.set_description_str(name, refresh=False)

        def tick() -> None:
            pause = after
            while not ended.wait(pause):
                bar.refresh()
                pause = 0.5

        ticking = threading.Thread(target=tick, daemon=True)
        if not bar.disable:
            ticking.start()
        try:
            yield begin
        finally:
            ended.set()
            if ticking.is_alive():
                ticking.join()


def _draw_plans(experiment: Experiment, num_classes: int, folder: Path) -> None:
    """Draw the planned step in front of the same step without recomputation, and all budgets."""
    from toolkit import plots
    from toolkit.forecast.explorer import Explorer

    explorer, budget = Explorer(experiment, num_classes), experiment.budget_bytes
    for name, figure in (
        ("memory_over_step", plots.step_figure(explorer.picture(budget))),
        ("recomputation_vs_budget", plots.recompute_against_budget(explorer.curve(budget))),
    ):
        print(f"figure   {plots.save(figure, name, folder)}")


def _baselines(given: argparse.Namespace) -> int:
    from toolkit.baselines.memory_estimate import estimate_table

    print(estimate_table(given.budget).round(2).to_string(index=False))
    return 0


def _predict(given: argparse.Namespace) -> int:
    from toolkit.model.saved import load_model

    table = load_model(given.folder).predict(given.pictures)
    if given.csv:
        print(table.to_csv(index=False), end="")
    else:
        shown = table.dropna(axis="columns", how="all")
        print(shown.to_string(index=False, na_rep="–", float_format="{:.3f}".format))
    return 0


def _export(given: argparse.Namespace) -> int:
    from toolkit.model.export import export_model

    print(export_model(given.folder, given.format))
    return 0


def _push(given: argparse.Namespace) -> int:
    from toolkit.model.export import push_model

    print(push_model(given.folder, given.repository))
    return 0


def _report(given: argparse.Namespace) -> int:
    from toolkit.batch.report import write_report

    runs = given.runs.resolve()
    if not runs.exists():
        raise InputError(f"{runs} does not exist; give the folder in which runs are kept, see --runs.")
    print(write_report(runs, (given.output or runs / "report.html").resolve()))
    return 0


def _clean(given: argparse.Namespace) -> int:
    from toolkit.budget import format_bytes
    from toolkit.cache import MOST_BYTES, entries, trim

    folders = [path for path in sorted(CACHE.glob("*")) if path.is_dir() and path != DOWNLOADS]
    kinds = {path.name: path for path in folders}
    for kind in given.remove:
        freed = trim(kinds[check_name("kind of entry", kind, kinds)], most_bytes=0)
        print(f"{kind}: {format_bytes(freed)} removed")
    print(f"{CACHE}, at most {format_bytes(MOST_BYTES)} of each kind:")
    for kind, path in kinds.items():
        found = entries(path)
        print(f"  {kind}: {len(found):,} entries, {format_bytes(sum(size for _, size in found.values()))}")
    return 0


def _ranking(given: argparse.Namespace) -> int:
    from toolkit.analysis import as_text, plain_table, ranking_table, write_ranking

    runs = given.runs.resolve()
    table = write_ranking(runs, (given.output or runs / "ranking.md").resolve())
    print(plain_table(as_text(ranking_table(table))))
    return 0


COMMANDS = {
    "run": (_run, _add_run_flags, "run all combinations of the values given, or the default comparison"),
    "sweep": (_sweep, _add_sweep_flags, "run the experiments of a sweep file or preset"),
    "plan": (_plan, _add_plan_flags, "show what one training step takes, and how it fits the budget"),
    "baselines": (_baselines, _add_baselines_flags, "show what evaluating each foundation model takes"),
    "predict": (_predict, _add_predict_flags, "name the classes of pictures by a saved model"),
    "export": (_export, _add_export_flags, "write a saved model as one file for other programs"),
    "push": (_push, _add_push_flags, "copy a saved model to the Hugging Face hub"),
    "report": (_report, _add_report_flags, "write one HTML file about all runs, and its tables"),
    "ranking": (_ranking, _add_ranking_flags, "rank finished runs by accuracy, as CSV, Markdown and LaTeX"),
    "clean": (_clean, _add_clean_flags, "show what the cache on disk holds, or remove it"),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
