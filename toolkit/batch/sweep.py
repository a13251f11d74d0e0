"""Many experiments in batch: one papermill execution, one kernel and one record each.

The record decides what is finished, never the notebook: papermill marks the cells of a killed kernel
as completed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import filelock
import papermill
import torch
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from toolkit.backbones import data_config
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.memory_estimate import form_and_batch
from toolkit.baselines.prompts import class_names
from toolkit.batch import cluster
from toolkit.batch.kernels import passing_on_signals, stop_all
from toolkit.budget import find_blocks
from toolkit.datasets import Splits, load_dataset
from toolkit.errors import InputError, Stopped, check_name, one_line, stop_signals
from toolkit.experiment import Experiment, Parameters, option_fields
from toolkit.files import NOTEBOOKS, RUNS
from toolkit.methods import adapt, check_batch_norms
from toolkit.model import build_model, check_fits_weights
from toolkit.training import progress
from toolkit.training.feature_cache import checked_size
from toolkit.training.loop import batch_sizes
from toolkit.training.record import RunRecord, finished_folder, run_folder, status_of

# What becomes of the lines about epochs that a kernel prints; on this machine they go to the progress bar.
SHOW_EPOCH: ContextVar[Callable[[str], None]] = ContextVar("show_epoch", default=lambda line: None)
ATTEMPTS = 2
TRANSIENT = (RuntimeError, TimeoutError)  # of jupyter_client and nbclient: a kernel died, or did not start

# What `python -m toolkit run` compares: small enough for two CPU cores and a few minutes.
DEFAULT_COMPARISON = {
    "method": ["lora", "full"],
    "checkpointing": ["none", "static", "threshold", "planned"],
    "budget": ["18 MiB"],
}


def grid(kind: type[Parameters] = Experiment, **values: Iterable) -> list[Parameters]:
    """The experiments (of class `kind`) of all combinations, the last value varying fastest.

    `values`: lists of parameters and of options of methods and strategies.  Each experiment takes the options
    that its own method and strategy have; what becomes equal is one experiment.  Raises `InputError` for an
    option that none of them has.
    """
    experiments = product(kind, **values)
    check_options(values, experiments)
    return experiments


def product(kind: type[Parameters], **values: Iterable) -> list[Parameters]:
    """`grid` without its checks."""
    combinations = itertools.product(*values.values())
    return list(dict.fromkeys(kind.flat(**dict(zip(values, each))) for each in combinations))


def check_options(names: Iterable[str], experiments: Iterable[Parameters]) -> None:
    """Raise `InputError` if one of `names` is an option that no experiment has."""
    used = set().union(*(e.flat_dict() for e in experiments))
    for name in sorted(set(names) - used):
        owners = ", ".join(option_fields()[name])
        raise InputError(f"{name} is an option of {owners}; choose one of these, or leave it out.")


def check_runnable(experiments: Iterable[Parameters], runs: Path = RUNS) -> dict[str, Splits]:
    """Check before any long work that the data exist, models can be adapted, and weights fit their budgets.

    Makes the folder `runs`.  Returns the data sets by name.  Raises `InputError`.
    """
    data: dict[str, Splits] = {}
    alike = defaultdict(list)  # experiments that share an adapted model
    for e in experiments:
        if isinstance(e, BaselineExperiment):
            form_and_batch(e)  # before its data are loaded
        if e.dataset not in data:
            data[e.dataset] = load_dataset(e.dataset)
        if isinstance(e, BaselineExperiment):
            form_and_batch(e, class_names(data[e.dataset]))
        else:
            options = tuple(sorted(e.method_options.items()))
            alike[e.dataset, e.head, e.backbone, e.pretrained, e.resolution, e.method, options].append(e)
    for group in alike.values():
        splits = data[group[0].dataset]
        model = build_model(group[0], len(splits.classes))
        model = adapt(model, group[0].method, **group[0].method_options)
        if any(e.checkpointing != "none" for e in group):
            find_blocks(model)
        for e in group:
            check_fits_weights(model, e.budget_bytes)
            check_batch_norms(model, batch_sizes(e, len(splits.train)), data_config(model)["input_size"])
            if e.feature_cache:
                checked_size(model, splits, e.feature_cache, e.precision)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise InputError(f"runs cannot be kept in {runs} ({error.strerror}); name another folder.") from None
    return data


@dataclass(frozen=True)
class Outcome:
    """The end of an experiment: `error` is None if it has a finished record; `busy`: it runs elsewhere."""

    error: str | None = None
    busy: bool = False
    signal: int | None = None  # that stopped it


def run_experiments(
    experiments: list[Parameters],
    runs: Path = RUNS,
    *,
    workers: int | None = None,
    scheduler: str = "",
    retry: Sequence[str] = (),
    track: str = "",
) -> list[Parameters]:
    """Run what has no finished record under `runs`, with one progress bar; return what failed.

    `workers`: experiments at a time on this machine (default: one per GPU; on the CPU one, so that a run that
    is timed has the machine to itself).  `scheduler`: the address of a dask scheduler, whose workers are used
    instead.  `retry`: of `RETRIED`, endings that do not count as finished.  `track`: one of `track.TRACKERS`,
    which gets a copy of every finished run; where that fails, a line says so, and the next call tries again.

    A failure leaves a record with status `failed` and does not stop the others.  An experiment that another
    process is running in the same folder is waited for at the end, and done here if that process gave up.
    Ctrl-C, SIGTERM and SIGUSR1 are passed on: runs save their state and end as `interrupted`, then `Stopped`
    is raised; a second Ctrl-C does not wait for them.  Raises `InputError` before anything runs.
    """
    with stop_signals():
        log = None
        if track:
            from toolkit.batch.track import tracker  # draws, which takes a second to import

            log = tracker(track)
        return _run_experiments(experiments, runs, workers, scheduler, retry, log)


def _run_experiments(
    experiments: list[Parameters],
    runs: Path,
    workers: int | None,
    scheduler: str,
    retry: Sequence[str],
    log: Callable[[Path], None] | None,
) -> list[Parameters]:
    data = check_runnable(experiments, runs)
    hashes = {name: splits.hashes["train"] for name, splits in data.items()}
    one = functools.partial(run_one, runs=runs, hashes=hashes, retry=retry)
    with (
        _cluster(experiments, runs, workers, scheduler) as client,
        tqdm(total=len(experiments), unit="run", dynamic_ncols=True) as bar,
    ):

        def outcomes(todo: list[Parameters], wait: bool) -> Iterator[tuple[Parameters, Outcome | Exception]]:
            run = functools.partial(one, wait=wait)
            if client is not None:
                yield from cluster.each(client, run, todo)
                return
            for experiment in todo:
                bar.set_description(experiment.name)
                SHOW_EPOCH.set(bar.set_postfix_str)
                yield experiment, run(experiment)
                bar.set_postfix_str("")

        failed, busy = [], []
        try:
            for wait, todo in ((False, experiments), (True, busy)):
                for experiment, outcome in outcomes(todo, wait):
                    folder = run_folder(experiment, runs)
                    if isinstance(
                        outcome, Exception
                    ):  # of the cluster: `run_one` turns its own into outcomes
                        outcome = Outcome(_fail(experiment, folder, _described(outcome)))
                    if outcome.signal is not None:
                        raise Stopped(outcome.signal)
                    if outcome.busy:
                        busy.append(experiment)
                        continue
                    bar.update()
                    if outcome.error:
                        failed.append(experiment)
                        notebook = _notebook(experiment, folder)
                        bar.write(f"failed: {experiment.describe()}: {outcome.error} (notebook: {notebook})")
                    elif log:
                        try:
                            log(finished_folder(experiment, runs) or folder)
                        except Exception as error:  # a server that is away costs no run
                            bar.write(f"not tracked: {experiment.name}: {_described(error)}")
        except KeyboardInterrupt:
            if client is not None:
                client.run(stop_all)
            raise
    return failed


def _cluster(
    experiments: list[Parameters], runs: Path, workers: int | None, scheduler: str
) -> contextlib.AbstractContextManager[cluster.Client | None]:
    """The workers to use; None for this process alone."""
    on_gpu = any(e.device == "cuda" for e in experiments)
    if scheduler:
        return cluster.remote_workers(scheduler, runs, on_gpu=on_gpu)
    if workers is None:
        workers = torch.cuda.device_count() if on_gpu else 1
    return cluster.local_workers(workers) if workers != 1 else contextlib.nullcontext()


def run_one(
    experiment: Parameters, *, runs: Path, hashes: dict[str, str], wait: bool, retry: Sequence[str] = ()
) -> Outcome:
    """Run one experiment unless it is finished; failures are outcomes, not exceptions.

    `hashes`: sha256 of the training data by data set; `wait`: for a process that is running it.
    """
    folder = run_folder(experiment, runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".sweep.lock", timeout=-1 if wait else 0):
            return Outcome(_run(experiment, folder, runs, hashes[experiment.dataset], retry))
    except filelock.Timeout:
        return Outcome(busy=True)
    except Stopped as stop:
        if status_of(folder) != "interrupted":  # it was not training yet, or not any more
            RunRecord.of_failure(experiment, f"stopped by {stop}", "interrupted").save(folder)
        return Outcome(signal=stop.signal)
    except OSError as error:  # the folder cannot be written, so neither can a record of the failure
        return Outcome(_described(error))


def _run(
    experiment: Parameters, folder: Path, runs: Path, train_sha256: str, retry: Sequence[str]
) -> str | None:
    """Run one experiment unless it is finished; return what went wrong."""
    if finished_folder(experiment, runs, train_sha256, retry):
        return None
    if status_of(folder) in retry:
        RunRecord.of_failure(experiment, "not finished when tried again", "interrupted").save(folder)
    parameters = {**experiment.to_dict(), "runs": str(runs)}
    for _ in range(ATTEMPTS):
        try:
            execute_notebook(experiment.notebook, _notebook(experiment, folder), parameters)
            error, again = "the notebook ended without a finished record", False
        except Exception as problem:  # a dead kernel, a cell that raises, a full disk: on to the next run
            error, again = _described(problem), isinstance(problem, TRANSIENT)
        if finished_folder(experiment, runs, train_sha256):  # a figure that fails later changes nothing
            return None
        if not again:
            break
    return _fail(experiment, folder, error)


def _fail(experiment: Parameters, folder: Path, error: str) -> str:
    RunRecord.of_failure(experiment, error).save(folder)
    return error


def _notebook(experiment: Parameters, folder: Path) -> Path:
    return folder / f"{experiment.notebook}.ipynb"


def _described(problem: Exception) -> str:
    """Type and message of an exception, of a failing cell those of its own exception, on one line."""
    if isinstance(problem, PapermillExecutionError):
        return " ".join(f"{problem.ename}: {problem.evalue}".split())
    return f"{type(problem).__name__}: {one_line(problem)}"


class _EpochLines:
    """The file that a kernel's prints go to."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith("epoch "):
                SHOW_EPOCH.get()(line)

    def flush(self) -> None:
        """Do nothing: lines are shown as they come."""


def execute_notebook(name: str, output: Path, parameters: dict) -> None:
    """Execute `notebooks/<name>.ipynb` with `parameters` and save it, outputs included, as `output`.

    Only declared parameters are passed: papermill would inject any name, even one that is not an identifier,
    as code.  Raises `InputError` for other names, and what papermill raises for a failing cell.
    """
    notebook = NOTEBOOKS / f"{name}.ipynb"
    known = [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("extras/*.ipynb")]
    names = [path.relative_to(NOTEBOOKS).with_suffix("").as_posix() for path in known]
    check_name("notebook", name, sorted(names))
    logging.getLogger("papermill").setLevel(logging.ERROR)
    declared = papermill.inspect_notebook(str(notebook))
    for parameter in parameters:
        if not str(parameter).isidentifier():
            raise InputError(f"notebook parameter {parameter!r} is not an identifier.")
        check_name(f"parameter of {notebook.name}", parameter, declared)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # silences the debugger of every kernel
    path = str(output).replace("{", "{{").replace("}", "}}")  # papermill fills {name} with parameters
    with progress.batch(), passing_on_signals() as kernel:
        papermill.execute_notebook(
            str(notebook), path, parameters=parameters, kernel_name="python3", cwd=str(NOTEBOOKS),
            progress_bar=False, extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            kernel_manager_class=kernel, stdout_file=_EpochLines(),
        )  # fmt: skip
