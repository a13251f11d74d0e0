"""How a killed or stopped run continues: Ctrl-C between steps, one process per folder, and snapshots.

A snapshot is one file plus a manifest with its sha256, each written whole or not at all.  If a file was
truncated or a bit flipped, which neither torch nor safetensors would notice, the one before it is used.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import signal
import threading
import time
from pathlib import Path

import filelock
import torch

from toolkit.errors import InputError
from toolkit.files import sha256_of, write_atomically

CLAIM_SECONDS = 20  # kernels of a killed sweep need a few seconds to notice that their parent is gone
KEPT = 2  # snapshots
SAVE_SHARE = 0.02  # of the time, at most, is spent on saving


class Interrupt:
    """Turns the first Ctrl-C into a request that the loop reads between steps; the second one raises.

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
    """Hold `folder` for this process; the operating system releases it when the process dies."""
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


class Snapshots:
    """The snapshots of the run in `folder`, written at most every `seconds`; without a folder, none."""

    def __init__(self, folder: Path | None, seconds: float = 0.0):
        self.folder = None if folder is None else Path(folder) / "snapshots"
        self._seconds = seconds
        self._next_at = -math.inf  # on the clock; the first step is saved: a full disk shows up early

    @property
    def due(self) -> bool:
        """Whether the state should be saved now."""
        return self.folder is not None and time.perf_counter() > self._next_at

    def save(self, step: int, state: dict) -> None:
        """Write `state` (tensors and plain Python values) as the snapshot of `step`; remove old ones."""
        start = time.perf_counter()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"step-{step:08d}.pt"
        write_atomically(path, buffer.getvalue())
        manifest = {"step": step, "sha256": sha256_of(path)}
        write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())
        for old in sorted(self.folder.glob("step-*.json"))[:-KEPT]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)
        now = time.perf_counter()
        self._next_at = now + max(self._seconds, (now - start) / SAVE_SHARE)

    def newest(self) -> dict | None:
        """State of the newest snapshot whose digest is right, or None if there is none."""
        if self.folder is None:
            return None
        for manifest_path in sorted(self.folder.glob("step-*.json"), reverse=True):
            path = manifest_path.with_suffix(".pt")
            try:
                intact = sha256_of(path) == json.loads(manifest_path.read_text())["sha256"]
            except (OSError, ValueError, KeyError):
                intact = False
            if intact:
                return torch.load(path, map_location="cpu", weights_only=True)
            print(f"snapshot {path.name} is damaged; looking for an older one")
        return None

    def clear(self) -> None:
        """Remove all snapshots: the run is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
