"""The JSON file that one run leaves: the only source of tables and figures.

A record is written whole or not at all, is strict JSON, and carries units in its names; what was not
measured is null with a reason under `missing`.
"""

from __future__ import annotations

import glob
import reprlib
import sys
import uuid
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from torch import nn

from toolkit.backbones import weights_source
from toolkit.budget import STRATEGIES
from toolkit.datasets import Splits
from toolkit.datasets.tasks import TASKS, Task
from toolkit.errors import InputError
from toolkit.experiment import Experiment, Parameters, identity, upgrade
from toolkit.files import RUNS, read_sealed, write_sealed
from toolkit.measure import Window, total
from toolkit.measure.environment import environment, installed_packages
from toolkit.measure.quantities import METRICS, QUANTITIES
from toolkit.measure.scores import netscore, why_no_score
from toolkit.methods import METHODS, summarize
from toolkit.methods.weights import state_sha256, trained_state
from toolkit.training.evaluation import Evaluation, Outcome
from toolkit.training.result import FitResult
from toolkit.training.resume import Snapshots

SCHEMA_VERSION = 6
READABLE = (5, 6)
DISPLAYED = ("backbone", "method", "checkpointing")  # added to the parameters of a baseline, for tables
FILE_NAME = "record.json"
FINISHED = ("ok", "oom", "nan")  # a run with such a record is not repeated; interrupted and failed ones are
RETRIED = ("oom",)  # unless asked for: another process may have held the memory
# What a simulated GPU makes worthless; tables leave it out.
SIMULATED = tuple(name for name, quantity in QUANTITIES.items() if quantity.from_gpu_sensor)
MEASURED = {  # fields of a record: window and its attribute
    "energy_joules": ("whole", "energy_joules"),
    "features_energy_joules": ("features", "energy_joules"),
    "train_energy_joules": ("train", "energy_joules"),
    "validation_energy_joules": ("validation", "energy_joules"),
    "prepare_joules": ("prepare", "energy_joules"),
    "test_energy_joules": ("test", "energy_joules"),
    "train_quantisation_joules": ("train", "quantisation_joules"),
    "test_quantisation_joules": ("test", "quantisation_joules"),
    "train_poll_joules": ("train", "poll_joules"),
    "train_disagreement_pct": ("train", "disagreement_pct"),
    "train_net_joules": ("train", "net_joules"),
    "train_cpu_joules": ("train", "cpu_joules"),
}
MOST_CHARACTERS = 100_000  # of a text in a record
FIGURES = ("quality", "time", "energy", "memory", "flops", "scores")
GROUPS = ("run", "config", "data", *FIGURES, "env")


@dataclass
class RunRecord:
    """One run.  Groups of scalars (`GROUPS`) become the columns of `load_records`; `curves` does not.

    `test_*` are scores on the test split after the last epoch (`selection_rule`); nothing was chosen on it.
    `metric`: the one that runs of the task are compared by.  `energy_joules`: gross GPU energy of training,
    validation and test, data loading and the computing of cached features included.  Scores in decibels,
    `_inference` of the test pass, `_training` of training.  `uncounted_operators`: those of the traced step
    and of the test that FLOPs and multiply-adds leave out, since they have no formula.

    `phase` is "training", or "inference" for a baseline, which `prepare_*` describes up to the first test
    image: text classifier, features and probe, or the choice of a scoring rule, but not loading the weights.
    """

    run: dict
    config: dict
    data: dict = field(default_factory=dict)
    quality: dict = field(default_factory=dict)
    time: dict = field(default_factory=dict)
    energy: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)
    flops: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    env: dict = field(default_factory=dict)
    packages: dict = field(default_factory=dict)  # every installed distribution
    curves: dict = field(default_factory=dict)
    missing: dict = field(default_factory=dict)  # field name -> why it is null

    @classmethod
    def of_test(
        cls,
        experiment: Parameters,
        splits: Splits,
        outcome: Outcome,
        params_total: int | None,
        windows: dict[str, Window],
        evaluation: Evaluation | None,
    ) -> RunRecord:
        """The part that records of fine-tuned models and of baselines have in common.

        `windows`: by name, with "test" and "whole" (the sum) among them; `evaluation`: of the test split,
        None if it did not take place.
        """
        env = outcome.environment or environment(experiment.device)
        record = cls(
            run=run_fields(experiment, outcome.status, outcome.error) | {"started_at": outcome.started_at},
            config=experiment.config,
            data={
                **{f"n_{split}": len(getattr(splits, split)) for split in ("train", "val", "test")},
                "n_classes": len(splits.classes),
                "n_broken": len(splits.broken),
                **{f"{split}_sha256": digest for split, digest in splits.hashes.items()},
            },
            quality={
                **(evaluation.fields if evaluation else _unscored("test", TASKS[splits.task], "loss")),
                "weights_sha256": outcome.weights_sha256 or None,
                "params_total": params_total,
            },
            time={"test_seconds": evaluation and evaluation.seconds},
            energy={
                "energy_source": energy_source(windows.values()),
                "test_energy_flags": ", ".join(windows["test"].flags),
            },
            memory={
                "test_peak_bytes": evaluation and evaluation.peak_bytes,
                "host_peak_bytes": host_peak_bytes(),
                "memory_source": outcome.memory_source,
                "budget_mode": budget_mode(experiment, env["device_total_bytes"]),
                "predicted_peak_bytes": outcome.predicted_peak_bytes,
            },
            flops={
                "inference_macs_per_image": evaluation and evaluation.macs_per_image,
                "uncounted_operators": _names(evaluation.uncounted if evaluation else ()),
            },
            env=env,
            packages=installed_packages(),
        )
        for name, (part, attribute) in MEASURED.items():
            if part in windows:
                window = windows[part]
                record.energy[name] = getattr(window, attribute)
                reason = window.cpu_reason or window.reason if "cpu" in name else window.reason
                if record.energy[name] is None and reason:
                    record.missing[name] = reason
        return record

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
        summary, task = summarize(model), TASKS[splits.task]
        windows = {name: result.window(name) for name in ("fit", "train", "validation", *result.windows)}
        windows["test"] = evaluation.window if evaluation else Window("test")
        parts = ["features", "fit", *(["test"] if evaluation else [])]
        windows["whole"] = total(windows[name] for name in parts if name in windows)
        windows.setdefault("features", Window("features", seconds=0.0, energy_joules=0.0))
        record = cls.of_test(experiment, splits, result, summary.total, windows, evaluation)
        validated = result.history[-1] if result.history else _unscored("val", task)
        record.quality |= weights_source(model, experiment.pretrained)
        record.quality |= {name: value for name, value in validated.items() if name.startswith("val_")} | {
            "metric": task.metric,
            "selection_rule": "last epoch",
            "params_trainable": summary.trainable,
            "adapted_sha256": state_sha256(trained_state(model)),
            "adapter_bytes": summary.adapter_bytes,
        }
        record.data["n_train_skipped"] = result.images_skipped
        record.time |= {
            "train_seconds": result.train_seconds,
            "data_seconds": result.data_seconds,
            "features_seconds": windows["features"].seconds,
            "features_cached": result.features_cached,
            "validation_seconds": windows["validation"].seconds or 0.0,
            "snapshot_seconds": result.window("snapshot").seconds or 0.0,
            "steps": result.steps,
            "resumes": result.resumes,
        }
        record.energy |= {
            "idle_watts": result.idle_watts,
            "train_energy_flags": ", ".join(windows["train"].flags),
        }
        record.memory |= {
            "train_peak_bytes": result.peak_bytes or None,
            "train_reserved_peak_bytes": result.reserved_peak_bytes,
            "context_bytes": result.context_bytes,
            "within_budget": result.peak_bytes <= experiment.budget_bytes if result.status == "ok" else None,
            "checkpointed_blocks": result.checkpointed_blocks,
            "micro_batch_images": result.micro_batch_size or None,
            "out_of_memory_retries": result.out_of_memory_retries,
        }
        for phase in ("forward", "backward", "recompute"):
            record.flops[f"{phase}_flops_per_image"] = result.step_flops.get(phase)
        tested = evaluation.uncounted if evaluation else ()
        record.flops["uncounted_operators"] = _names((*result.uncounted, *tested))
        record.curves = {
            "history": result.history,
            "memory_trace_bytes": result.memory_trace,
            "windows": result.windows | ({"test": evaluation.window.to_dict()} if evaluation else {}),
        }
        record.score({"inference": "test", "training": "train"})
        record.explain({"context_bytes": result.context_reason, "idle_watts": windows["train"].reason})
        return record

    def overview(self) -> pd.DataFrame:
        """The figures that can be better or worse, as text, with the reason where there is none."""
        simulated = SIMULATED if self.energy.get("energy_source") == "fake" else ()
        rows = {}
        for name, value in _columns(vars(self), FIGURES).items():
            quantity = QUANTITIES.get(name)
            if isinstance(value, bool):
                text = str(value)
            elif quantity is None or not quantity.better:
                continue
            elif name in simulated:
                text = "simulated"
            else:
                text = quantity.text(value) + (
                    f" {quantity.unit}" if quantity.unit and value is not None else ""
                )
            rows[name] = text, self.missing.get(name, "")
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "missing because"])
        return frame.rename_axis("figure")

    def score(self, phases: dict[str, str]) -> None:
        """Fill in the NetScore family with each phase's costs; `phases`: name -> prefix of its fields."""
        accuracy = self.quality.get(f"test_{self.quality.get('metric', 'top1_pct')}")
        params_total, macs = self.quality["params_total"], self.flops["inference_macs_per_image"]
        costs = {"params_m": params_total and params_total / 1e6, "macs_g": macs and macs / 1e9}
        self.scores["units"] = "accuracy %, parameters M, MACs G per image, s, W, MiB"
        for phase, part in phases.items():
            seconds, joules = self.time[f"{part}_seconds"], self.energy[f"{part}_energy_joules"]
            peak = self.memory[f"{part}_peak_bytes"]
            costs |= {
                "seconds": seconds,
                "watts": joules / seconds if joules and seconds else None,
                "peak_mib": peak and peak / 2**20,
            }
            for kind, name in {"NS": "ns", "NS-E": "ns_e", "NS-M": "ns_m", "NS#": "ns_sharp"}.items():
                if kind == "NS" and phase == "training":
                    continue  # parameters and multiply-adds of a model have no phase
                column = name if kind == "NS" else f"{name}_{phase}"
                self.scores[column] = netscore(kind, accuracy, **costs)
                if self.scores[column] is None:
                    reason = why_no_score(kind, accuracy, **costs)
                    self.missing[column] = reason.replace("watts was", "energy was")

    def explain(self, reasons: dict[str, str | None]) -> None:
        """Record why each missing value is missing: one of `reasons`, or what `QUANTITIES` says."""
        for name, value in _columns(vars(self), (*FIGURES, "env")).items():
            if value is None and name not in self.missing:
                self.missing[name] = reasons.get(name) or QUANTITIES[name].missing

    @classmethod
    def of_failure(cls, experiment: Parameters, error: str, status: str = "failed") -> RunRecord:
        """The record of a run that ended without one of its own: its kernel died or a cell raised."""
        return cls(
            run=run_fields(experiment, status, error),
            config=experiment.config,
            env=environment(experiment.device),
            packages=installed_packages(),
            missing=dict.fromkeys(("data", *FIGURES), f"{status}: {error}"),
        )

    def save(self, folder: Path) -> Path:
        """Write `record.json` into `folder`; a finished run's snapshots go, unless it may be tried again.

        The record of a finished run is not replaced by that of an unfinished one.
        """
        path = Path(folder) / FILE_NAME
        final = set(FINISHED).difference(RETRIED)
        if self.run["status"] not in FINISHED and status_of(folder) in final:
            print(f"this run is {self.run['status']}; kept the record of the finished one")
            return path
        write_sealed(path, asdict(self), strict=True)
        if self.run["status"] in final:
            Snapshots(folder).clear()
        return path


def run_fields(experiment: Parameters, status: str, error: str | None) -> dict:
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": str(uuid.uuid4()),
        "experiment_id": experiment.id,
        "status": status,
        "error": error,
        "phase": experiment.phase,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _unscored(part: str, task: Task, *others: str) -> dict[str, None]:
    """The fields of a validation or test that did not take place."""
    per_image = [name for name, function in METRICS[task.name].items() if function]
    return {f"{part}_{name}": None for name in (task.metric, *per_image, *others)}


def _names(operators: Iterable[str]) -> str:
    return ", ".join(sorted({*operators}))


def _columns(record: dict, groups: Iterable[str] = GROUPS) -> dict:
    """The values of a record's groups under their names."""
    return {name: value for group in groups for name, value in record[group].items()}


def energy_source(windows: Iterable[Window]) -> str:
    """The first energy source that there is, or "fake" if any window is a simulated GPU's."""
    sources = [window.source for window in windows if window.source != "none"]
    return "fake" if "fake" in sources else next(iter(sources), "none")


def budget_mode(experiment: Parameters, device_total_bytes: int | None) -> str:
    """Whether the budget is the device itself (within 10 %: part of it is the driver's) or a share of it."""
    native = device_total_bytes is not None and device_total_bytes <= 1.1 * experiment.budget_bytes
    return "native" if native else "simulated"


def host_peak_bytes() -> int | None:
    """The highest resident memory of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def run_folder(experiment: Parameters, runs: Path | str = "") -> Path:
    """The folder of the record, notebook and snapshots of `experiment`, below `runs` (empty: data/runs)."""
    return Path(runs or RUNS) / experiment.name


def finished_folder(
    experiment: Parameters, runs: Path = RUNS, train_sha256: str | None = None, retry: Sequence[str] = ()
) -> Path | None:
    """The folder of a finished run of `experiment` that need not be repeated, or None.

    The previous schema named the same run otherwise: its folder is found by the parameters in its record.
    With `train_sha256`, a run on other training data does not count, nor do runs that ended as `retry` says.
    """
    folder = run_folder(experiment, runs)
    readable_name = folder.name.removesuffix(experiment.id)
    for other in (folder, *sorted(folder.parent.glob(f"{glob.escape(readable_name)}*"))):
        try:
            record = read_record(other / FILE_NAME)
        except InputError:
            continue
        run = record["run"]
        same = run.get("experiment_id") == experiment.id and run["status"] in set(FINISHED).difference(retry)
        if same and train_sha256 in (None, record["data"].get("train_sha256")):
            return other
    return None


def status_of(folder: Path) -> str | None:
    """The status of the record in `folder`; None if there is none that can be used."""
    try:
        return read_record(Path(folder) / FILE_NAME)["run"]["status"]
    except InputError:
        return None


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds the record of a run that ended with a result."""
    return status_of(folder) in FINISHED


def read_record(path: Path) -> dict:
    """The content of a record file; parameters and identity of older records are brought to today's schema.

    Raises `InputError` with the reason if the file cannot be used.
    """
    try:
        record = _verified(path)
        version, phase = record["run"]["schema_version"], record["run"]["phase"]
        if version not in READABLE:
            raise InputError(f"schema version {version!r}; this toolkit reads {READABLE}")
        _check_values(record)
        if phase == "training":  # parameters may have come since, at the values that they had before
            record["config"] = _completed(upgrade(record["config"]))
            record["run"]["experiment_id"] = identity(record["config"])
        elif version != SCHEMA_VERSION:
            record["config"]["budget"] = int(record["config"]["budget"])
            own = {name: value for name, value in record["config"].items() if name not in DISPLAYED}
            record["run"]["experiment_id"] = identity(own)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"not a record ({type(error).__name__}: {error})") from None
    return record


def _check_values(record: dict) -> None:
    """Raise an error for what no run has written and no table can show."""
    kinds = {"str": str, "int": int, "float": int | float, "bool": bool}
    types = {field.name: kinds[field.type] for field in fields(Experiment) if field.type in kinds}
    types |= {name: int | float for name, quantity in QUANTITIES.items() if quantity.better}
    types |= dict.fromkeys(("status", "phase", "experiment_id", "error"), str)
    values = [(group, *item) for group in GROUPS for item in record[group].items() if item[0] != "options"]
    values += [("options", *item) for item in record["config"].get("options", {}).items()]
    for group, name, value in values:
        if value is not None and not isinstance(value, types.get(name, str | int | float)):
            raise InputError(f"{group}.{name[:100]} is {reprlib.repr(value)}")
        size = len(value) if isinstance(value, str) else abs(value or 0)
        if len(name) > 100 or size >= (MOST_CHARACTERS if isinstance(value, str) else 2**63):
            raise InputError(f"{group}.{name[:100]} is too long: {reprlib.repr(value)}")
    for group in ("packages", "curves", "missing"):
        dict(record.get(group, {}))  # raises for other than a mapping


def _completed(parameters: dict) -> dict:
    """All parameters of a fine-tuning run; those that were unknown at the time have their defaults."""
    defaults = {field.name: field.default for field in fields(Experiment)}
    parameters = defaults | {"options": {}} | parameters
    kinds = []
    if parameters["method"] in METHODS:  # others were registered elsewhere
        kinds.append(METHODS[parameters["method"]].options)
    if parameters["checkpointing"] in STRATEGIES:
        kinds.append(STRATEGIES[parameters["checkpointing"]])
    options = {field.name: field.default for kind in kinds for field in fields(kind)}
    return parameters | {"options": options | parameters["options"]}


def load_records(folder: Path = RUNS) -> pd.DataFrame:
    """All records below `folder`, one row each, sorted by folder.

    Columns are the fields of `GROUPS`, options by their names, `budget_bytes`, and `folder`.  A file that
    cannot be read is left out with a warning; `frame.attrs["left_out"]` has the reason by path.
    """
    rows, options, left_out = [], set(), {}
    for path in sorted(Path(folder).glob(f"*/{FILE_NAME}")):
        try:
            record = read_record(path)
        except InputError as error:
            left_out[str(path)] = str(error)
            warnings.warn(f"{path} was left out: {error}", stacklevel=2)
            continue
        row = _columns(record)
        own = row.pop("options", {})
        options |= own.keys()
        row |= own | {"budget_bytes": row.pop("budget"), "folder": str(path.parent)}
        if row.get("energy_source") == "fake":  # a simulated GPU measures nothing
            row |= dict.fromkeys(SIMULATED)
        rows.append(row)
    frame = pd.DataFrame(rows)
    for name in options:  # a run without the option would turn integers into floats
        frame[name] = pd.Series([row.get(name) for row in rows], dtype=object)
    frame.attrs["left_out"] = left_out
    return frame


def load_curves(folder: Path) -> dict:
    """`history`, `memory_trace_bytes` and `windows` of the run in `folder`, as far as it has them."""
    return _verified(Path(folder) / FILE_NAME).get("curves", {})


def _verified(path: Path) -> dict:
    return read_sealed(Path(path), bare=[field.name for field in fields(RunRecord)])
