"""`Meter`: seconds and joules of named windows that add up.

All windows of a meter read one pair of running integrals at their edges, so a window is a difference,
neighbouring windows sum to what encloses them, and a nested window is a part of its parent that is
never added to it a second time.  (The published meter of arXiv 2607.02158 adds recomputation to the
training steps that contain it: +21.5 % energy, +22.2 % time in its own log.)

GPU energy comes from the driver's energy counter.  Power is polled beside it, ten times a second while
a window is open: a cross-check, and the fallback where the counter fails.  What could not be measured
is None with a reason, never 0.  The figure is what NVML says; its sensors are off by several per cent
(arXiv 2312.02741: mostly within 6 %, up to 11 %), which no software can mend: compare on one card.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from toolkit.errors import InputError
from toolkit.measure.sensors import GpuSensor, Nvml, Rapl, SensorError

TICK_SECONDS = 0.1  # NVML's counter and power registers move at least this often
POLL_SECONDS = 0.1
NUMBER_SHARE = 0.005  # where a tick may be more of the energy than this (below 20 s), a flag says so
COMPARE_SECONDS = 60.0  # from here on counter and polling must agree
SUSPECT_PCT = 5.0
GAP_SECONDS = 1.0
BELOW_RESOLUTION = "below_resolution"
SETTLE_SECONDS = 1.0  # one averaging window of the slowest sensors


@dataclass
class Window:
    """One measured stretch of time; filled in when it closes.

    `source` of `energy_joules` (gross, GPU): nvml_counter | nvml_poll | none | fake (a simulated GPU).
    """

    name: str
    seconds: float | None = None
    energy_joules: float | None = None
    source: str = "none"
    reason: str | None = None  # why energy_joules is None
    quantisation_joules: float | None = None  # what the sensor's ticks at the two edges may amount to
    poll_joules: float | None = None  # the same by polled power
    disagreement_pct: float | None = None  # of poll_joules from the counter
    net_joules: float | None = None  # energy_joules less idle power, where that was measured
    cpu_joules: float | None = None  # all CPU packages, from RAPL
    cpu_reason: str | None = None
    samples: int = 0  # readings inside and at the edges
    max_gap_seconds: float = 0.0  # longest time between two
    start_celsius: float | None = None
    end_celsius: float | None = None
    flags: list[str] = field(default_factory=list)
    children: list[Window] = field(default_factory=list, repr=False)  # sub-windows, parts of this one

    def to_dict(self) -> dict:
        """The fields as plain values, without the children."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name != "children"}

    def __str__(self) -> str:
        energy = (
            f"no energy ({self.reason})" if self.energy_joules is None
            else f"{self.energy_joules:,.0f} ± {self.quantisation_joules:,.0f} J ({self.source})"
        )  # fmt: skip
        return f"{self.name}: {self.seconds:.2f} s, {energy}"


def total(windows: Iterable[Window], name: str = "total") -> Window:
    """The sum of disjoint windows.  One that lacks a figure leaves the sum without it, with its reason.

    A window in which the counter did not move adds nothing but its uncertainty: its neighbours have its
    energy.  Uncertainties add in quadrature: where in a tick one window begins says nothing of the next.
    """
    windows = list(windows)
    resolved = [window for window in windows if BELOW_RESOLUTION not in window.flags]

    def added(attribute: str, among: list[Window] = windows) -> float | None:
        values = [getattr(window, attribute) for window in among]
        return None if not values or None in values else sum(values)

    def first(attribute: str):
        return next((v for w in windows if (v := getattr(w, attribute)) is not None), None)

    energy, poll = added("energy_joules", resolved), added("poll_joules")
    sources = {window.source for window in resolved}
    counted = energy is not None and poll is not None and "nvml_poll" not in sources
    ticks = [window.quantisation_joules for window in windows]
    quantisation = None if not ticks or None in ticks else math.hypot(*ticks)
    flags = dict.fromkeys(flag for window in windows for flag in window.flags)
    if energy is not None and quantisation is not None and quantisation <= NUMBER_SHARE * energy:
        flags.pop("resolution_limited", None)
        flags.pop(BELOW_RESOLUTION, None)
    return Window(
        name=name,
        seconds=added("seconds"),
        energy_joules=energy,
        source="none" if energy is None else sources.pop() if len(sources) == 1 else "nvml_poll",
        reason=None if energy is not None else first("reason") or "nothing was measured",
        quantisation_joules=quantisation,
        poll_joules=poll,
        disagreement_pct=100 * (poll - energy) / energy if counted else None,
        net_joules=added("net_joules", resolved),
        cpu_joules=added("cpu_joules"),
        cpu_reason=first("cpu_reason"),
        samples=sum(window.samples for window in windows),
        max_gap_seconds=max((window.max_gap_seconds for window in windows), default=0.0),
        start_celsius=windows[0].start_celsius if windows else None,
        end_celsius=windows[-1].end_celsius if windows else None,
        flags=list(flags),
    )


@dataclass(frozen=True)
class _Reading:
    """All sensors at one moment; None where a sensor did not answer."""

    seconds: float
    counter: float | None = None
    watts: float | None = None
    cpu: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Integral:
    """What had been measured up to one moment; a window is the difference of two."""

    joules: float = 0.0  # by the counter, bridged by polling where it fails
    polled_joules: float = 0.0
    cpu_joules: float = 0.0
    bridged_seconds: float = 0.0
    unknown_seconds: float = 0.0  # neither counter nor power
    unpolled_seconds: float = 0.0
    uncounted_cpu_seconds: float = 0.0

    def advanced(self, old: _Reading, new: _Reading) -> _Integral:
        """The integral at `new`, given that at `old`."""
        seconds = new.seconds - old.seconds
        powers = [watts for watts in (old.watts, new.watts) if watts is not None]
        if len(powers) == 2 or (powers and seconds <= GAP_SECONDS):
            polled, unpolled = sum(powers) / len(powers) * seconds, 0.0
        else:
            polled, unpolled = 0.0, seconds
        if old.counter is not None and new.counter is not None and new.counter >= old.counter:
            joules, bridged, unknown = new.counter - old.counter, 0.0, 0.0
        else:
            joules, bridged, unknown = polled, seconds, unpolled
        cpu_known = old.cpu is not None and new.cpu is not None
        return _Integral(
            self.joules + joules,
            self.polled_joules + polled,
            self.cpu_joules + (new.cpu - old.cpu if cpu_known else 0.0),
            self.bridged_seconds + bridged,
            self.unknown_seconds + unknown,
            self.unpolled_seconds + unpolled,
            self.uncounted_cpu_seconds + (0.0 if cpu_known else seconds),
        )

    def since(self, start: _Integral) -> _Integral:
        return _Integral(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(start))))


class Meter:
    """Measures windows: `with meter.window("train") as window: ...`, then `window.energy_joules`.

    `device`: whose energy (default: the current CUDA device if there is one); its work is awaited at
    the edges of a window and nowhere else.  `gpu`: another sensor than NVML's, or None for none.
    `cpu`: likewise, instead of RAPL.  `clock` has `perf_counter()` and `sleep()`.
    `poll_seconds`: None leaves polling to whoever calls `sample()`.
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
        errors: list[str] = []  # whether a reading exists is found out by asking for it
        self._has_counter = _asked(self.gpu, "counter_joules", errors) is not None
        self._has_power = _asked(self.gpu, "watts", errors) is not None
        if self.gpu and not (self._has_counter or self._has_power):
            self.gpu, self.reason = None, errors[-1]
        self.idle_watts: float | None = None
        self.poller_cpu_seconds = 0.0  # what polling has cost
        self._clock, self._poll_seconds = clock, poll_seconds
        self._lock = threading.Lock()
        self._open: list[tuple[Window, _Reading, _Integral]] = []
        self._last: _Reading | None = None
        self._integral = _Integral()
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
        window = Window(name)
        if self._open:
            self._open[-1][0].children.append(window)
        self._synchronize()
        if self.gpu and not self._open and self._shared():
            window.flags.append("shared_gpu")
        window.start_celsius = self._celsius()
        with self._lock:
            reading = self._read()
            self._open.append((window, reading, self._integral))
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
            reading = self._read()
            _, start, integral = self._open.pop()
            measured = self._integral.since(integral)
            if not self._open:
                self._last = None  # nothing is integrated between windows
        if not self._open:
            self._stop_polling()
        window.end_celsius = self._celsius()
        self._fill(window, reading.seconds - start.seconds, measured)

    def so_far(self, window: Window) -> Window:
        """What an open window has measured until now; a closed one as it is."""
        if window.seconds is not None:
            return window
        with self._lock:
            reading = self._read()
            start, integral = next((s, i) for w, s, i in self._open if w is window)
            copy = dataclasses.replace(window, flags=list(window.flags))
            self._fill(copy, reading.seconds - start.seconds, self._integral.since(integral))
            return copy

    def measure_idle(self, seconds: float = 5.0) -> float | None:
        """Measure idle power, in watts, and keep it in `idle_watts`; None at once without a GPU sensor.

        Call it before the run.  "Idle" is the device as this process finds it.
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

    def _read(self) -> _Reading:
        """Read all sensors and carry the integrals on to now.  Needs the lock."""
        before = self._clock.perf_counter()
        errors: list[str] = []
        counter = _asked(self.gpu, "counter_joules", errors) if self._has_counter else None
        watts = _asked(self.gpu, "watts", errors) if self._has_power else None
        cpu = _asked(self.cpu, "counter_joules", [])
        reading = _Reading(
            (before + self._clock.perf_counter()) / 2, counter, watts, cpu, errors[-1] if errors else None
        )
        if self._last is not None:
            self._integral = self._integral.advanced(self._last, reading)
            self._note(self._last, reading)
        for window, _, _ in self._open:
            window.samples += 1
        self._last = reading
        return reading

    def _note(self, old: _Reading, new: _Reading) -> None:
        """Tell the open windows what was odd between two readings."""
        flags = []
        if old.counter is not None and new.counter is not None and new.counter < old.counter:
            flags.append("counter_reset")
        if self.gpu and new.error:
            flags.append("sensor_failed")
        if self.gpu and new.seconds - old.seconds > GAP_SECONDS:
            flags.append("sampling_gap")
        for window, _, _ in self._open:
            window.max_gap_seconds = max(window.max_gap_seconds, new.seconds - old.seconds)
            window.flags.extend(flag for flag in flags if flag not in window.flags)
            window.reason = new.error or window.reason

    def _fill(self, window: Window, seconds: float, measured: _Integral) -> None:
        """Turn the difference of two integrals into the figures of a window."""
        window.samples += 1  # the reading that opened it
        window.seconds = seconds
        if self.cpu is None:
            window.cpu_reason = self.cpu_reason
        elif measured.uncounted_cpu_seconds:
            window.cpu_reason = f"RAPL could not be read for {measured.uncounted_cpu_seconds:.1f} s"
        else:
            window.cpu_joules = measured.cpu_joules
        if self.gpu is None:
            window.reason = self.reason
            return
        if measured.unpolled_seconds == 0:
            window.poll_joules = measured.polled_joules
        if measured.unknown_seconds:
            window.reason = f"no reading for {measured.unknown_seconds:.2f} s: {window.reason}"
            return
        by_counter = measured.bridged_seconds <= 0.01 * seconds
        joules = measured.joules
        if joules == 0 and seconds > GAP_SECONDS and window.poll_joules:
            joules, by_counter = window.poll_joules, False
            window.flags.append("counter_stuck")
        if joules == 0:
            window.reason = f"the sensors did not move in {seconds:.4f} s"
            window.quantisation_joules = window.poll_joules and window.poll_joules / seconds * TICK_SECONDS
            window.flags.append(BELOW_RESOLUTION)
            return
        window.reason = None
        window.energy_joules = joules
        window.source = "fake" if self.gpu.simulated else "nvml_counter" if by_counter else "nvml_poll"
        if self.gpu.simulated:
            window.flags.append("simulated")
        window.quantisation_joules = joules / seconds * TICK_SECONDS
        if self.idle_watts is not None:
            window.net_joules = joules - self.idle_watts * seconds
        if by_counter and window.poll_joules is not None:
            window.disagreement_pct = 100 * (window.poll_joules - joules) / joules
            if seconds >= COMPARE_SECONDS and abs(window.disagreement_pct) > SUSPECT_PCT:
                window.flags.append("energy_suspect")
        if window.quantisation_joules > NUMBER_SHARE * joules:
            window.flags.append("resolution_limited")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _celsius(self) -> float | None:
        return _asked(self.gpu, "celsius", [])

    def _shared(self) -> bool:
        processes = _asked(self.gpu, "processes", [])
        return processes is not None and len(processes) > 1

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
    """The sensor and None, or None and the reason."""
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
        return None
