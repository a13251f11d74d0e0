"""The cost of a sweep, run by run, before any of it starts: memory, budget, time.

Memory is that of `forecast`.  Time comes from finished runs where there are any, because the planner's
seconds are those of a device that it assumes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.memory_estimate import form_and_batch
from toolkit.baselines.prompts import class_names
from toolkit.budget import format_bytes
from toolkit.datasets import find_dataset, load_dataset
from toolkit.errors import InputError, one_line
from toolkit.experiment import Experiment, Parameters
from toolkit.files import RUNS
from toolkit.forecast.forecasts import FORECASTS, Forecast, forecasts
from toolkit.measure.environment import device_name
from toolkit.training.record import FILE_NAME, finished_folder, is_finished, read_record

START_SECONDS = 12.0  # of a run of `1_finetune`, besides its training
CPU_RATIO = 18.0  # training time to the planner's estimate, which is for an assumed device: 13 to 25

_STOPS = "stops the sweep"
_NOT_RUN = ("refused", _STOPS)
# A run by hand, on a device that is not here, or whose notebook somebody has changed.
_NOT_RUN_HERE = (OSError, ValueError, KeyError, TypeError, RecursionError)
_COLUMNS = (
    "name", "what", "finished", "predicted_peak_bytes", "within_budget", "reason", "seconds", "estimate_from"
)  # fmt: skip


def dry_run(experiments: Sequence[Parameters], runs: Path = RUNS, folder: Path = FORECASTS) -> pd.DataFrame:
    """One row per run: its cost, and whether it can run.  Starts and downloads nothing.

    Columns: `name` of its folder below `runs`, `what` it is, `finished`; `predicted_peak_bytes`;
    `within_budget`: yes; no (it runs all the same); refused (it fails, the others run); stops the sweep
    (nothing starts while it is among the runs); or unknown; the `reason` where it is not yes; the `seconds`
    of the whole run, and what they are an `estimate_from`:

    - "finished runs": the median of those on this device that differ only in the seed;
    - "scaled planner": the planner's estimate of all training steps, times the median ratio of training in
      finished runs of this sweep to their own estimates, and the median of what these runs took besides:
      the start of a kernel, data, model, validation and test;
    - "planner": the same with what was measured on two CPU cores, `START_SECONDS` and `CPU_RATIO`;
    - otherwise the reason why there is no number.

    On a terminal, a line on stderr tells of each forecast as soon as it is made.
    """
    data = {name: _data_of(name) for name in dict.fromkeys(e.dataset for e in experiments)}
    there = {name: found for name, found in data.items() if not isinstance(found, str)}
    tuned = [e for e in experiments if isinstance(e, Experiment) and e.dataset in there]
    trained = [_as_trained(e, there[e.dataset].images) for e in tuned]
    classes = {name: len(found.classes) for name, found in there.items()}
    predicted = dict(zip(tuned, forecasts(trained, classes, folder, _tell)))
    needs: dict = {}  # of baselines; those that differ in data or seed share one
    rows = []
    for e in tqdm(experiments, desc="runs", unit="run", leave=False):
        if e.dataset not in there:
            row = {"within_budget": _STOPS, "reason": data[e.dataset]}
        elif isinstance(e, BaselineExperiment):
            key = replace(e, dataset="digits", seed=0), *there[e.dataset].classes
            if key not in needs:
                needs[key] = _baseline_row(e, there[e.dataset].classes)
            row = needs[key]
        else:
            steps = e.epochs * math.ceil(there[e.dataset].images / e.batch_size)
            row = _tuned_row(predicted[e], steps)
        train_sha256 = there[e.dataset].train_sha256 if e.dataset in there else None
        finished = finished_folder(e, Path(runs), train_sha256) is not None
        rows.append({"name": e.name, "what": e.describe(), "finished": finished} | row)
    frame = pd.DataFrame(rows, columns=_COLUMNS).astype({"predicted_peak_bytes": "Int64", "seconds": float})
    return _with_times(frame, experiments, Path(runs))


def summary(frame: pd.DataFrame) -> str:
    """A `dry_run` in words: counts, the time that is left, and which runs cannot be done and why."""
    left = frame[~frame.finished.astype(bool)]
    refused = left[left.within_budget == "refused"]
    stopping = frame[frame.within_budget == _STOPS]  # the finished ones, too
    parts = [f"{len(frame)} runs, {len(frame) - len(left)} finished"]
    if len(stopping):
        parts.append(f"the sweep starts only without {len(stopping)} of them (named below)")
    if len(refused):
        parts.append(f"{len(refused)} would be refused (named below)")
    if above := (left.within_budget == "no").sum():
        parts.append(f"{above} are predicted to exceed their budget and run all the same")
    known = left[left.estimate_from.isin(("finished runs", "scaled planner"))]
    if len(known):
        counts = ", ".join(f"{n} from {source}" for source, n in known.estimate_from.value_counts().items())
        parts.append(f"about {_duration(known.seconds.sum())} left with one worker ({counts})")
    guessed = left[left.estimate_from == "planner"]
    if len(guessed):
        about = _duration(guessed.seconds.sum())
        parts.append(f"roughly {about} for {len(guessed)} that no finished run resembles")
    untimed = left[left.seconds.isna() & ~left.within_budget.isin(_NOT_RUN)]
    parts += [f"{n} without an estimate: {why}" for why, n in untimed.estimate_from.value_counts().items()]
    lines = ["; ".join(parts)]
    for rows in (stopping, refused, left[left.within_budget == "unknown"]):
        for reason, group in rows.groupby("reason", sort=False):
            lines.append(f"  {', '.join(group['name'])}: {reason}")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class _Data:
    """What is known of a data set without a download."""

    classes: list[str]
    images: int  # in the training split
    train_sha256: str | None = None  # None: unknown before the download


def _data_of(dataset: str) -> _Data | str:
    """The data set, or why it cannot be had."""
    try:
        entry = find_dataset(dataset)
        if entry.train_images is not None:  # no download just for these two numbers
            classes = [f"class {number}" for number in range(entry.classes)]  # about as long as true names
            return _Data(classes, entry.train_images)
        splits = load_dataset(dataset)
    except InputError as error:
        return one_line(error)
    return _Data(class_names(splits), len(splits.train), splits.hashes["train"])


def _as_trained(e: Experiment, images: int) -> Experiment:
    """`e` with the batch sizes that `fit` uses for so many training images."""
    size = min(e.batch_size, images)
    return replace(e, batch_size=size, micro_batch_size=min(e.micro_batch_size, size))


def _tuned_row(forecast: Forecast, steps: int) -> dict:
    row = {"predicted_peak_bytes": forecast.peak_bytes, "reason": forecast.reason or ""}
    if forecast.refused:  # a model without a plan can be built, which is all that a sweep checks
        return row | {"within_budget": _STOPS if forecast.smallest_bytes is None else "refused"}
    if forecast.peak_bytes is None:
        return row | {"within_budget": "unknown"}
    return row | {
        "within_budget": "yes" if forecast.fits else "no",
        "seconds": steps * forecast.step_seconds,
    }


def _baseline_row(e: BaselineExperiment, classes: list[str]) -> dict:
    try:
        peak_bytes = form_and_batch(e, classes)[2]
    except InputError as error:
        return {"within_budget": _STOPS, "reason": one_line(error)}
    if peak_bytes is None:
        return {"within_budget": "unknown", "reason": "weights from a folder are not counted beforehand"}
    return {"predicted_peak_bytes": peak_bytes, "within_budget": "yes", "reason": ""}


def _tell(e: Experiment, found: Forecast) -> None:
    if sys.stderr.isatty():
        peak = (
            found.reason if found.peak_bytes is None else f"predicted peak {format_bytes(found.peak_bytes)}"
        )
        tqdm.write(f"{e.describe()}: {peak}", file=sys.stderr)


def _with_times(frame: pd.DataFrame, experiments: Sequence[Parameters], runs: Path) -> pd.DataFrame:
    """`frame`, whose `seconds` are the planner's, with the best estimate of each run."""
    past: dict[str, list[tuple[float, float]]] = {}  # seconds by id of the experiment with seed 0
    for e, *seconds in _finished(runs):
        past.setdefault(replace(e, seed=0).id, []).append(seconds)
    known = [np.median(past.get(replace(e, seed=0).id, [(math.nan,) * 2]), axis=0) for e in experiments]
    known = pd.DataFrame(known, frame.index, ["whole", "training"], float)
    ratio = (known.training / frame.seconds).median()
    start = (known.whole - known.training)[frame.seconds.notna()].median()
    runs_at_all = ~frame.within_budget.isin(_NOT_RUN)
    source = pd.Series("no such run is finished", frame.index)
    source = source.mask(frame.seconds.notna(), "planner" if math.isnan(ratio) else "scaled planner")
    if math.isnan(ratio):
        ratio = pd.Series([CPU_RATIO if e.device == "cpu" else 1.0 for e in experiments], frame.index, float)
        start = START_SECONDS
    source = source.mask(known.whole.notna(), "finished runs").where(runs_at_all, "refused")
    seconds = known.whole.fillna(start + ratio * frame.seconds).where(runs_at_all)
    return frame.assign(seconds=seconds, estimate_from=source)


def _finished(runs: Path) -> Iterator[tuple[Parameters, float, float]]:
    """Experiment, seconds and training seconds of each run on this device that ended well in one go."""
    for path in sorted(runs.glob(f"*/{FILE_NAME}")):
        if not is_finished(path.parent):
            continue
        try:
            record = read_record(path)
            kind = BaselineExperiment if record["run"]["phase"] == BaselineExperiment.phase else Experiment
            e = kind(**{field.name: record["config"][field.name] for field in fields(kind)})
            (notebook,) = path.parent.glob("*.ipynb")  # of whatever name that notebook had then
            seconds = float(json.loads(notebook.read_bytes())["metadata"]["papermill"]["duration"] or 0)
            training = record["time"].get("train_seconds")
            here = record["env"]["device_name"] == device_name(e.device)
            whole = record["run"]["status"] == "ok" and not record["time"].get("resumes")
        except _NOT_RUN_HERE:
            continue
        if here and whole and seconds:
            yield e, seconds, training or 0.0
