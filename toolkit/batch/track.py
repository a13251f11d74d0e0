"""Copies of finished runs in a tracker: parameters, curves, figures, the record and a picture of the memory.

Trackers are optional packages.  They get what the record of a run holds, once the run has ended.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot as plt

from toolkit import plots
from toolkit.errors import InputError, check_name
from toolkit.files import write_atomically
from toolkit.training.record import FIGURES, FILE_NAME, read_record

PROJECT = "toolkit"


@dataclass(frozen=True)
class Logged:
    """What a tracker gets of one run."""

    folder: Path
    params: dict[str, object]
    figures: dict[str, float]  # of the whole run: scores, seconds, peaks, ...
    curves: dict[int, dict[str, float]]  # losses and scores by epoch
    picture: Path | None  # memory over a step


def tracker(name: str) -> Callable[[Path], None]:
    """A function that logs the finished run in a folder, once.

    Raises `InputError` for an unknown tracker, or one whose package is not installed.
    """
    module, log = TRACKERS[check_name("tracker", name, TRACKERS)]
    try:
        api = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--track {name} needs a package ({error}): pip install {name}") from None

    def log_once(folder: Path) -> None:
        record, done = read_record(folder / FILE_NAME), folder / f".tracked-{name}"
        run_id = record["run"]["run_id"]
        if done.exists() and done.read_text() == run_id:
            return
        with tempfile.TemporaryDirectory() as pictures:
            log(api, _logged(record, folder, Path(pictures)))
        write_atomically(done, run_id.encode())

    return log_once


def _logged(record: dict, folder: Path, pictures: Path) -> Logged:
    figures = _numbers({name: value for group in FIGURES for name, value in record[group].items()})
    history, trace = (record["curves"].get(name) for name in ("history", "memory_trace_bytes"))
    picture = None
    if trace:
        figure = plots.memory_over_step(trace, record["config"]["budget"], figures.get("train_peak_bytes"))
        picture = plots.save(figure, "memory_over_step", pictures)
        plt.close(figure)
    curves = {row["epoch"]: _numbers(row) for row in history or ()}
    return Logged(folder, record["config"], figures, curves, picture)


def _numbers(values: dict) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}


def _tensorboard(api, run: Logged) -> None:
    """Into the folder of the run: `tensorboard --logdir` of all runs shows them side by side."""
    with api.SummaryWriter(str(run.folder / "tensorboard")) as writer:
        record = json.loads((run.folder / FILE_NAME).read_text())
        for name, content in (("parameters", run.params), ("record", record)):
            writer.add_text(name, json.dumps(content, indent=1).replace("\n", "\n    "))
        for epoch, row in {0: run.figures, **run.curves}.items():
            for name, value in row.items():
                writer.add_scalar(f"{'curves' if epoch else 'figures'}/{name}", value, epoch)
        if run.picture:
            writer.add_image("memory_over_step", plt.imread(run.picture), dataformats="HWC")


def _mlflow(api, run: Logged) -> None:
    """To the server that MLFLOW_TRACKING_URI names, or else into a database among the runs."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        api.set_tracking_uri(f"sqlite:///{run.folder.parent / 'mlflow.db'}")
        if api.get_experiment_by_name(PROJECT) is None:  # its files would go to the current folder
            api.create_experiment(PROJECT, artifact_location=(run.folder.parent / "mlflow").as_uri())
    api.set_experiment(PROJECT)
    with api.start_run(run_name=run.folder.name):
        api.log_params(run.params)
        for epoch, row in {0: run.figures, **run.curves}.items():
            api.log_metrics(row, step=epoch)
        for path in filter(None, (run.folder / FILE_NAME, run.picture)):
            api.log_artifact(str(path))


def _like_wandb(api, run: Logged) -> None:
    """To wandb, or to trackio, whose functions have the same names."""
    logged = api.init(project=PROJECT, name=run.folder.name, config=run.params)
    pictures = {"memory_over_step": api.Image(str(run.picture))} if run.picture else {}
    for epoch, row in {0: run.figures | pictures, **run.curves}.items():
        logged.log(row, step=epoch)
    logged.log_artifact(str(run.folder / FILE_NAME), type="record")
    logged.finish()


TRACKERS = {  # the module to import, and what logs a run with it
    "tensorboard": ("torch.utils.tensorboard", _tensorboard),
    "trackio": ("trackio", _like_wandb),
    "mlflow": ("mlflow", _mlflow),
    "wandb": ("wandb", _like_wandb),
}
