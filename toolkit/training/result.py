"""`FitResult`: what `fit` gives back, and what a snapshot carries from process to process."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FitResult:
    """What training gave.  `status`: ok | oom | nan | interrupted."""

    status: str
    error: str | None = None
    history: list[dict] = field(default_factory=list)  # one row per epoch
    steps: int = 0
    # Totals of the meter's windows, by name: "fit" and its parts "train" (steps, data loading and the
    # "snapshot"s between steps) and "validation"; beside them "pause".  See measure.Window for fields.
    windows: dict[str, dict] = field(default_factory=dict)
    features_window: dict | None = None  # of computing cached features, in this run or before; None: none
    features_cached: bool = False  # they were there before this run
    data_seconds: float = 0.0  # of training, waiting for the next batch
    idle_watts: float | None = None  # as measured before training, if it was
    peak_bytes: int = 0  # device memory, highest moment of the training steps
    memory_source: str = ""
    checkpointed_blocks: int = 0  # in the last step
    predicted_peak_bytes: int | None = None  # by the plan, if the strategy is `planned`
    micro_batch_size: int = 0  # images per forward pass
    out_of_memory_retries: int = 0  # steps that ran out of memory and were repeated with less
    reserved_peak_bytes: int | None = None  # CUDA only: what the allocator held, fragmentation included
    context_bytes: int | None = None  # CUDA only: beside the allocator's
    device_used_bytes: int | None = None  # CUDA only: of the whole device, by anyone, at the end
    context_reason: str | None = None  # why these are None
    environment: dict = field(default_factory=dict)  # see environment.environment; as training began
    memory_trace: list[dict] = field(default_factory=list)  # one step, see MemoryTrace.segments
    step_flops: dict[str, float] = field(default_factory=dict)  # by phase, per image, of that step
    weights_sha256: str = ""  # of the model as it came to training
    resumes: int = 0
    started_at: str = ""  # UTC; the first start of a resumed run

    @property
    def train_seconds(self) -> float:
        """Time in the windows "train"."""
        return self.windows["train"]["seconds"] if "train" in self.windows else 0.0
