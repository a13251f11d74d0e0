"""`Meter`: seconds and joules of named windows that add up.

All windows of a meter read one pair of running integrals at their edges, so a window is a difference,
neighbouring windows sum to the window that encloses them, and a nested window is a part of its parent that is
never added to it a second time.  (The published meter of arXiv 2607.02158 adds recomputation to the
training steps that contain it: +21.5 % energy, +22.2 % time in its own log.)

GPU energy comes from the driver's energy counter.  Power is also polled ten times a second while a window is
open: as a cross-check, and as the fallback where the counter fails.  A figure that could not be measured is
None with a reason, never 0.  NVML's sensors are off by several per cent (arXiv 2312.02741: mostly within
6 %, up to 11 %), which no software can correct: compare runs on one card.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from toolkit.errors import InputError
from toolkit.measure.sensors import GpuSensor, Nvml, Rapl, SensorError
from toolkit.measure.windows import (
    BELOW_RESOLUTION,
    GAP_SECONDS,
    TICK_SECONDS,
    Integral,
    Integrator,
    Reading,
    Window,
)

POLL_SECONDS = 0.1
SETTLE_SECONDS = 1.0  # one averaging window of the slowest sensors


class Meter:
    """Measures windows: `with meter.window("train") as window: ...`, then `window.energy_joules`.

    `device`: the device to measure (default: the current CUDA device if there is one); windows wait for its
    work at their edges and nowhere else.  `gpu`, `cpu`: sensors instead of NVML's and RAPL's, or None for
    none.  `clock` has `perf_counter()` and `sleep()`.  `poll_seconds`: None if the caller polls with
    `sample()`.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        gpu: GpuSensor | str | None = "auto",
        cpu: Rapl | str | None = "auto",
        clock=time,
        poll_seconds: float | None = POLL_SECONDS,
    ):
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.gpu, self.reason = _sensor(gpu, self._open_nvml)
        self.cpu, self.cpu_reason = _sensor(cpu, Rapl)
        errors: list[str] = []  # only asking tells whether a reading exists
        self._has_counter = _asked(self.gpu, "counter_joules", errors) is not None
        self._has_power = _asked(self.gpu, "watts", errors) is not None
        if self.gpu and not (self._has_counter or self._has_power):
            self.gpu, self.reason = None, errors[-1]
        self.idle_watts: float | None = None
        self.poller_cpu_seconds = 0.0  # CPU time of the polling thread
        self._clock, self._poll_seconds = clock, poll_seconds
        self._lock = threading.Lock()
        self._open: list[tuple[Window, Reading, Integral]] = []
        self._integrator = Integrator()
        self._poller: threading.Thread | None = None
        self._stop = threading.Event()

    def _open_nvml(self) -> Nvml:
        if self.device.type != "cuda":
            raise SensorError(f"the {self.device.type} has no GPU energy counter")
        return Nvml.of(self.device)

    def __str__(self) -> str:
        gpu = self.gpu.name if self.gpu else f"none ({self.reason})"
        cpu = "RAPL" if self.cpu else f"none ({self.cpu_reason})"
        idle = "" if self.idle_watts is None else f", {self.idle_watts:.1f} W idle"
        return f"GPU energy: {gpu}{idle}; CPU energy: {cpu}"

    @contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Measure the body of a with statement; windows may nest, under different names."""
        if any(window.name == name for window, _, _ in self._open):
            raise InputError(f"window {name!r} is open already; a window cannot contain itself.")
        window = Window(name, start_celsius=self._celsius())
        self._synchronize()
        with self._lock:
            reading = self._read()
            if self._open:
                self._open[-1][0].children.append(window)
            self._open.append((window, reading, self._integrator.value))
        window.reason = reading.error
        self._note_company(window)
        if len(self._open) == 1:
            self._start_polling()
        try:
            yield window
        finally:
            try:
                self._synchronize()
            finally:
                self._close(window)

    def _close(self, window: Window) -> None:
        with self._lock:
            place = next(i for i, (other, _, _) in enumerate(self._open) if other is window)
            try:
                reading = self._read()
            finally:  # the window closes even if reading fails
                if place < len(self._open) - 1:
                    window.flags.append("overlaps")  # for example in a generator that was left open
                _, start, value = self._open.pop(place)
                measured = self._integrator.value.since(value)
                if not self._open:
                    self._integrator.forget()
                    self._stop.set()
        if not self._open:
            self._stop_polling()
        window.end_celsius = self._celsius()
        self._note_company(window)
        self._fill(window, reading.seconds - start.seconds, measured)

    def so_far(self, window: Window) -> Window:
        """The figures of an open window until now; a closed window unchanged."""
        if window.seconds is not None:
            return window
        with self._lock:
            reading = self._read()
            start, value = next((s, v) for w, s, v in self._open if w is window)
            copy = dataclasses.replace(window, flags=list(window.flags))
            self._fill(copy, reading.seconds - start.seconds, self._integrator.value.since(value))
            return copy

    def measure_idle(self, seconds: float = 5.0) -> float | None:
        """Measure idle power in watts and store it in `idle_watts`; None without a GPU sensor.

        Call it before the run: "idle" is the device as this process finds it.
        """
        if self.gpu is None:
            return None
        self._synchronize()
        self._clock.sleep(SETTLE_SECONDS)
        with self.window("idle") as window:
            self._clock.sleep(seconds)
        self.idle_watts = None if window.energy_joules is None else window.energy_joules / window.seconds
        return self.idle_watts

    def sample(self) -> None:
        """Take one reading of all sensors; the poller does this while a window is open."""
        with self._lock:
            if self._open:
                self._read()

    def _read(self) -> Reading:
        """Read all sensors and bring the integrals up to now.  Needs the lock."""
        before = self._clock.perf_counter()
        errors: list[str] = []
        joules = _asked(self.gpu, "counter_joules", errors) if self._has_counter else None
        watts = _asked(self.gpu, "watts", errors) if self._has_power else None
        cpu_joules = _asked(self.cpu, "counter_joules", [])
        seconds = (before + self._clock.perf_counter()) / 2
        reading = Reading(seconds, joules, watts, cpu_joules, errors[-1] if errors else None)
        gap_seconds = seconds - self._integrator.last.seconds if self._integrator.last else 0.0
        flags = self._integrator.add(reading)
        if reading.error:
            flags.append("sensor_failed")
        if self.gpu and gap_seconds > GAP_SECONDS:
            flags.append("sampling_gap")
        for window, _, _ in self._open:
            window.samples += 1
            window.max_gap_seconds = max(window.max_gap_seconds, gap_seconds)
            window.flags.extend(flag for flag in flags if flag not in window.flags)
            window.reason = reading.error or window.reason
        return reading

    def _fill(self, window: Window, seconds: float, measured: Integral) -> None:
        """Fill in the figures of a window from the difference of two integrals."""
        window.samples += 1  # the reading that opened it
        window.seconds = seconds
        if self.cpu is None:
            window.cpu_reason = self.cpu_reason
        elif "cpu_counter_reset" in window.flags:
            window.cpu_reason = "RAPL's counters were reset in this window"
        elif measured.uncounted_cpu_seconds:
            window.cpu_reason = f"RAPL could not be read for {measured.uncounted_cpu_seconds:.1f} s"
        else:
            window.cpu_joules = measured.cpu_joules
        if self.gpu is None:
            window.reason = self.reason
            return
        if self.gpu.simulated:
            window.flags.append("simulated")
        if self.idle_watts is not None:
            window.idle_joules = self.idle_watts * seconds
        if measured.unpolled_seconds == 0:
            window.poll_joules = measured.polled_joules
        by_counter = abs(measured.bridged_seconds) <= 0.01 * seconds
        edge_seconds = TICK_SECONDS if by_counter else max(TICK_SECONDS, self.gpu.power_window_seconds)
        if measured.unknown_seconds:
            why = window.reason or "the counter was reset, or readings are too far apart"
            window.reason = f"no reading for {abs(measured.unknown_seconds):.2f} s: {why}"
        elif measured.joules <= 0:
            window.reason = f"the sensors did not move in {seconds:.4f} s"
            if window.poll_joules is not None:
                window.quantisation_joules = window.poll_joules / seconds * edge_seconds if seconds else 0.0
            window.flags.append(BELOW_RESOLUTION)
        else:
            window.reason = None
            window.energy_joules = measured.joules
            window.source = "fake" if self.gpu.simulated else "nvml_counter" if by_counter else "nvml_poll"
            window.quantisation_joules = measured.joules / seconds * edge_seconds
            window.judge(counted=by_counter)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _celsius(self) -> float | None:
        return _asked(self.gpu, "celsius", [])

    def _note_company(self, window: Window) -> None:
        processes = _asked(self.gpu, "processes", [])
        if processes is not None and len(processes) > 1 and "shared_gpu" not in window.flags:
            window.flags.append("shared_gpu")

    def _start_polling(self) -> None:
        if self._poll_seconds and (self.gpu or self.cpu):
            self._stop.clear()
            self._poller = threading.Thread(target=self._poll, name="toolkit-meter", daemon=True)
            self._poller.start()

    def _stop_polling(self) -> None:
        if self._poller:
            self._stop.set()
            self._poller.join()
            self._poller = None

    def _poll(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            self.sample()
        self.poller_cpu_seconds += time.thread_time()


def _sensor(given, open_default):
    """The sensor and None, or None and the reason why there is none."""
    if given is None:
        return None, "not asked for"
    if given != "auto":
        return given, None
    try:
        return open_default(), None
    except SensorError as error:
        return None, str(error)


def _asked(sensor, quantity: str, errors: list[str]):
    """A sensor's answer, or None with the reason appended to `errors`."""
    if sensor is None:
        return None
    try:
        return getattr(sensor, quantity)()
    except SensorError as error:
        errors.append(str(error))
    except Exception as error:  # a broken sensor must never end a run
        errors.append(f"{type(error).__name__}: {error}")
    return None
