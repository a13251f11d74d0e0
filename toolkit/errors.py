"""The one error for input that a person can correct, and the one way to choose among names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input.  The message names the input and the remedy; the command line exits with status 2."""


def check_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return `name` if it is one of `valid`; otherwise raise with the list and the nearest match."""
    valid = list(valid)
    if name in valid:
        return name
    nearest = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise InputError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


def one_line(error: Exception) -> str:
    """The message of an error without line breaks; its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
