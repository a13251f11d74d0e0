"""Faults drawn from a seed: a few in the default run, the campaign by `pytest -m faults`."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator

import pytest

HANGING_SECONDS = 120


def few_or_many(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize by the number of faults."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.faults)])


def damaged(rng: random.Random, content: bytes) -> bytes:
    """`content` with a flipped bit, an overwritten or zeroed stretch, cut, extended, or replaced."""
    if not content:
        return b"x"
    at = rng.randrange(len(content))
    end = min(len(content), at + rng.randint(1, 64))
    kind = rng.randrange(7)
    if kind <= 1:  # one bit, or one digit
        places = [i for i, c in enumerate(content) if chr(c).isdigit()] if kind else []
        at = rng.choice(places) if places else at
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(4)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + rng.randbytes(end - at) + content[end:]
    if kind == 3:
        return content[:at] + bytes(end - at) + content[end:]
    if kind == 4:
        return content[:at]
    if kind == 5:
        return content + rng.randbytes(rng.randint(1, 64))
    other = [b"", b"null", b"[]", b"3", b'"text"', b"{}", b"[" * 10_000, b'{"a":' * 10_000, rng.randbytes(99)]
    return rng.choice(other)


@contextlib.contextmanager
def not_hanging() -> Iterator[None]:
    """Raise in a test that hangs, after processor time that no fault should take."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"hung for {HANGING_SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANGING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
