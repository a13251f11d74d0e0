"""What stands around a training loop: Ctrl-C between steps, one process per folder."""

from __future__ import annotations

import contextlib
import signal
import threading
from pathlib import Path

import filelock

from toolkit.errors import InputError

# A killed sweep leaves kernels that need a few seconds to notice that their parent is gone.
CLAIM_SECONDS = 20


class Interrupt:
    """Turns the first Ctrl-C into a wish that the loop reads between steps; the second one raises.

    An interrupt in the middle of an optimizer step would leave weights that no snapshot should hold.
    """

    def __init__(self) -> None:
        self.wanted = False

    def _handle(self, signum, frame) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __enter__(self) -> Interrupt:
        self._main_thread = threading.current_thread() is threading.main_thread()
        if self._main_thread:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc) -> None:
        if self._main_thread:
            signal.signal(signal.SIGINT, self._previous)


@contextlib.contextmanager
def claim(folder: Path | None):
    """Hold `folder` for this process.  The operating system lets go when the process dies."""
    if folder is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=CLAIM_SECONDS)
    except filelock.Timeout:
        raise InputError(f"another process is training in {folder}; wait for it or stop it.") from None
    try:
        yield
    finally:
        lock.release()
