"""Answers of the budget explorer and of forecasts on disk: one file each, named after the question.

The file is numpy's `.npz`, a zip archive, which checks itself.  The question is in it too: a file that
answers another one is not believed.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.files import write_atomically

_DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


def read(folder: Path, question: dict) -> tuple[dict, dict[str, np.ndarray]] | None:
    """The answer to `question` and its arrays; None if there is none, with a warning if it is damaged."""
    path = _path(folder, question)
    try:
        with io.BytesIO(path.read_bytes()) as content, np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        content = json.loads(arrays.pop("json").tobytes())
        if content["question"] != question:
            raise ValueError("it answers another question")
        return content["answer"], arrays
    except (FileNotFoundError, NotADirectoryError):
        return None
    except _DAMAGED as error:
        warnings.warn(f"{path} cannot be read and is made anew: {error}", stacklevel=2)
        return None


def write(folder: Path, question: dict, answer: dict, arrays: dict[str, np.ndarray]) -> None:
    """Keep `answer`, of what JSON has, and `arrays`, by names other than "json".

    A folder that cannot be written costs time the next time, and no work now: it is warned of.
    """
    content = json.dumps({"question": question, "answer": answer}).encode()
    with io.BytesIO() as file:
        np.savez_compressed(file, json=np.frombuffer(content, np.uint8), **arrays)
        try:
            write_atomically(_path(folder, question), file.getvalue())
        except OSError as error:  # without the file's name: one warning, not one for each answer
            warnings.warn(f"the answer is not kept in {folder}: {error.strerror or error}", stacklevel=2)


def kept(folder: Path, question: dict, make: Callable[[], dict]) -> dict:
    """The answer to `question` from `folder`, or from `make` if none is there that is whole."""
    found = read(folder, question)
    if found is not None:
        return found[0]
    answer = make()
    write(folder, question, answer, {})
    return answer


def digest(question: dict) -> str:
    """Hex digest of what JSON has, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _path(folder: Path, question: dict) -> Path:
    return Path(folder) / f"{digest(question)}.npz"
