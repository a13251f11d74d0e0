"""Provenance of a result besides its parameters: hardware, driver, libraries, settings, code."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from toolkit.files import CHECKOUT, ROOT
from toolkit.measure import Nvml, SensorError

PACKAGES = ("torch", "torchvision", "timm", "peft", "bitsandbytes", "transformers", "numpy")
# Recorded, but not a reason to keep two runs apart: the same code may have another commit (`code_sha256`
# identifies it), and two cards of one model in one machine share a sweep.
_NOT_IN_HASH = ("os", "gpu_uuid_sha256", "git_sha", "git_dirty")


def environment(device: str) -> dict:
    """Provenance of a run on `device`.  `env_hash` is equal for runs that may be averaged.

    GPU fields are None on the CPU, and where the driver does not report them.
    """
    fields = {
        "device_name": device_name(device),
        "cpu_name": _cpu_name(),  # it loads the data, within the time and energy of a run
        **_gpu(device),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "alloc_conf": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{f"version_{name}": _version(name) for name in ("toolkit", *PACKAGES)},
        "code_sha256": code_sha256(),
        **_git(),
    }
    hashed = {name: value for name, value in fields.items() if name not in _NOT_IN_HASH}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return fields | {"env_hash": digest[:16]}


def device_name(device: str) -> str:
    """The name of the GPU or CPU; `device`: cuda or cpu."""
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


@functools.cache
def installed_packages() -> dict[str, str]:
    """Version of every installed distribution."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a broken installation has none
            found.setdefault(name, distribution.version)  # the first one on the path is imported
    return {name: found[name] for name in sorted(found, key=str.lower)}


@functools.cache
def code_sha256() -> str:
    """Digest of this package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _gpu(device: str) -> dict:
    fields = dict.fromkeys(("driver", "power_limit_watts", "gpu_uuid_sha256", "device_total_bytes"))
    if device != "cuda":
        return fields
    fields["device_total_bytes"] = torch.cuda.get_device_properties().total_memory
    try:
        nvml = Nvml.of(torch.device("cuda"))
        fields["gpu_uuid_sha256"] = hashlib.sha256(nvml.uuid.encode()).hexdigest()[:16]
        fields["driver"] = nvml.driver_version()
        fields["power_limit_watts"] = nvml.power_limit_watts()
    except SensorError:
        pass  # the fields stay None
    return fields


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _git() -> dict:
    def git(*words: str) -> str | None:
        if not CHECKOUT:  # an installed package may lie in a repository of its user's
            return None
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Only files that affect results
    status = git("status", "--porcelain", "--", "toolkit", "notebooks", "data", "requirements.txt")
    return {"git_sha": git("rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}
