"""The quantities that describe a run: the one table that records, tables and figures read.

A name is that of the field in a record and ends in the unit that the value is stored in; `unit` is the one
that people see.  A metric is a quantity with a function (`register_metric`): the test, the history of
training, records, tables and figures take it from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from toolkit.errors import InputError, check_name
from toolkit.measure.environment import PACKAGES

SCALES = {"MiB": 2**20, "M": 1e6}  # stored units in one shown unit; 1 for all other units
NOT_ENDED = "the run did not end well"


@dataclass(frozen=True)
class Quantity:
    """One row of the table."""

    name: str  # of the field in a record, its stored unit included
    label: str  # for people, without the unit
    unit: str = ""  # for people; "": a plain number or text
    digits: int = 2  # decimals shown
    better: str = ""  # "more" | "less"; "": neither
    missing: str = NOT_ENDED  # why a record may lack the value
    from_gpu_sensor: bool = False  # meaningless if the GPU is a simulated one

    @property
    def title(self) -> str:
        """The label with its unit, for the head of a column or an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def scale(self) -> float:
        """Stored units in one shown unit: divide by it to show a value."""
        return SCALES.get(self.unit, 1)

    def text(self, value: float | None) -> str:
        """A stored value in the shown unit, which is not repeated; "–" for None and NaN."""
        missing = value is None or value != value
        return "–" if missing else f"{value / self.scale:,.{self.digits}f}"


QUANTITIES: dict[str, Quantity] = {}  # by name
# By task: its metrics, each with the function that `evaluate` averages over images, if it has one.
METRICS: dict[str, dict[str, Callable[[Any, Any], Any] | None]] = defaultdict(dict)


def register(quantity: Quantity) -> Quantity:
    """Add a row to the table.  Raises `InputError` for a name that is taken by another row."""
    check_name("direction", quantity.better, ("more", "less", ""))
    if QUANTITIES.setdefault(quantity.name, quantity) != quantity:
        raise InputError(f"quantity {quantity.name!r} is registered already, with another meaning.")
    return quantity


def register_metric(
    quantity: Quantity, task: str = "classification", per_image: Callable[[Any, Any], Any] | None = None
) -> None:
    """Add a metric of `task`: the row `quantity`, and one each for its name after `train_`, `val_`, `test_`.

    `per_image(outputs, targets)` returns one value for each image of a batch, (B,); a split's value is their
    mean.  If the unit is per cent, the values are shares from 0 to 1.  None for a metric that the task's own
    score computes, such as mean IoU, which is not a mean over images.
    """
    register(quantity)
    validated = quantity.missing.replace(NOT_ENDED, "nothing was validated")
    for part, words in (("train", "training"), ("val", "validation"), ("test", "test")):
        row = replace(quantity, name=f"{part}_{quantity.name}", label=f"{words} {quantity.label}")
        register(replace(row, missing=validated) if part == "val" else row)
    METRICS[task][quantity.name] = per_image


_SENSOR = "the sensor does not report it"
_UNTRACED = "no training step was traced"
_DRIVER = "the run was on the CPU, or the driver does not report it"
_ENERGY = {"unit": "J", "better": "less", "from_gpu_sensor": True}
_SECONDS = {"unit": "s", "digits": 1, "better": "less"}
_BYTES = {"unit": "MiB", "better": "less"}
_FLOPS = {"unit": "M", "digits": 1, "better": "less"}
_DECIBELS = {"unit": "dB", "better": "more"}

for _quantity in (
    # What it takes to get a classifier: columns of `analysis.statistics.adaptation`.
    Quantity("peak_bytes", "peak memory", **_BYTES),
    Quantity("adapt_seconds", "time", **_SECONDS),
    Quantity("adapt_joules", "energy", digits=0, **_ENERGY),
    # Quality
    Quantity("train_loss", "training loss", digits=4, better="less"),
    Quantity("val_loss", "validation loss", digits=4, better="less"),
    Quantity(
        "test_loss", "test loss", digits=4, better="less",
        missing=f"{NOT_ENDED}, or the model's answers have no loss in a test",
    ),
    Quantity(
        "unmatched_pct", "unmatched answers", "%", better="less",
        missing=f"no answer has to be matched, or {NOT_ENDED}",
    ),
    Quantity("params_total", "parameters", "M", better="less"),
    Quantity("params_trainable", "trainable parameters", digits=0, better="less"),
    Quantity("adapter_bytes", "adapter", **_BYTES),
    Quantity("weights_sha256", "weights"),
    # Time
    Quantity("train_seconds", "training time", **_SECONDS),
    Quantity("data_seconds", "time waiting for data", **_SECONDS),
    Quantity("features_seconds", "time for cached features", **_SECONDS),
    Quantity("validation_seconds", "validation time", **_SECONDS),
    Quantity("snapshot_seconds", "time for snapshots", **_SECONDS),
    Quantity("test_seconds", "test time", **_SECONDS),
    Quantity("prepare_seconds", "preparation time", **_SECONDS),
    Quantity("prepare_cached", "preparation cached", missing="this protocol caches nothing"),
    # Energy; most reasons come from the sensor itself, see `Window.reason`
    Quantity("energy_joules", "energy of the whole run", digits=1, missing=_SENSOR, **_ENERGY),
    Quantity("features_energy_joules", "energy for cached features", digits=1, missing=_SENSOR, **_ENERGY),
    Quantity("train_energy_joules", "training energy", digits=1, missing=_SENSOR, **_ENERGY),
    Quantity("validation_energy_joules", "validation energy", digits=1, missing=_SENSOR, **_ENERGY),
    Quantity("test_energy_joules", "test energy", digits=1, missing=NOT_ENDED, **_ENERGY),
    Quantity("prepare_joules", "preparation energy", digits=1, missing=_SENSOR, **_ENERGY),
    Quantity("train_quantisation_joules", "resolution of training energy", missing=_SENSOR, **_ENERGY),
    Quantity("test_quantisation_joules", "resolution of test energy", missing=NOT_ENDED, **_ENERGY),
    Quantity(
        "train_poll_joules", "training energy from polled power", digits=1,
        missing="power could not be read throughout", **_ENERGY,
    ),
    Quantity(
        "train_net_joules", "training energy above idle", digits=1,
        missing="idle power was not measured", **_ENERGY,
    ),
    Quantity(
        "train_disagreement_pct", "counter against polled power", "%",
        missing="counter and polling did not both work throughout", from_gpu_sensor=True,
    ),
    Quantity("train_cpu_joules", "training energy of the CPU", "J", 1, "less", missing=_SENSOR),
    Quantity("idle_watts", "idle power", "W", missing="idle power was not measured", from_gpu_sensor=True),
    # Memory
    Quantity("budget_bytes", "budget", "MiB"),
    Quantity("train_peak_bytes", "peak memory of training", missing="no training step was begun", **_BYTES),
    Quantity("test_peak_bytes", "peak memory of the test", **_BYTES),
    Quantity("prepare_peak_bytes", "peak memory of preparation", **_BYTES),
    Quantity("host_peak_bytes", "host memory", missing="this operating system does not report it", **_BYTES),
    Quantity(
        "train_reserved_peak_bytes", "peak memory reserved",
        missing="only the allocator of CUDA reserves memory", **_BYTES,
    ),
    Quantity("context_bytes", "CUDA context", missing="training was not begun", **_BYTES),
    Quantity(
        "predicted_peak_bytes", "predicted peak memory", "MiB",
        missing="only the strategy planned, and baselines with published weights, are predicted",
    ),
    Quantity("within_budget", "within budget"),
    Quantity("micro_batch_images", "micro-batch", digits=0, missing="no training step was begun"),
    # Work
    Quantity("forward_flops_per_image", "forward FLOPs per image", missing=_UNTRACED, **_FLOPS),
    Quantity("backward_flops_per_image", "backward FLOPs per image", missing=_UNTRACED, **_FLOPS),
    Quantity("recompute_flops_per_image", "recomputed FLOPs per image", missing=_UNTRACED, **_FLOPS),
    Quantity("inference_macs_per_image", "multiply-adds per image", **_FLOPS),
    # Scores; `measure.scores.why_no_score` tells why one is missing
    Quantity("ns", "NetScore", **_DECIBELS),
    Quantity("ns_m_inference", "NetScore-M of the test", **_DECIBELS),
    Quantity("ns_m_training", "NetScore-M of training", **_DECIBELS),
    Quantity("ns_e_inference", "NetScore-E of the test", from_gpu_sensor=True, **_DECIBELS),
    Quantity("ns_e_training", "NetScore-E of training", from_gpu_sensor=True, **_DECIBELS),
    Quantity("ns_sharp_inference", "NetScore# of the test", from_gpu_sensor=True, **_DECIBELS),
    Quantity("ns_sharp_training", "NetScore# of training", from_gpu_sensor=True, **_DECIBELS),
    # Environment
    Quantity("driver", "driver", missing=_DRIVER),
    Quantity("power_limit_watts", "power limit", "W", 0, missing=_DRIVER),
    Quantity("gpu_uuid_sha256", "GPU", missing=_DRIVER),
    Quantity("device_total_bytes", "memory of the device", "MiB", missing=_DRIVER),
    Quantity("cuda", "CUDA", missing="the run was on the CPU"),
    Quantity("cudnn", "cuDNN", missing="the run was on the CPU"),
    Quantity("alloc_conf", "PYTORCH_ALLOC_CONF", missing="it is not set"),
    Quantity("git_sha", "commit", missing="the code is not in a git repository"),
    Quantity("git_dirty", "uncommitted changes", missing="the code is not in a git repository"),
    *(Quantity(f"version_{name}", name, missing="it is not installed") for name in PACKAGES),
):  # fmt: skip
    register(_quantity)
