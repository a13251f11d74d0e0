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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import papermill
import torch
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from toolkit.backbones import data_config
from toolkit.baselines.evaluate import form_and_batch
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.prompts import class_names
from toolkit.batch import cluster
from toolkit.budget import find_blocks
from toolkit.datasets import Splits, load_dataset
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment, Parameters
from toolkit.files import NOTEBOOKS, RUNS
from toolkit.methods import adapt, check_batch_norms
from toolkit.model import build_model, check_fits_weights
from toolkit.training import progress
from toolkit.training.feature_cache import checked_size
from toolkit.training.loop import batch_sizes
from toolkit.training.record import RunRecord, is_finished, run_folder

if TYPE_CHECKING:
    from distributed import Client

ATTEMPTS = 2
TRANSIENT = (RuntimeError, TimeoutError)  # of jupyter_client and nbclient: a kernel died, or did not start

# What `python -m toolkit run` compares: small enough for two CPU cores and a few minutes.
DEFAULT_COMPARISON = {
    "method": ["lora", "full"],
    "checkpointing": ["none", "static", "threshold", "planned"],
    "budget": ["18 MiB"],
}


def grid(kind: type[Parameters] = Experiment, **values: Iterable) -> list[Parameters]:
    """The experiments of all combinations, the last parameter varying fastest; `kind`: of which class."""
    return [kind(**dict(zip(values, combination))) for combination in itertools.product(*values.values())]


def check_runnable(experiments: Iterable[Parameters], runs: Path = RUNS) -> dict[str, Splits]:
    """Find out before any long work that the data exist, models build and adapt, and weights fit budgets.

    Makes the folder `runs`.  Returns the data sets by name.  Raises `InputError`.
    """
    data, checked = {}, set()
    for experiment in experiments:
        e = experiment
        if isinstance(e, BaselineExperiment):
            form_and_batch(e)
        if e.dataset not in data:
            data[e.dataset] = load_dataset(e.dataset)
        if isinstance(e, BaselineExperiment):
            form_and_batch(e, class_names(data[e.dataset]))
            continue
        batches = batch_sizes(e, len(data[e.dataset].train))
        key = (e.dataset, e.head, e.backbone, e.pretrained, e.method, e.checkpointing, e.budget, 1 in batches)
        key += (e.feature_cache, e.precision if e.feature_cache else "", *sorted(e.method_options.items()))
        if key in checked:
            continue
        checked.add(key)
        model = build_model(e, len(data[e.dataset].classes))
        model = adapt(model, e.method, **e.method_options)
        check_fits_weights(model, e.budget_bytes)
        check_batch_norms(model, batches, data_config(model)["input_size"])
        if e.feature_cache:
            checked_size(model, data[e.dataset], int(e.feature_cache), e.precision)
        if e.checkpointing != "none":
            find_blocks(model)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise InputError(f"runs cannot be kept in {runs} ({error.strerror}); name another folder.") from None
    return data


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment: `error` is None if it has a finished record; `busy`: elsewhere."""

    error: str | None = None
    busy: bool = False


def run_experiments(
    experiments: list[Parameters], runs: Path = RUNS, *, workers: int | None = None, scheduler: str = ""
) -> list[Parameters]:
    """Run what has no finished record under `runs`, with one progress bar; returns what failed.

    `workers`: how many experiments at a time, on this machine (default: one per GPU; on the CPU one, so that
    what is timed has it to itself).  With `scheduler`, the address of one of dask.distributed, they run on
    its workers.  A failure leaves a record with status `failed` and does not
    stop the others.  What another process is running in the same folder is waited for at the end, and done
    here if that one gave up.  Raises `InputError` before anything runs.
    """
    data = check_runnable(experiments, runs)
    one = functools.partial(run_one, runs=runs, hashes={name: d.hashes["train"] for name, d in data.items()})
    failed, on_gpu = [], any(e.device == "cuda" for e in experiments)
    if workers is None:
        workers = torch.cuda.device_count() if on_gpu else 1
    with contextlib.ExitStack() as stack:
        if scheduler:
            client = stack.enter_context(cluster.remote_workers(scheduler, runs, on_gpu=on_gpu))
        elif workers != 1:
            client = stack.enter_context(cluster.local_workers(workers))
        else:
            client = None
        bar = stack.enter_context(tqdm(total=len(experiments), unit="run", dynamic_ncols=True))
        busy = []
        for wait, todo in ((False, experiments), (True, busy)):
            for experiment, outcome in _each(client, functools.partial(one, wait=wait), todo, bar):
                if isinstance(outcome, Exception):  # of the cluster: `run_one` keeps its own
                    outcome = Outcome(_fail(experiment, run_folder(experiment, runs), _one_line(outcome)))
                if outcome.busy:
                    busy.append(experiment)
                    continue
                bar.update()
                if outcome.error:
                    failed.append(experiment)
                    notebook = _notebook(experiment, run_folder(experiment, runs))
                    bar.write(f"failed: {experiment.describe()}: {outcome.error} (notebook: {notebook})")
    return failed


def _each(client: Client | None, one: Callable, experiments: list[Parameters], bar: tqdm) -> Iterator[tuple]:
    """Pairs of an experiment and its outcome, as they end."""
    if client is not None:
        yield from cluster.each(client, one, experiments, _resources)
        return
    for experiment in experiments:
        bar.set_description(experiment.name)
        yield experiment, one(experiment)


def _resources(experiment: Parameters) -> dict:
    return {"GPU": 1} if experiment.device == "cuda" else {}


def run_one(experiment: Parameters, *, runs: Path, hashes: dict[str, str], wait: bool) -> Outcome:
    """Run one experiment unless it is finished; what goes wrong is an outcome, not an exception.

    `hashes`: sha256 of the training data by data set; `wait`: for a process that is running it.
    """
    folder = run_folder(experiment, runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".sweep.lock", timeout=-1 if wait else 0):
            return Outcome(_run(experiment, folder, runs, hashes[experiment.dataset]))
    except filelock.Timeout:
        return Outcome(busy=True)
    except OSError as error:  # the folder cannot be written: neither can a record of that
        return Outcome(_one_line(error))


def _notebook(experiment: Parameters, folder: Path) -> Path:
    return folder / f"{experiment.notebook}.ipynb"


def _run(experiment: Parameters, folder: Path, runs: Path, train_sha256: str) -> str | None:
    """Run one experiment unless it is finished; returns what went wrong."""
    if is_finished(folder, train_sha256):
        return None
    parameters = {**experiment.to_dict(), "runs": str(runs)}
    for _ in range(ATTEMPTS):
        try:
            execute_notebook(experiment.notebook, _notebook(experiment, folder), parameters)
            error, again = "the notebook ended without a finished record", False
        except Exception as problem:  # a kernel that dies, a cell that raises, a full disk: on to the next
            error, again = _one_line(problem), isinstance(problem, TRANSIENT)
        if is_finished(folder, train_sha256):  # a figure that fails after the record takes nothing away
            return None
        if not again:
            break
    return _fail(experiment, folder, error)


def _fail(experiment: Parameters, folder: Path, error: str) -> str:
    RunRecord.of_failure(experiment, error).save(folder)
    return error


def execute_notebook(name: str, output: Path, parameters: dict) -> None:
    """Execute `notebooks/<name>.ipynb` with `parameters` and save it, outputs included, as `output`.

    Only declared parameters are passed: papermill would inject any name, and a name that is no
    identifier as code.  Raises `InputError` for those, and what papermill raises for a failing cell.
    """
    notebook = NOTEBOOKS / f"{name}.ipynb"
    check_name("notebook", name, sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    logging.getLogger("papermill").setLevel(logging.ERROR)
    declared = papermill.inspect_notebook(str(notebook))
    for parameter in parameters:
        if not str(parameter).isidentifier():
            raise InputError(f"notebook parameter {parameter!r} is no identifier.")
        check_name(f"parameter of {notebook.name}", parameter, declared)
    output.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # debugger's warning in every kernel
    with progress.batch():
        papermill.execute_notebook(
            str(notebook), _no_pattern(output), parameters=parameters, kernel_name="python3",
            cwd=str(NOTEBOOKS), progress_bar=False, extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )  # fmt: skip


def _no_pattern(path: Path) -> str:
    """papermill fills `{name}` in a path with parameters; braces of ours mean themselves."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _one_line(problem: Exception) -> str:
    if isinstance(problem, PapermillExecutionError):
        text = f"{problem.ename}: {problem.evalue}"
    else:
        text = f"{type(problem).__name__}: {problem}"
    return " ".join(text.split())
