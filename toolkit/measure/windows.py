"""Measured windows of time: running integrals of sensor readings, and the figures of a window and of sums.

The driver's energy counter is trusted from its last move on; polled power bridges its failures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

TICK_SECONDS = 0.1  # NVML's counter and power registers move at least this often
NUMBER_SHARE = 0.005  # a window is flagged if one tick of the sensor may be more than this of its energy
COMPARE_SECONDS = 60.0  # windows of at least this length compare the counter with polled power
SUSPECT_PCT = 5.0
GAP_SECONDS = 1.0  # power readings further apart than this are not integrated
BELOW_RESOLUTION = "below_resolution"
_JUDGED = (BELOW_RESOLUTION, "resolution_limited", "energy_suspect")  # flags that a sum decides for itself


@dataclass
class Window:
    """One measured stretch of time; its figures are filled in when it closes.

    `source` of `energy_joules` (gross, GPU): nvml_counter | nvml_poll | none | fake (a simulated GPU).
    """

    name: str
    seconds: float | None = None
    energy_joules: float | None = None
    source: str = "none"
    reason: str | None = None  # why energy_joules is None
    quantisation_joules: float | None = None  # uncertainty from the sensor's ticks at the two edges
    poll_joules: float | None = None  # energy by polled power
    disagreement_pct: float | None = None  # deviation of poll_joules from the counter
    idle_joules: float | None = None  # energy of an idle device in the same time, if idle power is known
    cpu_joules: float | None = None  # energy of all CPU packages, from RAPL
    cpu_reason: str | None = None  # why cpu_joules is None
    samples: int = 0  # readings inside and at the edges
    max_gap_seconds: float = 0.0  # longest time between two readings
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
        """Gross energy minus that of an idle device."""
        known = self.energy_joules is not None and self.idle_joules is not None
        return self.energy_joules - self.idle_joules if known else None

    def __str__(self) -> str:
        if self.energy_joules is None:
            return f"{self.name}: {self.seconds:.2f} s, no energy ({self.reason})"
        ticks = "" if self.quantisation_joules is None else f" ± {self.quantisation_joules:,.0f}"
        return f"{self.name}: {self.seconds:.2f} s, {self.energy_joules:,.0f}{ticks} J ({self.source})"

    def judge(self, counted: bool) -> None:
        """Flag what limits the energy; if it was `counted`, compare it with polled power."""
        if counted and self.poll_joules is not None:
            self.disagreement_pct = 100 * (self.poll_joules - self.energy_joules) / self.energy_joules
            if self.seconds >= COMPARE_SECONDS and abs(self.disagreement_pct) > SUSPECT_PCT:
                self.flags.append("energy_suspect")
        ticks = self.quantisation_joules
        if ticks is None or ticks > NUMBER_SHARE * self.energy_joules:
            self.flags.append("resolution_limited")


def total(windows: Iterable[Window], name: str = "total") -> Window:
    """The sum of disjoint windows; a figure that one of them lacks is missing, with its reason.

    A window in which the counter did not move adds only its uncertainty: its neighbours hold its energy.
    Uncertainties add in quadrature, because the edges of windows fall independently within a tick.
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
    whole.judge(counted="nvml_poll" not in sources and None not in {w.disagreement_pct for w in resolved})
    return whole


@dataclass(frozen=True)
class Reading:
    """All sensors at one moment; None where a sensor did not answer."""

    seconds: float
    gpu_joules: float | None = None  # the counter
    watts: float | None = None
    cpu_joules: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Integral:
    """Totals since the meter started; a window is the difference of two."""

    joules: float = 0.0  # by the counter, or by polled power where the counter fails
    polled_joules: float = 0.0
    cpu_joules: float = 0.0
    bridged_seconds: float = 0.0  # without the counter
    unknown_seconds: float = 0.0  # with neither counter nor power
    unpolled_seconds: float = 0.0
    uncounted_cpu_seconds: float = 0.0

    def since(self, start: Integral) -> Integral:
        """The difference to an earlier integral."""
        return Integral(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(start))))


class Integrator:
    """Carries an `Integral` from reading to reading.

    When the counter answers again after an outage, what it has gained replaces the polled energy.  A counter
    that stands still for a second while power flows is treated as failed.
    """

    def __init__(self):
        self.value = Integral()
        self.last: Reading | None = None
        self._moved: tuple[Reading, Integral] | None = None  # the counter's last move

    def forget(self) -> None:
        """Start again: the next reading has no connection to the last one."""
        self.last = self._moved = None

    def add(self, new: Reading) -> list[str]:
        """Go on to `new`; returns flags for the windows that are open."""
        old, self.last = self.last, new
        if old is None:
            self._moved = None if new.gpu_joules is None else (new, self.value)
            return []
        return self._add_polled(old, new) + self._add_counted(new)

    def _add_polled(self, old: Reading, new: Reading) -> list[str]:
        """Integrate polled power and the CPU's counter."""
        seconds = new.seconds - old.seconds
        powers = [watts for watts in (old.watts, new.watts) if watts is not None]
        polled = bool(powers) and seconds <= GAP_SECONDS
        cpu_answers = old.cpu_joules is not None and new.cpu_joules is not None
        cpu_known = cpu_answers and new.cpu_joules >= old.cpu_joules
        joules = sum(powers) / len(powers) * seconds if polled else 0.0
        value = self.value
        self.value = Integral(
            joules=value.joules + joules,
            polled_joules=value.polled_joules + joules,
            cpu_joules=value.cpu_joules + (new.cpu_joules - old.cpu_joules if cpu_known else 0.0),
            bridged_seconds=value.bridged_seconds + seconds,
            unknown_seconds=value.unknown_seconds + (0.0 if polled else seconds),
            unpolled_seconds=value.unpolled_seconds + (0.0 if polled else seconds),
            uncounted_cpu_seconds=value.uncounted_cpu_seconds + (0.0 if cpu_known else seconds),
        )
        return ["cpu_counter_reset"] if cpu_answers and not cpu_known else []

    def _add_counted(self, new: Reading) -> list[str]:
        """Let the counter overrule polled power where it can."""
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
