"""The cache on disk: small answers by their question, and rows of frozen features.

Every entry is named after the hash of its question: a description, in what JSON has, of all that the answer
depends on.  The question is stored with the answer, and so is a digest: an entry for another question is not
used, and a damaged one is made again, with a warning.  Each kind of entry has a folder of limited size.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import numpy as np

from toolkit.errors import FileError
from toolkit.files import digest, read_sealed, sha256_of, write_sealed

MOST_BYTES = 20 * 10**9  # of each kind of entry
IN_USE_SECONDS = 3600
_DAMAGED = (OSError, ValueError, KeyError, RecursionError)


def kept(folder: Path, question: dict, make: Callable[[], dict]) -> dict:
    """The answer to `question` from `folder`; `make()`, of what JSON has, kept there for the next time.

    A folder that cannot be written to costs time in the next run, not this one's result: it is a warning.
    """
    path = Path(folder) / f"{digest(question)}.json"
    found = _read(path, question, path)
    if found is not None:
        return found["answer"]
    answer = make()
    try:
        write_sealed(path, {"question": question, "answer": answer})
        if path.name.startswith("00"):  # not at each one of many
            trim(path.parent)
    except OSError as error:  # without the file's name: one warning, not one for each answer
        warnings.warn(f"the answer is not kept in {folder}: {error.__cause__}", stacklevel=2)
    return answer


def _read(path: Path, question: dict, entry: Path) -> dict | None:
    """The sealed content of `path`; None if there is none, with a warning if it cannot be used."""
    try:
        content = read_sealed(path)
        if digest(content["question"]) != digest(question):
            raise ValueError("it answers another question")
        with contextlib.suppress(OSError):
            os.utime(path)  # for `trim`
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGED as error:
        warnings.warn(f"{entry} cannot be read and is made again: {error}", stacklevel=3)
        return None


class RowFile:
    """Records in a file, read when they are asked for by a list of rows.

    They are not mapped into memory: where a mapped file is truncated, the process dies.
    """

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            (self._count,), _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._start, self._file = file.tell(), os.dup(file.fileno())
        self._path = path
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        size = self.dtype.itemsize
        content = b"".join(os.pread(self._file, size, self._start + row * size) for row in rows)
        if len(content) < len(rows) * size:
            raise FileError(f"{self._path} was truncated while it was read; the next run makes it again.")
        return np.frombuffer(content, self.dtype)


def kept_rows(
    folder: Path, question: dict, count: int, make: Callable[[Callable[[np.ndarray], None]], dict]
) -> tuple[RowFile, dict, bool]:
    """`count` records in a file, the answer kept with them, and whether both were found.

    `make(write)`: passes arrays of a structured type, in order, to `write`, and returns the answer, of what
    JSON has.  Of several processes that ask the same question one makes the rows and the others wait.
    """
    own = Path(folder) / digest(question)
    own.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(own / ".lock"):
        answer = _whole(own, question)
        found = answer is not None
        if not found:
            answer = _written(own, question, count, make)
            trim(own.parent)
    return RowFile(own / "rows.npy"), answer, found


def _written(folder: Path, question: dict, count: int, make: Callable) -> dict:
    """Write `rows.npy`, whole or not at all, then `meta.json`, without which it does not count.

    Rows are written and not mapped: a full disk raises an error here, where a map would kill the process.
    """
    part, written = folder / "rows.part", 0  # always that name: a killed process leaves one file at most
    try:
        with open(part, "wb") as file:

            def write(records: np.ndarray) -> None:
                nonlocal written
                if not written:
                    header = {"descr": np.lib.format.dtype_to_descr(records.dtype), "shape": (count,)}
                    np.lib.format.write_array_header_1_0(file, header | {"fortran_order": False})
                file.write(records.data)
                written += len(records)

            answer = make(write)
            file.flush()
            os.fsync(file.fileno())
        if written != count:
            raise ValueError(f"{written} rows were made, not {count}")
        os.replace(part, folder / "rows.npy")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    meta = {"question": question, "answer": answer, "rows_sha256": sha256_of(folder / "rows.npy")}
    write_sealed(folder / "meta.json", meta)
    return answer


def _whole(folder: Path, question: dict) -> dict | None:
    """The answer in `folder` if its rows are what was written; None, with a warning if they are damaged."""
    meta = _read(folder / "meta.json", question, folder)
    if meta is None:
        return None
    with contextlib.suppress(OSError):
        if sha256_of(folder / "rows.npy") == meta["rows_sha256"]:
            return meta["answer"]
    warnings.warn(f"{folder} cannot be read and is made again: rows.npy is damaged", stacklevel=3)
    return None


def entries(folder: Path) -> dict[Path, tuple[float, int]]:
    """Each entry in a folder of the cache, least recently used first: when that was, and its bytes."""
    found = {}
    for path in Path(folder).glob("*"):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            states = [file.stat() for file in files]
            found[path] = (max((s.st_mtime for s in states), default=0.0), sum(s.st_size for s in states))
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def trim(folder: Path, most_bytes: int = MOST_BYTES) -> int:
    """Remove the least recently used entries of `folder` until the others take `most_bytes`; returns bytes.

    Entries in use stay, as does what is not an hour old: it may be being written.
    """
    found, freed = entries(folder), 0
    total = sum(size for _, size in found.values())
    for path, (used_at, size) in found.items():
        if total - freed <= most_bytes:
            break
        if most_bytes and time.time() - used_at < IN_USE_SECONDS:
            continue
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            freed += size
    return freed
