"""Failures to load a model's files as one error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import InputError, one_line


@contextmanager
def opening(source: str | Path) -> Iterator[None]:
    """Raise `InputError` if the files of `source` cannot be fetched, are damaged or of another kind.

    Any exception becomes that error: libraries raise many types for such files, and their messages tell a
    missing network from a missing consent, name or revision.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".")
        raise InputError(
            f"{source} cannot be loaded ({reason}). Connect to the Hugging Face hub once, so that its files "
            "are cached, or name a folder that holds all of them."
        ) from error
