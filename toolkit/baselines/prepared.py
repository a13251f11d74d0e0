"""A baseline ready for its test pass, with the cost of preparing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.data import DataLoader

from toolkit.budget import device_memory
from toolkit.measure import Window
from toolkit.training.feature_cache import STORED


def peak_bytes_of(device: torch.device, tensors: Iterable[torch.Tensor], run: Callable[[], object]) -> int:
    """Peak device memory of `run()` with these tensors on the device.

    Counting takes time: call it on the largest batch, before a clock starts.
    """
    memory = device_memory(device)
    memory.track(tensors)
    memory.reset_peak()
    with memory:
        run()
    return memory.peak_bytes


@dataclass
class Prepared:
    """A baseline ready for its test pass; `status` is ok, oom or nan, and without ok there is no `model`."""

    form: str  # of the weights
    batch_size: int
    predicted_peak_bytes: int | None
    memory_source: str
    environment: dict
    started_at: str  # UTC
    model: nn.Module | None = None  # forward(inputs) -> scores, float32 (B, classes)
    batches: DataLoader | None = None  # of the test split
    # Everything before the first test image, without loading the weights.  On the CPU, fitting a probe takes
    # longer than it would if its memory were not counted.
    window: Window = field(default_factory=lambda: Window("prepare", reason="it did not end well"))
    peak_bytes: int | None = None  # peak device memory of that time
    choices: dict = field(default_factory=dict)  # chosen settings, or validation accuracies to choose by
    val_top1_pct: float | None = None  # of the choice
    selection_rule: str = "nothing to choose"
    cached: bool | None = None  # whether features were: then `window` is of the run that computed them
    fitted: int = 0  # numbers that were fitted to training images
    unmatched_pct: float | None = None  # test images whose generated answer names no class
    weights_sha256: str = ""
    status: str = "ok"
    error: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations and of the weights that are not packed in four bits."""
        return STORED[self.form if self.form in STORED else "bf16"][0]

    def fail(self, status: str, error: str) -> None:
        """Note how the preparation ended, and free the model."""
        self.status, self.error, self.model = status, error, None
