"""The records below a folder, and why a file is none that can be reported on.

Records are other people's files: what has another version or fields of another kind is left out with its
reason, and text is made `visible`.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import pandas as pd

from toolkit.analysis.statistics import DATA, PARAMETERS, groups
from toolkit.analysis.tables import visible
from toolkit.errors import InputError
from toolkit.training.record import FILE_NAME, FINISHED, SCHEMA_VERSION, load_records

TEXT = ("experiment_id", "status", "phase", "dataset", "backbone", "method", "checkpointing", "budget")
# What a column holds numbers of is in its name; null where it was not measured.
NUMBER = re.compile(r"seed|threads|n_\w+|params_\w+|ns|ns_\w+|\w+_(bytes|seconds|pct|joules|watts|blocks)")
ALWAYS = (  # columns that the tables use, whether or not a record has them
    *TEXT, *PARAMETERS, *DATA, "seed", "folder", "error", "env_hash", "memory_source", "energy_source",
    "budget_mode", "code_sha256", "device_name", "driver", "python", "threads", "version_torch",
    "version_timm", "version_peft", "n_classes", "n_train", "n_val", "n_test", "n_broken",
    "test_top1_pct", "test_miou_pct", "test_map_pct",
    "train_peak_bytes", "predicted_peak_bytes", "within_budget", "checkpointed_blocks", "params_trainable",
)  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """What lies below a folder."""

    folder: Path
    frame: pd.DataFrame  # as `load_records`, with `environment`: finished runs of one may be compared
    skipped: dict[str, str]  # file, relative to the folder -> why it was left out

    @property
    def finished(self) -> pd.DataFrame:
        """Runs that ended with a result, out of memory and not-a-number among them."""
        return self.frame[self.frame.status.isin(FINISHED)]


def read_runs(folder: Path) -> Runs:
    """The records below `folder`; what is none, or none of this version, is named under `skipped`.

    Raises `InputError` if `folder` is a file.
    """
    folder = Path(folder).resolve()
    if folder.is_file():
        raise InputError(f"{folder} is a file; give the folder in which runs are kept.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frame = load_records(folder)
    parts = (str(warning.message).partition(" is no record and was left out: ") for warning in caught)
    skipped = {path: f"no record: {why}" for path, _, why in parts}
    seen, kept = {}, []
    for row in frame.to_dict("records"):
        why = _why_not(row)
        same = tuple(str(row.get(name)) for name in ("experiment_id", "env_hash", "train_sha256"))
        if why is None and (first := seen.setdefault(same, row["folder"])) != row["folder"]:
            why = f"a second record of the experiment in {Path(first).name}"
        kept.append(why is None)
        if why:
            skipped[str(Path(row["folder"], FILE_NAME))] = why
    frame = frame[kept].reset_index(drop=True)
    frame = frame.reindex(columns=list(dict.fromkeys([*frame.columns, *ALWAYS])))
    frame = pd.DataFrame({name: _read(frame[name]) for name in frame})
    if len(frame):  # methods and strategies in their order
        frame = pd.concat([group for _, group in groups(frame)], ignore_index=True)
    frame["environment"] = _environments(frame)
    named = {visible(os.path.relpath(path, folder)): visible(why) for path, why in skipped.items()}
    return Runs(folder, frame, dict(sorted(named.items())))


def _read(column: pd.Series) -> pd.Series:
    """A column of numbers, or with text that is `visible`."""
    if NUMBER.fullmatch(column.name):
        return pd.to_numeric(column)
    if column.name == "folder":
        return column
    return column.map(lambda value: visible(value) if isinstance(value, str) else value)


def _why_not(row: dict) -> str | None:
    """Why a record cannot be reported on, None if it can."""
    version = row.get("schema_version")
    if version != SCHEMA_VERSION:
        return f"schema version {short(version)}; this report reads version {SCHEMA_VERSION}"
    for name in TEXT:
        if not isinstance(row.get(name), str):
            return f"{name} is {short(row.get(name))}, not text"
    if not (row["budget"].isascii() and row["budget"].isdigit()):
        return f"budget is {short(row['budget'])}, not a number of bytes"
    for name, value in row.items():
        missing = value is None or value != value  # NaN
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        if isinstance(value, (list, dict)) or (NUMBER.fullmatch(name) and not (missing or number)):
            return f"{name} is {short(value)}, not one {'number' if NUMBER.fullmatch(name) else 'value'}"
        if name == "seed" and missing:
            return "it has no seed"
    return None


def _environments(frame: pd.DataFrame) -> pd.Series:
    """E1, E2, ... by number of finished runs: equal for runs that may be averaged, "–" for the unfinished.

    A run that could not measure goes with those of its environment that could.
    """
    kind = frame.env_hash.astype(str)
    for name in ("memory_source", "energy_source"):
        known = frame[name].where(frame[name] != "none")
        kind = kind + "|" + known.fillna(known.groupby(kind).transform("first")).fillna("").astype(str)
    counts = kind[frame.status.isin(FINISHED)].value_counts()
    order = sorted(counts.index, key=lambda name: (-counts[name], name))
    labels = kind.map({name: f"E{number}" for number, name in enumerate(order, start=1)})
    return labels.where(frame.status.isin(FINISHED), "–")
