"""Under a plan, models that checkpoint themselves: by `gradient_checkpointing_enable()` and the like.

Their recomputation would come on top of the plan's, which knows better what to recompute.
"""

from __future__ import annotations

import functools
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.utils.checkpoint as checkpoints

NOTE = "the model's own checkpointing is off while the plan runs, which decides what is recomputed."

# Where `torch.utils.checkpoint.checkpoint` looks for its two ways; the name of the first differs by version.
_GENERATORS = [
    name
    for name in ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")
    if hasattr(checkpoints, name)
]
_stock = {name: getattr(checkpoints, name) for name in (*_GENERATORS, "CheckpointFunction")}
_lock = threading.Lock()
_threads: Counter[int] = Counter()  # threads in which they are off
_calls: Counter[int] = Counter()  # calls that ran plainly, by thread


@contextmanager
def own_checkpoints_off() -> Iterator[Callable[[], int]]:
    """Run what a model checkpoints by itself as plain calls, in this thread.

    Yields a function that returns how many there were.
    """
    thread = threading.get_ident()
    with _lock:
        if not _threads.total():
            _replace()
        _threads[thread] += 1
        before = _calls[thread]
    try:
        yield lambda: _calls[thread] - before
    finally:
        with _lock:
            _threads[thread] -= 1
            if not _threads.total():
                for name, stock in _stock.items():
                    setattr(checkpoints, name, stock)


def _replace() -> None:
    for name in _GENERATORS:
        setattr(checkpoints, name, functools.partial(_around, _stock[name]))
    checkpoints.CheckpointFunction = types.SimpleNamespace(apply=_reentrant)


def _is_off() -> bool:
    off = _threads[thread := threading.get_ident()] > 0
    _calls[thread] += off
    return off


def _around(stock: Callable, *args, **kwargs) -> Iterator[None]:
    """The generator around a call that is checkpointed without reentrance."""
    return iter((None,)) if _is_off() else stock(*args, **kwargs)


def _reentrant(function: Callable, preserve_random_state: bool, *args):
    if not _is_off():
        return _stock["CheckpointFunction"].apply(function, preserve_random_state, *args)
    asked = any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
    with torch.set_grad_enabled(torch.is_grad_enabled() and asked):  # as there
        return function(*args)
