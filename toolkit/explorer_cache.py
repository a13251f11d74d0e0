"""Answers of the budget explorer on disk: one file each, named after the question.

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
    except FileNotFoundError:
        return None
    except _DAMAGED as error:
        warnings.warn(f"{path} cannot be read and is made anew: {error}", stacklevel=2)
        return None


def write(folder: Path, question: dict, answer: dict, arrays: dict[str, np.ndarray]) -> None:
    """Keep `answer`, of what JSON has, and `arrays`, by names other than "json"."""
    content = json.dumps({"question": question, "answer": answer}).encode()
    with io.BytesIO() as file:
        np.savez_compressed(file, json=np.frombuffer(content, np.uint8), **arrays)
        write_atomically(_path(folder, question), file.getvalue())


def _path(folder: Path, question: dict) -> Path:
    name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{name}.npz"
