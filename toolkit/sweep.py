"""Many experiments in batch: one papermill execution, one kernel and one record each.

The record decides what is finished, never the notebook: papermill marks the cells of a killed kernel
as completed.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import filelock
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from toolkit.backbones import build_backbone
from toolkit.baselines.evaluate import form_and_batch
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.prompts import class_names
from toolkit.budget import find_blocks
from toolkit.datasets import Splits, load_dataset
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment
from toolkit.methods import adapt
from toolkit.parameters import Parameters
from toolkit.paths import NOTEBOOKS, RUNS
from toolkit.records import RunRecord, is_finished, run_folder
from toolkit.training import check_fits_weights

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
    """Find out before any long work that the data exist and the models build, adapt and fit the budget.

    Returns the data sets by name.  Raises `InputError`.
    """
    if any(parent.exists() and not parent.is_dir() for parent in (runs, *runs.parents)):
        raise InputError(f"runs cannot be kept in {runs}: a file is in the way.")
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
        key = (e.dataset, e.backbone, e.pretrained, e.method, e.checkpointing, e.budget)
        if key in checked:
            continue
        checked.add(key)
        model = build_backbone(e.backbone, len(data[e.dataset].classes), e.pretrained)
        check_fits_weights(model, e.budget_bytes)
        adapt(model, e.method, **e.method_options)
        if e.checkpointing != "none":
            find_blocks(model)
    return data


def run_experiments(experiments: list[Parameters], runs: Path = RUNS) -> list[Parameters]:
    """Run what has no finished record under `runs`, with one progress bar; returns what failed.

    A failure leaves a record with status `failed` and does not stop the others.  What another process
    is running in the same folder is left to it.  Raises `InputError` before anything runs.
    """
    data = check_runnable(experiments, runs)
    failed = []
    with tqdm(experiments, unit="run", dynamic_ncols=True) as bar:
        for experiment in bar:
            bar.set_description(experiment.name)
            folder = run_folder(experiment, runs)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with filelock.FileLock(folder / ".sweep.lock", timeout=0):
                    error = _run(experiment, folder, runs, data[experiment.dataset].hashes["train"])
            except filelock.Timeout:
                bar.write(f"left to the process that is running it: {experiment.describe()}")
                continue
            if error:
                failed.append(experiment)
                bar.write(
                    f"failed: {experiment.describe()}: {error} (notebook: {_notebook(experiment, folder)})"
                )
    return failed


def _notebook(experiment: Parameters, folder: Path) -> Path:
    return folder / f"{experiment.notebook}.ipynb"


def _run(experiment: Parameters, folder: Path, runs: Path, train_sha256: str) -> str | None:
    """Run one experiment unless it is finished; returns what went wrong."""
    if is_finished(folder, train_sha256):
        return None
    parameters = {**experiment.to_dict(), "runs": str(runs)}
    try:
        execute_notebook(experiment.notebook, _notebook(experiment, folder), parameters)
        error = "the notebook ended without a finished record"
    except Exception as problem:  # a kernel that dies, a cell that raises, a full disk: on to the next
        error = _one_line(problem)
    if is_finished(folder, train_sha256):  # a figure that fails after the record takes nothing away
        return None
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
    papermill.execute_notebook(
        str(notebook), _no_pattern(output), parameters=parameters, kernel_name="python3", cwd=str(NOTEBOOKS),
        progress_bar=False, extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )  # fmt: skip


def _no_pattern(path: Path) -> str:
    """papermill fills `{name}` in a path with parameters; braces of ours mean themselves."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _one_line(problem: Exception) -> str:
    if isinstance(problem, PapermillExecutionError):
        return f"{problem.ename}: {problem.evalue}"
    return f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
