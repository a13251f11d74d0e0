"""Measuring a run: time and energy (`Meter`), memory, and floating-point operations (`flops`)."""

from toolkit.budget.flops import FlopCounter, Flops, flops
from toolkit.measure.meter import Meter, Window, total
from toolkit.measure.sensors import GpuSensor, Nvml, Rapl, SensorError

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
