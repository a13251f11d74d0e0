"""Training state on disk, so that a killed run goes on where it was.

A snapshot is one file plus a manifest with its sha256; both appear whole or not at all.  A file that
was truncated or flipped a bit fails its digest and the one before it is used (neither torch nor
safetensors would notice a flipped bit).
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import torch

from toolkit.files import sha256_of, write_atomically

KEPT = 2


def save_snapshot(folder: Path, step: int, state: dict) -> None:
    """Write `state` (tensors and plain Python values) as the snapshot of `step`; older ones go."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, buffer.getvalue())
    manifest = {"step": step, "sha256": sha256_of(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())
    for old in sorted(folder.glob("step-*.json"))[:-KEPT]:
        old.unlink()
        old.with_suffix(".pt").unlink(missing_ok=True)


def load_newest_snapshot(folder: Path) -> dict | None:
    """State of the newest snapshot whose digest is right, or None if there is none."""
    for manifest_path in sorted(folder.glob("step-*.json"), reverse=True):
        path = manifest_path.with_suffix(".pt")
        try:
            intact = sha256_of(path) == json.loads(manifest_path.read_text())["sha256"]
        except (OSError, ValueError, KeyError):
            intact = False
        if intact:
            return torch.load(path, map_location="cpu", weights_only=True)
        print(f"snapshot {path.name} is damaged; looking for an older one")
    return None


def clear_snapshots(folder: Path) -> None:
    """Remove all snapshots: the run is finished."""
    shutil.rmtree(folder, ignore_errors=True)
