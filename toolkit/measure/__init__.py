"""Measures a run: time and energy (`Meter`), memory, floating-point operations (`flops`), scores."""

from toolkit.budget.flops import FlopCounter, Flops, flops
from toolkit.measure.meter import Meter
from toolkit.measure.sensors import GpuSensor, Nvml, Rapl, SensorError
from toolkit.measure.windows import Window, total

__all__ = [
    "FlopCounter",
    "Flops",
    "GpuSensor",
    "Meter",
    "Nvml",
    "Rapl",
    "SensorError",
    "Window",
    "flops",
    "total",
]
