"""Signals for kernels: what asks a sweep to stop is passed on to the run, which saves its state.

A kernel is a process of its own session, so it gets neither Ctrl-C nor what a job scheduler sends to the
process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

from toolkit.batch.warm_kernels import WarmKernelManager
from toolkit.errors import Stopped, stop_signals

WAIT_SECONDS = 0.1  # between looks at kernels that were told to stop


class _Notebook:
    """A notebook that is being executed."""

    def __init__(self) -> None:
        self.pid: int | None = None  # of its kernel
        self.signal: int | None = None

    def stop(self, number: int) -> None:
        """Tell the kernel, which may be in `fit`: that saves its state at SIGTERM."""
        self.signal = number
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


_running: set[_Notebook] = set()  # in this process


@contextlib.contextmanager
def passing_on_signals() -> Iterator[type[WarmKernelManager]]:
    """A class of kernels that get the signals that this process gets in the body of a with statement.

    If there was one, raises `Stopped` when the body, which waits for the kernel, has ended, however it ended.
    """
    notebook = _Notebook()

    class Kernel(WarmKernelManager):
        async def start_kernel(self, **options: object) -> None:
            await super().start_kernel(**options)
            notebook.pid = self.provisioner.pid
            if notebook.signal is not None:
                notebook.stop(notebook.signal)

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGINT == notebook.signal:
            raise KeyboardInterrupt
        notebook.stop(number)

    _running.add(notebook)
    try:
        with stop_signals(handle):
            yield Kernel
    except Exception:
        if notebook.signal is None:
            raise
    finally:
        _running.discard(notebook)
    if notebook.signal is not None:
        raise Stopped(notebook.signal)


async def stop_all() -> None:
    """Tell all kernels of this process to stop, and wait for them."""
    for notebook in list(_running):
        notebook.stop(signal.SIGTERM)
    while _running:
        await asyncio.sleep(WAIT_SECONDS)
