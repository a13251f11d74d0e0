"""What was computed once per image or per class, on disk, with what it cost.

A cached result is reported with the time, energy and memory of the run that computed it, so the machine
and its sensor are part of the key.  Each entry is a pair of files: `<key>.safetensors`, and `<key>.json`
with the key in words, the costs and the digest of the first; a pair that is damaged is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from toolkit.files import sha256_of, write_atomically
from toolkit.measure import Meter, Window
from toolkit.measure.environment import device_name


@dataclass(frozen=True)
class Cost:
    """Time and energy (`window`) and device memory of a computation; `cached`: in an earlier run."""

    window: Window
    peak_bytes: int
    cached: bool = False


def machine(device: torch.device, meter: Meter) -> dict:
    """What costs depend on beside what is computed."""
    return {
        "device": device_name(device.type),
        "threads": torch.get_num_threads(),
        "sensor": meter.gpu.name if meter.gpu else None,
    }


def read(folder: Path, key: dict) -> tuple[dict[str, torch.Tensor], Cost] | None:
    """Tensors by name and their cost; None if they are not there or not what was written."""
    tensors_file, meta_file = _files(folder, key)
    try:
        meta = json.loads(meta_file.read_bytes())
        if sha256_of(tensors_file) != meta["sha256"]:
            return None
        cost = Cost(Window(**meta["window"]), meta["peak_bytes"], cached=True)
        return safetensors.torch.load_file(tensors_file), cost
    except (OSError, ValueError, KeyError, TypeError):  # a JSON error is a ValueError
        return None


def write(folder: Path, key: dict, tensors: dict[str, torch.Tensor], cost: Cost) -> None:
    """Keep `tensors`, on the CPU, and what they cost."""
    tensors_file, meta_file = _files(folder, key)
    content = safetensors.torch.save(tensors)
    meta = {
        "key": key,
        "sha256": hashlib.sha256(content).hexdigest(),
        "window": cost.window.to_dict(),
        "peak_bytes": cost.peak_bytes,
    }
    write_atomically(tensors_file, content)
    write_atomically(meta_file, json.dumps(meta, indent=1).encode())


def _files(folder: Path, key: dict) -> tuple[Path, Path]:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{name}.safetensors", folder / f"{name}.json"
