"""The cache on disk: small answers by their question, and rows of frozen features, mapped into memory.

Every entry is named after the hash of its question: a description, in what JSON has, of all that the answer
depends on.  The question is stored with the answer, and an entry for another question is not used.  Damaged
entries are made again, with a warning.  Nothing in here is ever removed or updated.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np

from toolkit.files import sha256_of, write_atomically

_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def digest(question: dict) -> str:
    """Hex digest of a question, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------
# Small answers: one `.npz` file each, a zip archive, whose checksums tell damage


def read(folder: Path, question: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
    """The answer to `question` and its arrays; None if there is none, with a warning if it is damaged."""
    path = Path(folder) / f"{digest(question)}.npz"
    try:
        with io.BytesIO(path.read_bytes()) as content, np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        content = json.loads(arrays.pop("json").tobytes())
        _check_question(content, question)
        return content["answer"], arrays
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGED as error:
        warnings.warn(f"{path} cannot be read and is made again: {error}", stacklevel=2)
        return None


def write(folder: Path, question: dict, answer: dict, arrays: dict[str, np.ndarray]) -> None:
    """Keep `answer`, of what JSON has, and `arrays`, by names other than "json".

    A folder that cannot be written to costs time in the next run, not this one's result: it is a warning.
    """
    content = json.dumps({"question": question, "answer": answer}).encode()
    with io.BytesIO() as file:
        np.savez_compressed(file, json=np.frombuffer(content, np.uint8), **arrays)
        try:
            write_atomically(Path(folder) / f"{digest(question)}.npz", file.getvalue())
        except OSError as error:  # without the file's name: one warning, not one for each answer
            warnings.warn(f"the answer is not kept in {folder}: {error.strerror or error}", stacklevel=2)


def kept(folder: Path, question: dict, make: Callable[[], dict]) -> dict:
    """The answer to `question` from `folder`; `make()`, kept for the next time, if it is not there."""
    found = read(folder, question)
    if found is not None:
        return found[0]
    answer = make()
    write(folder, question, answer, {})
    return answer


# ---------------------------------------------------------------------------------------------------
# Rows: a folder each, with the records in `rows.npy` and the answer in `meta.json`


def kept_rows(
    folder: Path, question: dict, count: int, make: Callable[[Callable[[np.ndarray], None]], dict]
) -> tuple[np.ndarray, dict, bool]:
    """`count` records mapped into memory, the answer kept with them, and whether both were found.

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
    return np.load(own / "rows.npy", mmap_mode="r", allow_pickle=False), answer, found


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
    meta = {"question": question, "answer": answer, "sha256": sha256_of(folder / "rows.npy")}
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())
    return answer


def _whole(folder: Path, question: dict) -> dict | None:
    """The answer in `folder` if its rows are what was written; None, with a warning if they are damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        _check_question(meta, question)
        if sha256_of(folder / "rows.npy") != meta["sha256"]:
            raise ValueError("rows.npy is not what was written")
        return meta["answer"]
    except _DAMAGED as error:
        if (folder / "meta.json").exists():
            warnings.warn(f"{folder} cannot be read and is made again: {error}", stacklevel=3)
        return None


def _check_question(content: dict, question: dict) -> None:
    if content["question"] != json.loads(json.dumps(question)):  # tuples are lists there
        raise ValueError("it answers another question")
