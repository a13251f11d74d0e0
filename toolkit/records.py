"""The JSON file that one run leaves, and tables made of many.

Records are the only source of tables and figures.  A record is written whole or not at all, is strict
JSON, and carries units in its names; what was not measured is null with a reason under `missing`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
import subprocess
import uuid
import warnings
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import scipy.stats
import torch
from torch import nn

from toolkit.budget import STRATEGIES
from toolkit.datasets import Splits
from toolkit.experiment import Experiment
from toolkit.files import write_atomically
from toolkit.methods import METHODS, summarize
from toolkit.paths import ROOT, RUNS
from toolkit.snapshots import clear_snapshots
from toolkit.training import Evaluation, FitResult

SCHEMA_VERSION = 1
FILE_NAME = "record.json"
FINISHED = ("ok", "oom", "nan")  # a run with such a record is not repeated; interrupted and failed ones are
GROUPS = ("run", "config", "data", "quality", "time", "energy", "memory", "env")
PACKAGES = ("torch", "torchvision", "timm", "peft", "bitsandbytes", "transformers", "numpy")


@dataclass
class RunRecord:
    """One run.  Groups of scalars (`GROUPS`) become the columns of `load_records`; `curves` does not.

    Units are in the names: `_bytes`, `_seconds`, `_pct`, `_joules`.  `test_top1_pct` is accuracy on the
    test split after the last epoch (`selection_rule`); nothing was chosen on it.
    """

    run: dict
    config: dict
    data: dict = field(default_factory=dict)
    quality: dict = field(default_factory=dict)
    time: dict = field(default_factory=dict)
    energy: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    curves: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)  # field name -> why it is null

    @classmethod
    def of_run(
        cls,
        experiment: Experiment,
        splits: Splits,
        model: nn.Module,
        result: FitResult,
        evaluation: Evaluation | None,
    ) -> RunRecord:
        """Assemble the record of a run; `evaluation`: of the test split, None unless training ended well."""
        summary = summarize(model)
        record = cls(
            run=_run_fields(experiment, result.status, result.error) | {"started_at": result.started_at},
            config=experiment.to_dict(),
            data={
                "n_train": len(splits.train),
                "n_val": len(splits.val),
                "n_test": len(splits.test),
                "n_classes": len(splits.classes),
                "n_broken": len(splits.broken),
                **{f"{split}_sha256": digest for split, digest in splits.hashes.items()},
            },
            quality={
                "test_top1_pct": evaluation and evaluation.top1_pct,
                "test_top5_pct": evaluation and evaluation.top5_pct,
                "test_loss": evaluation and evaluation.loss,
                "val_top1_pct": result.history[-1]["val_top1_pct"] if result.history else None,
                "selection_rule": "last epoch",
                "weights_sha256": result.weights_sha256,
                "params_total": summary.total,
                "params_trainable": summary.trainable,
                "adapter_bytes": summary.adapter_bytes,
            },
            time={
                "train_seconds": result.train_seconds,
                "data_seconds": result.data_seconds,
                "test_seconds": evaluation and evaluation.seconds,
                "steps": result.steps,
                "resumes": result.resumes,
            },
            energy={"energy_joules": None},
            memory={
                "train_peak_bytes": result.peak_bytes or None,
                "train_reserved_peak_bytes": result.reserved_peak_bytes,
                "test_peak_bytes": evaluation and evaluation.peak_bytes,
                "memory_source": result.memory_source,
                "within_budget": result.peak_bytes <= experiment.budget_bytes
                if result.status == "ok"
                else None,
                "checkpointed_blocks": result.checkpointed_blocks,
            },
            env=environment(experiment.device),
            curves={"history": result.history, "memory_trace_bytes": result.memory_trace},
        )
        record.missing["energy_joules"] = "this version has no energy meter"
        if evaluation is None:
            fields = (
                "test_top1_pct",
                "test_top5_pct",
                "test_loss",
                "test_seconds",
                "test_peak_bytes",
                "within_budget",
            )
            record.missing |= dict.fromkeys(fields, f"training or test ended with status {result.status}")
        if not result.history:
            record.missing["val_top1_pct"] = "no epoch was completed"
        if not result.peak_bytes:
            record.missing["train_peak_bytes"] = "no training step was begun"
        if result.reserved_peak_bytes is None:
            record.missing["train_reserved_peak_bytes"] = "only CUDA's allocator reserves memory ahead"
        return record

    @classmethod
    def of_failure(cls, experiment: Experiment, error: str) -> RunRecord:
        """The record of a run that ended without one of its own: its kernel died or a cell raised."""
        return cls(
            run=_run_fields(experiment, "failed", error),
            config=experiment.to_dict(),
            env=environment(experiment.device),
            missing={group: f"the run failed: {error}" for group in ("data", "quality", "time", "memory")},
        )

    def save(self, folder: Path) -> Path:
        """Write `record.json` into `folder`; a finished run's snapshots go.

        The record of a finished run is not replaced by that of an unfinished one.
        """
        path = Path(folder) / FILE_NAME
        if self.run["status"] not in FINISHED and is_finished(Path(folder)):
            print(f"this run is {self.run['status']}; kept the record of the finished one")
            return path
        write_atomically(path, json.dumps(asdict(self), indent=1, allow_nan=False).encode())
        if self.run["status"] in FINISHED:
            clear_snapshots(Path(folder) / "snapshots")
        return path


def _run_fields(experiment: Experiment, status: str, error: str | None) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": str(uuid.uuid4()),
        "experiment_id": experiment.id,
        "status": status,
        "error": error,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def environment(device: str) -> dict:
    """What a result depends on besides its parameters."""
    return {
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        **{f"version_{name}": _version(name) for name in ("toolkit", *PACKAGES)},
        **_git(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git() -> dict:
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # What computes, not what is written: the default comparison renews the tracked figures.
    status = git("status", "--porcelain", "--", "toolkit", "notebooks", "data", "requirements.txt")
    return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def run_folder(experiment: Experiment, runs: Path = RUNS) -> Path:
    """Where the run of `experiment` keeps its record, notebook and snapshots."""
    return Path(runs) / experiment.name


def is_finished(folder: Path, train_sha256: str | None = None) -> bool:
    """Whether `folder` holds the record of a run that need not be repeated.

    With `train_sha256`, a run on other training data does not count.
    """
    try:
        record = json.loads((folder / FILE_NAME).read_text())
        finished = record["run"]["status"] in FINISHED
        return finished and train_sha256 in (None, record["data"]["train_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_records(folder: Path = RUNS) -> pd.DataFrame:
    """All records below `folder`, one row each; columns are the fields of `GROUPS`, and `folder`.

    A file that is no record is left out with a warning.
    """
    rows = []
    for path in sorted(Path(folder).glob(f"*/{FILE_NAME}")):
        try:
            record = json.loads(path.read_text())
            row = {name: value for group in GROUPS for name, value in record[group].items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            warnings.warn(f"{path} is no record and was left out: {error!r}", stacklevel=2)
            continue
        rows.append(row | {"folder": str(path.parent)})
    return pd.DataFrame(rows)


def load_curves(folder: Path) -> dict:
    """`history` and `memory_trace_bytes` of the run in `folder`."""
    return json.loads((Path(folder) / FILE_NAME).read_text())["curves"]


def mean_and_interval(values: pd.Series) -> tuple[float | None, float | None, int]:
    """Mean, half width of the 95 % Student-t interval, and n of the values that exist.

    Missing values are left out, never taken as 0; below two values there is no interval.
    """
    values = values.dropna().astype(float)
    n = len(values)
    if n == 0:
        return None, None, 0
    if n == 1:
        return float(values.iloc[0]), None, 1
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, n - 1) * values.sem()), n


SHOWN = ["dataset", "backbone", "method", "checkpointing"]
# Runs that disagree here are not the same measurement, whatever their parameters say.
SAME = ["train_sha256", "test_sha256", "device_name", "threads", "memory_source", "version_torch"]


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per group of runs that differ only in seed: mean, interval and n, as text for people.

    Columns name the parameters in `SHOWN` and any other, or any of `SAME`, that varies in `frame`.
    Runs that did not end `ok` count under `not ok` and in no mean.
    """
    parameters = [field.name for field in dataclasses.fields(Experiment) if field.name != "seed"]
    vary = [name for name in (*parameters, *SAME) if name in frame and frame[name].nunique() > 1]
    by = [*SHOWN, *(name for name in vary if name not in SHOWN)]
    rows = []
    order = {name: position for position, name in enumerate((*METHODS, *STRATEGIES))}
    frame = frame.sort_values(
        by, kind="stable", key=lambda column: column.map(lambda value: order.get(value, value))
    )
    for key, group in frame.groupby(by, sort=False, dropna=False):
        ok = group[group.status == "ok"]
        row = dict(zip(by, key))
        row["test top-1 %"] = _text(ok.get("test_top1_pct"), 1, 2)
        row["peak MiB"] = _text(ok.get("train_peak_bytes"), 2**20, 2)
        row["in budget"] = "" if ok.empty else "yes" if ok.within_budget.astype(bool).all() else "no"
        row["train s"] = _text(ok.get("train_seconds"), 1, 1)
        row["trainable"] = "" if ok.empty else f"{int(ok.params_trainable.iloc[0]):,}"
        row["n"] = len(ok)
        row["not ok"] = ", ".join(group.status[group.status != "ok"])
        rows.append(row)
    return pd.DataFrame(rows)


def _text(values: pd.Series | None, unit: float, digits: int) -> str:
    mean, half_width, n = (None, None, 0) if values is None else mean_and_interval(values / unit)
    if n == 0:
        return "–"
    return f"{mean:.{digits}f}" if half_width is None else f"{mean:.{digits}f} ± {half_width:.{digits}f}"
