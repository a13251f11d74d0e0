"""The error for input that a person can fix, the checks that raise it, and signals that stop the work."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

# Ctrl-C, and what SLURM, Kubernetes, spot instances and `timeout` send some time before they kill.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def printable(text: str, breaks: bool = True) -> str:
    """`text` with control characters, and bytes that are no text, as escapes; `breaks` of lines stay."""
    return "".join(c if c.isprintable() or (breaks and c == "\n") else repr(c)[1:-1] for c in text)


class InputError(ValueError):
    """Bad input.  The message names the input and the remedy; the command line exits with status 2."""

    def __init__(self, message: str):
        short = re.sub(r"\S{500,}", lambda word: f"{word[0][:99]}…{word[0][-99:]}", message)
        super().__init__(printable(short))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: the message says what to do."""
        return [f"{type(self).__name__}: {self}"]


class FileError(InputError, OSError):
    """A file that cannot be written, or is not what was written."""


class Stopped(KeyboardInterrupt):
    """A signal has stopped the work; `status`: that of the process, by the custom of shells."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number
        self.status = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _stop(number: int, frame: object) -> NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def stop_signals(handler: Callable[[int, object], None] = _stop) -> Iterator[dict]:
    """Have `handler` called for `STOP_SIGNALS`, in the main thread; yields the handlers that there were."""
    main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS} if main_thread else {}
    try:
        yield previous
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


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
    return printable(" ".join(str(error).split())) or type(error).__name__


def some(names: Sequence[str]) -> str:
    """The first three of `names`, in words."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def option(
    default: object,
    text: str = "",
    *,
    between: tuple[float, float] | None = None,
    choices: Sequence[str] = (),
) -> dataclasses.Field:
    """A field of an `Options` class; `text` is the help of its command-line flag."""
    return dataclasses.field(
        default=default, metadata={"help": text, "between": between, "choices": tuple(choices)}
    )


@dataclass(frozen=True)
class Options:
    """Base of frozen dataclasses whose values are checked: type, range and choices of each field.

    An int is accepted for a float and a path for text.  Raises `InputError`.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the options."""
        return tuple(field.name for field in fields(cls))


def _checked(field: dataclasses.Field, value: object) -> object:
    name = getattr(field.type, "__name__", field.type)
    expected = _TYPES.get(name)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if expected is str and isinstance(value, Path):
        value = str(value)
    wrong = expected and (not isinstance(value, expected) or (expected is int and isinstance(value, bool)))
    if wrong:
        raise InputError(f"{field.name} must be {name}, got {value!r} ({type(value).__name__}).")
    if field.metadata.get("between"):
        low, high = field.metadata["between"]
        if not low <= value <= high:
            raise InputError(f"{field.name} must lie between {low} and {high}, got {value}.")
    if field.metadata.get("choices"):
        check_name(field.name, value, field.metadata["choices"])
    return value
