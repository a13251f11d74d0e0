"""How fast a device is, as far as a plan needs to know: what an operator takes."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch

from toolkit.budget.profile import OpCost
from toolkit.budget.step import AUTOCAST


@dataclass(frozen=True)
class DeviceSpeed:
    """A roofline: an operator takes its arithmetic or its traffic, whichever is longer, and a launch.

    Meanwhile the host is busy with each operator too, which is what small batches wait for:
    `host_seconds` for its forward and backward pass, `record_seconds` more where a tape records it.  Both
    are assumed for a laptop; that recording costs three quarters of running was measured on a CPU.
    """

    flops_per_second: float
    bytes_per_second: float
    launch_seconds: float
    name: str = ""
    host_seconds: float = 40e-6
    record_seconds: float = 30e-6

    def op_seconds(self, op: OpCost) -> float:
        """Estimated time of one operator."""
        work = max(op.flops / self.flops_per_second, op.bytes_moved / self.bytes_per_second)
        return work + self.launch_seconds

    def step_seconds(self, device_seconds: float, ops: int, recorded: bool) -> float:
        """Estimated time of a forward and backward pass: the device's or, if longer, the host's."""
        return max(device_seconds, ops * (self.host_seconds + recorded * self.record_seconds))


# Used where nothing is measured.  Products are dear on it (4.5 FLOP per byte), so its plans are close to
# those that recompute the fewest FLOPs.
REFERENCE = DeviceSpeed(1e12, 224e9, 5e-6, name="reference: 1 TFLOP/s, 224 GB/s, 5 us a launch")


def speed_of(device: torch.device, precision: str) -> DeviceSpeed:
    """Measured on CUDA, once per process; the reference elsewhere, so that plans are the same everywhere."""
    return measure_speed(device, precision) if device.type == "cuda" else REFERENCE


@functools.cache
def measure_speed(device: torch.device, precision: str, side: int = 4096) -> DeviceSpeed:
    """Time a product of `side` x `side` matrices, a copy of 16 times their size, and a tiny operator."""
    dtype = AUTOCAST[precision] or torch.float32
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    block = torch.empty(16 * matrix.numel(), device=device, dtype=dtype)
    source = torch.empty_like(block)
    scalar = torch.zeros(1, device=device)
    return DeviceSpeed(
        2 * side**3 / _seconds(device, lambda: matrix @ matrix, 8),
        2 * block.nbytes / _seconds(device, lambda: block.copy_(source), 8),
        _seconds(device, lambda: scalar.add_(1), 1000),
        name=f"measured on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}",
    )


def _seconds(device: torch.device, run, times: int) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    wait()
    return (time.perf_counter() - start) / times
