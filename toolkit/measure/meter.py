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
    idle_joules: float | None = None  # what an idle device would have taken, where idle power is known
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

    @property
    def net_joules(self) -> float | None:
        """Gross energy less that of an idle device."""
        known = self.energy_joules is not None and self.idle_joules is not None
        return self.energy_joules - self.idle_joules if known else None

    def __str__(self) -> str:
        if self.energy_joules is None:
            return f"{self.name}: {self.seconds:.2f} s, no energy ({self.reason})"
        ticks = "" if self.quantisation_joules is None else f" ± {self.quantisation_joules:,.0f}"
        return f"{self.name}: {self.seconds:.2f} s, {self.energy_joules:,.0f}{ticks} J ({self.source})"


def total(windows: Iterable[Window], name: str = "total") -> Window:
    """The sum of disjoint windows.  One that lacks a figure leaves the sum without it, with its reason.

    A window in which the counter did not move adds nothing but its uncertainty: its neighbours have its
    energy.  Uncertainties add in quadrature: where in a tick one window begins says nothing of the next.
    """
    windows = list(windows)
    resolved = [w for w in windows if w.energy_joules is not None or BELOW_RESOLUTION not in w.flags]

    def added(attribute: str, among: list[Window] = windows) -> float | None:
        values = [getattr(window, attribute) for window in among]
        return None if not values or None in values else sum(values)

    def first(attribute: str):
        return next((v for w in windows if (v := getattr(w, attribute)) is not None), None)

    ticks = [window.quantisation_joules for window in windows]
    whole = Window(
        name=name,
        seconds=added("seconds"),
        energy_joules=added("energy_joules", resolved),
        quantisation_joules=None if not ticks or None in ticks else math.hypot(*ticks),
        poll_joules=added("poll_joules"),
        idle_joules=added("idle_joules"),
        cpu_joules=added("cpu_joules"),
        cpu_reason=first("cpu_reason"),
        samples=sum(window.samples for window in windows),
        max_gap_seconds=max((window.max_gap_seconds for window in windows), default=0.0),
        start_celsius=windows[0].start_celsius if windows else None,
        end_celsius=windows[-1].end_celsius if windows else None,
        flags=list(dict.fromkeys(flag for w in windows for flag in w.flags if flag not in _JUDGED)),
    )
    if whole.energy_joules is None:
        whole.reason = first("reason") or "nothing was measured"
        if not resolved and windows:
            whole.flags.append(BELOW_RESOLUTION)
        return whole
    sources = {window.source for window in resolved}
    whole.source = next(source for source in ("fake", "nvml_poll", "nvml_counter") if source in sources)
    _judge(whole, counted="nvml_poll" not in sources and None not in {w.disagreement_pct for w in resolved})
    return whole


# What is decided anew for a sum.
_JUDGED = (BELOW_RESOLUTION, "resolution_limited", "energy_suspect")


def _judge(window: Window, counted: bool) -> None:
    """Compare counter and polling, and flag what a reader must know of the figure."""
    if counted and window.poll_joules is not None:
        difference = window.poll_joules - window.energy_joules
        window.disagreement_pct = 100 * difference / window.energy_joules
        if window.seconds >= COMPARE_SECONDS and abs(window.disagreement_pct) > SUSPECT_PCT:
            window.flags.append("energy_suspect")
    ticks = window.quantisation_joules
    if ticks is None or ticks > NUMBER_SHARE * window.energy_joules:
        window.flags.append("resolution_limited")


@dataclass(frozen=True)
class _Reading:
    """All sensors at one moment; None where a sensor did not answer."""

    seconds: float
    gpu_joules: float | None = None  # the counter
    watts: float | None = None
    cpu_joules: float | None = None
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

    def since(self, start: _Integral) -> _Integral:
        return _Integral(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(start))))


class _Integrator:
    """Carries an `_Integral` from reading to reading.

    The counter is trusted from its last move on: what it has gained when it answers again replaces what
    polling had put in for an outage.  A counter that stands still for a second while power flows is out.
    """

    def __init__(self):
        self.value = _Integral()
        self.last: _Reading | None = None
        self._moved: tuple[_Reading, _Integral] | None = None  # the counter's last move

    def forget(self) -> None:
        """What comes next has no connection to what was."""
        self.last = self._moved = None

    def add(self, new: _Reading) -> list[str]:
        """Go on to `new`; returns flags for the windows that are open."""
        old, self.last = self.last, new
        if old is None:
            self._moved = None if new.gpu_joules is None else (new, self.value)
            return []
        self._add_polled(old, new)
        return self._add_counted(new)

    def _add_polled(self, old: _Reading, new: _Reading) -> None:
        seconds = new.seconds - old.seconds
        powers = [watts for watts in (old.watts, new.watts) if watts is not None]
        polled = bool(powers) and seconds <= GAP_SECONDS
        cpu_known = old.cpu_joules is not None and new.cpu_joules is not None
        joules = sum(powers) / len(powers) * seconds if polled else 0.0
        value = self.value
        self.value = dataclasses.replace(
            value,
            joules=value.joules + joules,
            bridged_seconds=value.bridged_seconds + seconds,
            unknown_seconds=value.unknown_seconds + (0.0 if polled else seconds),
            polled_joules=value.polled_joules + joules,
            unpolled_seconds=value.unpolled_seconds + (0.0 if polled else seconds),
            cpu_joules=value.cpu_joules + (new.cpu_joules - old.cpu_joules if cpu_known else 0.0),
            uncounted_cpu_seconds=value.uncounted_cpu_seconds + (0.0 if cpu_known else seconds),
        )

    def _add_counted(self, new: _Reading) -> list[str]:
        """Let the counter overrule polling where it can."""
        if new.gpu_joules is None:
            return []
        if self._moved is None or new.gpu_joules < self._moved[0].gpu_joules:
            reset = self._moved is not None
            self._moved = (new, self.value)
            return ["counter_reset"] if reset else []
        then, value = self._moved
        gained = new.gpu_joules - then.gpu_joules
        polled_since = self.value.polled_joules - value.polled_joules
        stood_seconds = new.seconds - then.seconds
        if gained == 0 and stood_seconds > GAP_SECONDS and polled_since > 0:
            self.value = dataclasses.replace(
                self.value,
                joules=value.joules + polled_since,
                bridged_seconds=value.bridged_seconds + stood_seconds,
            )
            return ["counter_stuck"]
        self.value = dataclasses.replace(
            self.value,
            joules=value.joules + gained,
            bridged_seconds=value.bridged_seconds,
            unknown_seconds=value.unknown_seconds,
        )
        if gained > 0:
            self._moved = (new, self.value)
        return []


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
        self._integrator = _Integrator()
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
            finally:  # whatever happens, the window does not stay open
                if place < len(self._open) - 1:
                    window.flags.append("overlaps")  # a generator left open, say
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
        """What an open window has measured until now; a closed one as it is."""
        if window.seconds is not None:
            return window
        with self._lock:
            reading = self._read()
            start, value = next((s, v) for w, s, v in self._open if w is window)
            copy = dataclasses.replace(window, flags=list(window.flags))
            self._fill(copy, reading.seconds - start.seconds, self._integrator.value.since(value))
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
        joules = _asked(self.gpu, "counter_joules", errors) if self._has_counter else None
        watts = _asked(self.gpu, "watts", errors) if self._has_power else None
        cpu_joules = _asked(self.cpu, "counter_joules", [])
        seconds = (before + self._clock.perf_counter()) / 2
        reading = _Reading(seconds, joules, watts, cpu_joules, errors[-1] if errors else None)
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
        if self.gpu.simulated:
            window.flags.append("simulated")
        if self.idle_watts is not None:
            window.idle_joules = self.idle_watts * seconds
        if measured.unpolled_seconds == 0:
            window.poll_joules = measured.polled_joules
        by_counter = abs(measured.bridged_seconds) <= 0.01 * seconds
        edge_seconds = TICK_SECONDS if by_counter else max(TICK_SECONDS, self.gpu.power_window_seconds)
        if measured.unknown_seconds:
            why = window.reason or "a counter that began anew, or readings too far apart"
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
            _judge(window, counted=by_counter)

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
    except Exception as error:  # measuring must never end a run
        errors.append(f"{type(error).__name__}: {error}")
    return None
