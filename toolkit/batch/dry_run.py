"""What a sweep will take, run by run, before any of it starts: memory, budget, time.

Memory is `forecast`'s.  Time is that of finished runs where there are any, as the planner's seconds are of
a device that it assumes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median

import pandas as pd
from tqdm.auto import tqdm

from toolkit.baselines.evaluate import form_and_batch
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.prompts import class_names
from toolkit.cache import kept, read
from toolkit.datasets import find_dataset, load_dataset
from toolkit.errors import InputError
from toolkit.experiment import Experiment, Parameters
from toolkit.files import RUNS
from toolkit.forecast.forecasts import FORECASTS, TrainingStep, forecasts, made_by, one_line
from toolkit.measure.environment import device_name
from toolkit.training.record import FILE_NAME, is_finished, run_folder

_STOPS = "stops the sweep"
_NOT_RUN = ("refused", _STOPS)
_COLUMNS = (
    "name", "what", "finished", "predicted_peak_bytes", "within_budget", "reason", "seconds", "estimate_from"
)  # fmt: skip


def dry_run(experiments: Sequence[Parameters], runs: Path = RUNS, folder: Path = FORECASTS) -> pd.DataFrame:
    """One row per run: what it would take, and whether it can be.  Starts and downloads nothing.

    Columns: `name` of its folder below `runs`, `what` it is, `finished`; `predicted_peak_bytes`;
    `within_budget`: yes; no (it runs all the same); refused (it fails, the others run); stops the sweep
    (nothing starts while it is among the runs); or unknown; and the `reason` where it is not yes;
    `seconds` of the whole run, and what they are an `estimate_from`:

    - "finished runs": the median of those on this device that differ in nothing but the seed;
    - "scaled planner": the planner's estimate of all steps, times what finished runs took per estimate (of
      those with a kept forecast), and the median of what finished runs took beside training;
    - "planner": the estimate alone, where there are none.  Of training only, and on a CPU much too short:
      measured times are 13 to 25 times as long;
    - else why there is no number.
    """
    data = {name: _data_of(name) for name in dict.fromkeys(e.dataset for e in experiments)}
    there = {name: found for name, found in data.items() if not isinstance(found, str)}
    tuned = [e for e in experiments if isinstance(e, Experiment) and e.dataset in there]
    trained = [_as_trained(e, there[e.dataset].images) for e in tuned]
    classes = {name: len(found.classes) for name, found in there.items()}
    predicted = dict(zip(tuned, forecasts(trained, classes, folder)))
    past = _Past(Path(runs), folder)
    rows = []
    for e in tqdm(experiments, desc="runs", unit="run", leave=False):
        planned_seconds = train_sha256 = None
        if e.dataset not in there:
            peak, within, reason = None, _STOPS, data[e.dataset]
        elif isinstance(e, BaselineExperiment):
            peak, within, reason = _baseline_need(e, there[e.dataset].classes, folder)
        else:
            f = predicted[e]
            peak, reason = f.peak_bytes, f.reason or ""
            if f.refused:  # what has no plan builds, which is all that a sweep asks before it starts
                within = _STOPS if f.smallest_bytes is None else "refused"
            elif f.peak_bytes is None:
                within = "unknown"
            else:
                within = "yes" if f.fits else "no"
                steps = e.epochs * math.ceil(there[e.dataset].images / e.batch_size)
                planned_seconds = steps * f.step_seconds
        seconds = (None, "refused") if within in _NOT_RUN else past.estimate(e, planned_seconds)
        if e.dataset in there:
            train_sha256 = there[e.dataset].train_sha256
        finished = is_finished(run_folder(e, Path(runs)), train_sha256)
        rows.append((e.name, e.describe(), finished, peak, within, reason, *seconds))
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"predicted_peak_bytes": "Int64", "seconds": float})


def summary(frame: pd.DataFrame) -> str:
    """A `dry_run` in words: counts, the time that is left, and which runs cannot be and why."""
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
        counts = ", ".join(
            f"{count} from {name}" for name, count in known.estimate_from.value_counts().items()
        )
        parts.append(f"about {_duration(known.seconds.sum())} left with one worker ({counts})")
    guessed = left[left.estimate_from == "planner"]
    if len(guessed):
        least = _duration(guessed.seconds.sum())
        parts.append(f"at least {least} of training for {len(guessed)} that no finished run tells of")
    untimed = left[left.seconds.isna() & ~left.within_budget.isin(_NOT_RUN)]
    parts += [f"{n} without an estimate: {why}" for why, n in untimed.estimate_from.value_counts().items()]
    names = [
        f"  {', '.join(group['name'])}: {reason}"
        for rows in (stopping, refused)
        for reason, group in rows.groupby("reason", sort=False)
    ]
    return "\n".join(["; ".join(parts), *names])


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class _Data:
    """What is known of a data set without a download."""

    classes: list[str]
    images: int  # to train on
    train_sha256: str | None = None  # None: of what is not here


def _as_trained(e: Experiment, images: int) -> Experiment:
    """`e` with batches as `fit` makes them of so many training images."""
    size = min(e.batch_size, images)
    return replace(e, batch_size=size, micro_batch_size=min(e.micro_batch_size, size))


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


def _baseline_need(e: BaselineExperiment, classes: list[str], folder: Path) -> tuple[int | None, str, str]:
    """Predicted peak bytes of a baseline, whether these are within the budget, and why not."""
    asked = {"baseline": replace(e, dataset="digits", seed=0).to_dict(), "classes": classes}

    def make() -> dict:
        try:
            return {"peak": form_and_batch(e, classes)[2], "reason": ""}
        except InputError as error:
            return {"peak": None, "reason": one_line(error)}

    found = kept(folder, made_by() | asked, make)
    if found["reason"]:
        return None, _STOPS, found["reason"]
    if found["peak"] is None:
        return None, "unknown", "weights from a folder are what they are"
    return found["peak"], "yes", ""


class _Past:
    """Finished runs on this device, and what they tell of the time of others."""

    def __init__(self, runs: Path, folder: Path):
        self.seconds: dict[str, list[float]] = defaultdict(list)  # by id of the experiment with seed 0
        ratios, beside = [], []  # time of training per estimate; time of the rest of a run
        for e, record, seconds in _finished(runs):
            self.seconds[replace(e, seed=0).id].append(seconds)
            if isinstance(e, Experiment):
                trained = record["time"]["train_seconds"]
                beside.append(seconds - trained)
                same = _as_trained(e, record["data"]["n_train"])
                known = read(folder, TrainingStep(same, record["data"]["n_classes"]).key_of(same))
                if known and known[0]["step_seconds"]:
                    ratios.append(trained / (record["time"]["steps"] * known[0]["step_seconds"]))
        self.ratio = median(ratios) if ratios else None
        self.beside_seconds = median(beside) if beside else 0.0

    def estimate(self, e: Parameters, planned_seconds: float | None) -> tuple[float | None, str]:
        """Seconds of the run of `e`, whose training is planned to take so many, and where they are from."""
        same = self.seconds.get(replace(e, seed=0).id)
        if same:
            return median(same), "finished runs"
        if planned_seconds is None:
            return None, "no such run is finished"
        if self.ratio is None:
            return planned_seconds, "planner"
        return self.ratio * planned_seconds + self.beside_seconds, "scaled planner"


def _finished(runs: Path) -> Iterator[tuple[Parameters, dict, float]]:
    """Experiment, record and seconds of runs on this device that ended well, in one go, under papermill."""
    for path in sorted(runs.glob(f"*/{FILE_NAME}")):
        if not is_finished(path.parent):
            continue
        try:
            record = json.loads(path.read_bytes())
            kind = BaselineExperiment if record["run"]["phase"] == BaselineExperiment.phase else Experiment
            e = kind(**{field.name: record["config"][field.name] for field in fields(kind)})
            notebook = json.loads((path.parent / f"{e.notebook}.ipynb").read_bytes())
            seconds = notebook["metadata"]["papermill"]["duration"]
            here = record["env"]["device_name"] == device_name(e.device)
            whole = record["run"]["status"] == "ok" and not record["time"].get("resumes")
        except (OSError, ValueError, KeyError, TypeError):  # of another device, or run by hand
            continue
        if here and whole and seconds:
            yield e, record, seconds
