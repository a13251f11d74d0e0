"""Rows of cached features and labels in files: their layout, writing them, and whether they are whole.

One .npy file per split, mapped into memory and read by row.  `meta.json` beside them is written last, with
the key in words and the digests of the files: without it nothing counts, so what a killed process leaves is
computed anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from toolkit.errors import InputError
from toolkit.files import sha256_of, write_atomically
from toolkit.measure import Window

# By precision: how features are stored, and what numpy calls that; it has no bfloat16, so its bits are kept.
STORED = {
    "fp32": (torch.float32, "<f4"),
    "bf16": (torch.bfloat16, "<i2"),
    "fp16": (torch.float16, "<f2"),
}
META = "meta.json"


@dataclass(frozen=True)
class Layout:
    """How the features of an image lie in one row of F numbers: tensors of these shapes, one after another.

    `dtypes`: of the tensors as the backbone gives them (names of torch's), and as `unpack` gives them back;
    `precision`: of the row.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    precision: str

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def dtype(self) -> torch.dtype:
        """Of the row."""
        return STORED[self.precision][0]

    @property
    def record(self) -> np.dtype:
        """A row in the file: features and label."""
        return np.dtype([("features", STORED[self.precision][1], (sum(self.sizes),)), ("label", "<i8")])

    def pack(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Tensors (B, *shape) as rows (B, F)."""
        return torch.cat([part.flatten(1).to(self.dtype) for part in features], dim=1)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows (B, F) as tensors (B, *shape): views, where the type of the row is theirs."""
        parts = rows.split(self.sizes, dim=1)
        return tuple(
            part.unflatten(1, shape).to(getattr(torch, dtype))
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes)
        )

    def records(self, rows: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
        """Rows (B, F) and labels (B,) as they stand in the file."""
        records = np.empty(len(labels), self.record)
        bits = rows.cpu().view(torch.int16) if self.dtype == torch.bfloat16 else rows.cpu()
        records["features"], records["label"] = bits.numpy(), labels.numpy()
        return records


class Rows(Dataset):
    """The features of a split in its order, in a file mapped into memory: `(features (F,), label)`."""

    def __init__(self, path: Path, layout: Layout):
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        self._features, self._labels = records["features"], records["label"]
        self._dtype = layout.dtype

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        features, labels = self.__getitems__([index])
        return features[0], int(labels[0])

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch at once, as torch's loaders ask for it: (B, F) and int64 (B,)."""
        features, labels = (np.asarray(part[rows]) for part in (self._features, self._labels))
        return torch.from_numpy(features).view(self._dtype), torch.from_numpy(labels)


def write_rows(path: Path, batches: Iterable[np.ndarray], count: int, record: np.dtype) -> dict:
    """Stream `count` records into a .npy file that appears whole; returns its size and digest.

    Written and not mapped: a full disk raises an error here, where a map would end the process.
    """
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, description)
    part = path.with_suffix(".part")  # one name, as one process writes at a time: at most one is left over
    digest = hashlib.sha256(header.getvalue())
    try:
        with open(part, "wb") as file:
            file.write(header.getvalue())
            for records in batches:
                file.write(records.data)
                digest.update(records.data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return {"bytes": size, "sha256": digest.hexdigest()}


def close_cache(folder: Path, key: dict, files: dict[str, dict], window: Window) -> None:
    """Declare the `files` in `folder`, as `write_rows` described them, whole and made for `key`."""
    meta = {"key": key, "files": files, "window": window.to_dict()}
    write_atomically(folder / META, json.dumps(meta, indent=1).encode())


def open_cache(folder: Path, key: dict) -> Window | None:
    """What the features in `folder` took to compute; None if they are not there, or damaged (it says so).

    Raises `InputError` for features that depend on something else than `key` says.
    """
    try:
        meta = json.loads((folder / META).read_bytes())
        found, files, window = dict(meta["key"]), dict(meta["files"]), Window(**meta["window"])
        expected = {folder / name: (each["bytes"], each["sha256"]) for name, each in files.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:  # a JSON error is a ValueError
        print(f"{folder / META} cannot be read ({error}): the features are computed anew")
        return None
    asked = json.loads(json.dumps(key))  # tuples are lists there
    different = sorted(name for name in asked.keys() | found.keys() if asked.get(name) != found.get(name))
    if different:
        raise InputError(
            f"{folder} holds features of other {' and '.join(different)}; give another folder, or remove "
            "this one."
        )
    for path, (size, digest) in expected.items():
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != digest:
            print(f"{path} is not what was written there: the features are computed anew")
            return None
    return window
