"""What `fit` returns (`FitResult`), and the meter's windows that it is filled from (`RunWindows`).

Both go into snapshots, so that a resumed run reports the whole of its time and energy.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from toolkit.budget import DeviceMemory
from toolkit.measure import Meter, Window, total


@dataclass
class FitResult:
    """The outcome of training.  `status`: ok | oom | nan | interrupted."""

    status: str
    error: str | None = None
    history: list[dict] = field(default_factory=list)  # one row per epoch
    steps: int = 0
    # Totals of the meter's windows, by name: "fit" and its parts "train" (steps, data loading and the
    # "snapshot"s between steps) and "validation"; next to "fit" there is "pause".  Fields as in `Window`.
    windows: dict[str, dict] = field(default_factory=dict)
    features_cached: bool = False  # they were there before this run
    data_seconds: float = 0.0  # of training, waiting for the next batch
    idle_watts: float | None = None  # as measured before training, if it was
    peak_bytes: int = 0  # device memory, highest moment of the training steps
    memory_source: str = ""
    checkpointed_blocks: int = 0  # in the last step
    predicted_peak_bytes: int | None = None  # by the plan, if the strategy makes one
    micro_batch_size: int = 0  # images per forward pass
    out_of_memory_retries: int = 0  # steps that ran out of memory and were repeated on a tighter plan
    reserved_peak_bytes: int | None = None  # CUDA only: held by the allocator, fragmentation included
    context_bytes: int | None = None  # CUDA only: held outside of the allocator
    context_reason: str | None = None  # why context_bytes is None
    environment: dict = field(default_factory=dict)  # see environment.environment; as training began
    memory_trace: list[dict] = field(default_factory=list)  # one step, see MemoryTrace.segments
    step_flops: dict[str, float] = field(default_factory=dict)  # by phase, per image, of that step
    uncounted: list[str] = field(default_factory=list)  # operators of that step that have no formula
    weights_sha256: str = ""  # of the model before training
    resumes: int = 0
    images_skipped: int = 0  # in training, because their files had changed
    started_at: str = ""  # UTC; the first start of a resumed run

    def window(self, name: str) -> Window:
        """The total of the windows `name`; without seconds if there was none."""
        return Window(**self.windows[name]) if name in self.windows else total([], name)

    def read_peaks(self, memory: DeviceMemory) -> None:
        """Raise the peaks to those of `memory`."""
        self.peak_bytes = max(self.peak_bytes, memory.peak_bytes)
        if memory.reserved_peak_bytes is not None:
            self.reserved_peak_bytes = max(self.reserved_peak_bytes or 0, memory.reserved_peak_bytes)

    @property
    def train_seconds(self) -> float:
        """Time in the windows "train"."""
        return self.window("train").seconds or 0.0


class RunWindows:
    """`with windows.window("train"): ...`, many times; then `windows.measured("train")` is their sum."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.earlier: dict[str, dict] = {}  # `totals` of the processes that were killed
        self._windows: dict[str, list[Window]] = defaultdict(list)  # of this process

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Measure the body of a with statement."""
        with self.meter.window(name) as window:
            self._windows[name].append(window)
            yield window

    def measured(self, name: str) -> Window:
        """The sum of all windows `name` up to now, an open one included."""
        earlier = [Window(**self.earlier[name])] if name in self.earlier else []
        return total([*earlier, *(self.meter.so_far(window) for window in self._windows[name])], name)

    def totals(self) -> dict[str, dict]:
        """`measured` of all names, as plain values."""
        return self.earlier | {name: self.measured(name).to_dict() for name in list(self._windows)}
