"""How a killed or stopped run continues: signals between steps, one process per folder, and snapshots.

A snapshot is one file plus a manifest with its sha256, each written whole or not at all.  If a file was
truncated or a bit flipped, which neither torch nor safetensors would notice, the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import signal
import time
from pathlib import Path

import filelock
import torch

from toolkit.errors import InputError, stop_signals
from toolkit.files import read_sealed, remove_temporaries, sha256_of, write_atomically, write_sealed

CLAIM_SECONDS = 20  # kernels of a killed sweep need a few seconds to notice that their parent is gone
KEPT = 2  # snapshots
SAVE_SHARE = 0.02  # of the time, at most, is spent on saving, unless more than what follows could be lost:
MOST_LOST_SECONDS = 60
MOST_LOST_SHARE = 0.05  # of all steps


class Interrupt:
    """Turns a signal that asks to stop into a request that the loop reads between steps.

    In the middle of an optimizer step it would leave weights that no snapshot should hold.  Before the steps
    begin (`deferred` is False), and at a second Ctrl-C, it raises `KeyboardInterrupt`.  At the end a handler
    that somebody else had installed for the signal gets it, too.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # the first one
        self.deferred = False

    @property
    def wanted(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    def _handle(self, signum, frame) -> None:
        again = self.wanted and signum == signal.SIGINT
        self.signal = self.signal or signal.Signals(signum)
        if again or not self.deferred:
            raise KeyboardInterrupt

    def __enter__(self) -> Interrupt:
        self._handling = stop_signals(self._handle)
        self._previous = self._handling.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._handling.__exit__(None, None, None)
        handler = self._previous.get(self.signal)
        if callable(handler) and handler is not signal.default_int_handler:
            signal.raise_signal(self.signal)


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
        for place in (Path(folder), Path(folder) / "snapshots"):
            remove_temporaries(place)
        yield
    finally:
        lock.release()


class Snapshots:
    """The snapshots of the run of `total_steps` in `folder`, every `seconds`; without a folder, none."""

    def __init__(self, folder: Path | None, seconds: float = 0.0, total_steps: int = 1):
        self.folder = None if folder is None else Path(folder) / "snapshots"
        self._seconds, self._most_steps = seconds, MOST_LOST_SHARE * total_steps
        self._saved_step: int | None = None  # the first step is saved: a full disk shows up early

    def due(self, step: int) -> bool:
        """Whether the state after `step` should be saved now."""
        if self.folder is None or self._saved_step is None:
            return self.folder is not None
        wait = self._seconds if step - self._saved_step < self._most_steps else 0
        wait = min(max(wait, self._save_seconds / SAVE_SHARE), MOST_LOST_SECONDS)
        return time.perf_counter() - self._saved_at > wait

    def save(self, step: int, state: dict) -> None:
        """Write `state` (tensors and plain Python values) as the snapshot of `step`; remove old ones."""
        start = time.perf_counter()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"step-{step:08d}.pt"
        write_atomically(path, buffer.getvalue())
        write_sealed(path.with_suffix(".json"), {"step": step, "snapshot_sha256": sha256_of(path)})
        for old in sorted(self.folder.glob("step-*.json"))[:-KEPT]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)
        self._saved_step, self._saved_at = step, time.perf_counter()
        self._save_seconds = self._saved_at - start

    def newest(self) -> dict | None:
        """State of the newest snapshot whose digest is right, or None if there is none."""
        if self.folder is None:
            return None
        for manifest_path in sorted(self.folder.glob("step-*.json"), reverse=True):
            path = manifest_path.with_suffix(".pt")
            with contextlib.suppress(Exception):  # whatever content leads to that nobody here wrote
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() == read_sealed(manifest_path)["snapshot_sha256"]:
                    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            print(f"snapshot {path.name} is damaged; looking for an older one")
        return None

    def clear(self) -> None:
        """Remove all snapshots: the run is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
