"""Energy sensors: an NVIDIA GPU through NVML, the CPU through RAPL.

A sensor answers or raises `SensorError` with the reason.  Nothing is estimated from a data sheet, and a value
that cannot be read is never 0.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import torch


class SensorError(Exception):
    """A quantity that cannot be read, and why."""


class GpuSensor(Protocol):
    """The GPU readings that `Meter` uses.  Every method may raise `SensorError`."""

    name: str
    simulated: bool  # True: its readings are not measurements
    power_window_seconds: float  # averaging time of `watts`

    def counter_joules(self) -> float: ...  # energy since a fixed moment

    def watts(self) -> float: ...

    def celsius(self) -> float: ...

    def processes(self) -> dict[int, int | None]: ...  # process id -> bytes of device memory, if reported


class Nvml:
    """One NVIDIA GPU, by its UUID ("GPU-..."), through pynvml.

    The counter (`nvmlDeviceGetTotalEnergyConsumption`, millijoules since the driver was loaded) exists
    from Volta on.  Power is the instantaneous reading where the driver has one (field 186); otherwise
    `nvmlDeviceGetPowerUsage`, which on Ampere and newer is a mean over the last second (GA100: not).
    Raises `SensorError` if there is no such GPU.
    """

    def __init__(self, uuid: str):
        try:
            import pynvml
        except ImportError:
            raise SensorError("pynvml is not installed (pip install nvidia-ml-py)") from None
        self._nvml = pynvml
        self._call(pynvml.nvmlInit)
        self._handle = self._call(pynvml.nvmlDeviceGetHandleByUUID, uuid)
        self.uuid = uuid
        self.name = self._call(pynvml.nvmlDeviceGetName, self._handle)
        self.simulated = "simulated" in self.name.lower()  # the name of the simulated library in tests
        try:
            self._instant_watts()
            self.watts, self.power_window_seconds = self._instant_watts, 0.1
        except SensorError:
            self.watts, self.power_window_seconds = self._usage_watts, 1.0

    @classmethod
    def of(cls, device: torch.device) -> Nvml:
        """The sensor of a CUDA device, independent of the numbering by CUDA_VISIBLE_DEVICES."""
        return cls(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

    def _call(self, function, *arguments):
        try:
            return function(*arguments)
        except self._nvml.NVMLError as error:
            raise SensorError(f"NVML: {error}") from None

    def counter_joules(self) -> float:
        """Joules since the driver was loaded; the register moves every 10 to 100 ms."""
        return self._call(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle) / 1000

    def _usage_watts(self) -> float:
        return self._call(self._nvml.nvmlDeviceGetPowerUsage, self._handle) / 1000

    def _instant_watts(self) -> float:
        field = self._nvml.NVML_FI_DEV_POWER_INSTANT
        (value,) = self._call(self._nvml.nvmlDeviceGetFieldValues, self._handle, [field])
        if value.nvmlReturn != self._nvml.NVML_SUCCESS:
            raise SensorError(f"NVML: {self._nvml.NVMLError(value.nvmlReturn)}")
        if value.value.uiVal == 0:
            raise SensorError("NVML: instantaneous power is 0 W")
        return value.value.uiVal / 1000

    def celsius(self) -> float:
        """Temperature of the chip."""
        kind = self._nvml.NVML_TEMPERATURE_GPU
        return float(self._call(self._nvml.nvmlDeviceGetTemperature, self._handle, kind))

    def processes(self) -> dict[int, int | None]:
        """Compute processes on the GPU and their bytes (None if the driver does not report them: Windows)."""
        running = self._call(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        return {process.pid: process.usedGpuMemory for process in running}

    def power_limit_watts(self) -> float:
        """The enforced power limit."""
        return self._call(self._nvml.nvmlDeviceGetEnforcedPowerLimit, self._handle) / 1000

    def driver_version(self) -> str:
        """Version of the NVIDIA driver, on which the meaning of a power reading depends."""
        return self._call(self._nvml.nvmlSystemGetDriverVersion)


PACKAGE_WATTS = 1000  # no CPU package takes more


class Rapl:
    """Energy of all CPU packages (Intel and AMD) from Linux' powercap counters.

    The counters wrap around, after minutes on a busy server, so they must be read regularly.  One that goes
    backwards has wrapped if a package can have taken the energy up to its range and on to the new value;
    otherwise it was reset (the machine was suspended, the driver reloaded), and what was taken is unknown.
    Raises `SensorError` if there are no counters that this user may read (often root only).
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        try:
            zones = [z for z in sorted(root.glob("intel-rapl:*")) if z.name.count(":") == 1]
            self._zones = [z for z in zones if (z / "name").read_text().startswith("package")]
            self._range_microjoules = [int((z / "max_energy_range_uj").read_text()) + 1 for z in self._zones]
            self._last_microjoules = [self._read(zone) for zone in self._zones]
            self._last_seconds = time.monotonic()
        except (OSError, ValueError) as error:
            raise SensorError(f"RAPL: {error}") from None
        if not self._zones:
            raise SensorError(f"RAPL: no CPU package below {root}")
        self._microjoules = 0

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def counter_joules(self) -> float:
        """Joules since this object was made; after a reset, less than before."""
        try:
            now = [self._read(zone) for zone in self._zones]
        except (OSError, ValueError) as error:
            raise SensorError(f"RAPL: {error}") from None
        seconds = time.monotonic()
        possible = 1e6 * PACKAGE_WATTS * (seconds - self._last_seconds + 1)  # the counters lag behind
        gained, was_reset = 0, False
        for new, old, size in zip(now, self._last_microjoules, self._range_microjoules):
            gained += (new - old) % size
            was_reset |= new < old and new - old + size > min(possible, size / 2)
        self._microjoules += -1 if was_reset else gained
        self._last_microjoules, self._last_seconds = now, seconds
        return self._microjoules / 1e6
