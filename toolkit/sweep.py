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

import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from toolkit.backbones import build_backbone
from toolkit.datasets import load_dataset
from toolkit.errors import InputError, check_name
from toolkit.experiment import Experiment
from toolkit.paths import NOTEBOOKS, RUNS
from toolkit.records import RunRecord, is_finished, run_folder
from toolkit.training import check_fits_weights

# What `python -m toolkit run` compares: small enough for two CPU cores and a few minutes.
DEFAULT_COMPARISON = {
    "method": ["linear", "bitfit", "lora", "full"],
    "checkpointing": ["none", "static", "threshold"],
    "budget": ["18 MiB"],
}


def grid(**values: Iterable) -> list[Experiment]:
    """The experiments of all combinations, the last parameter varying fastest."""
    return [
        Experiment(**dict(zip(values, combination))) for combination in itertools.product(*values.values())
    ]


def check_runnable(experiments: Iterable[Experiment]) -> None:
    """Find out before any long work: the data exist, the backbone builds, its weights fit the budget."""
    seen = set()
    for experiment in experiments:
        key = (experiment.dataset, experiment.backbone, experiment.pretrained, experiment.budget)
        if key in seen:
            continue
        seen.add(key)
        splits = load_dataset(experiment.dataset)
        model = build_backbone(experiment.backbone, len(splits.classes), experiment.pretrained)
        check_fits_weights(model, experiment.budget_bytes)


def run_experiments(experiments: list[Experiment], runs: Path = RUNS) -> list[Experiment]:
    """Run what has no finished record under `runs`, with one progress bar; returns what failed.

    A failure leaves a record with status `failed` and does not stop the others.
    """
    failed = []
    with tqdm(experiments, unit="run", dynamic_ncols=True) as bar:
        for experiment in bar:
            folder = run_folder(experiment, runs)
            bar.set_description(f"{experiment.method} / {experiment.checkpointing} / seed {experiment.seed}")
            if is_finished(folder):
                continue
            try:
                execute_notebook(
                    "finetune", folder / "finetune.ipynb", {**experiment.to_dict(), "runs": str(runs)}
                )
                error = None if is_finished(folder) else "the notebook ended without a finished record"
            except (PapermillExecutionError, DeadKernelError, CellTimeoutError) as problem:
                error = _one_line(problem)
            if error:
                failed.append(experiment)
                if not is_finished(folder):
                    RunRecord.of_failure(experiment, error).save(folder)
                bar.write(f"failed: {experiment.describe()}: {error} (notebook: {folder / 'finetune.ipynb'})")
    return failed


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
        str(notebook), str(output), parameters=parameters, kernel_name="python3", cwd=str(NOTEBOOKS),
        progress_bar=False, extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )  # fmt: skip


def _one_line(problem: Exception) -> str:
    if isinstance(problem, PapermillExecutionError):
        return f"{problem.ename}: {problem.evalue}"
    return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
