"""A clock that jumps and a GPU with a known power curve, seen through the sensors of real cards."""

from __future__ import annotations

import math

import numpy as np

from toolkit.measure import Meter, SensorError


class VirtualClock:
    """Time that passes only in `sleep`; `every` calls back periodically, as a polling thread would."""

    def __init__(self):
        self.now = 100.0
        self._callback, self._period, self._due = None, math.inf, math.inf

    def perf_counter(self) -> float:
        return self.now

    def every(self, period: float, callback) -> None:
        self._callback, self._period, self._due = callback, period, self.now + period

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due <= end:
            self.now, self._due = self._due, self._due + self._period
            self._callback()
        self.now = end


class SimulatedGpu:
    """Piecewise constant power; registers that move in steps and average over a window, as real ones do.

    `watts_by_second`: breakpoints [(second, watts from then on), ...] after the start of the clock.
    `failure(reading number)` gives a reason to fail with, or None.
    """

    simulated = True
    name = "Simulated GPU"

    def __init__(
        self, clock, watts_by_second, *, tick=0.1, phase=0.0, window=0.1, counter=True, power=True,
        failure=lambda number: None, latency=0.0, resets_at=math.inf,
    ):  # fmt: skip
        self.clock, self.tick, self.phase, self.power_window_seconds = clock, tick, phase, window
        self.counter, self.power, self.failure, self.latency = counter, power, failure, latency
        self.start, self.resets_at = clock.now, resets_at
        seconds, watts = np.array(watts_by_second, dtype=float).T
        # Before the first breakpoint and after the last the power stays what it is there.
        self._at = np.concatenate([[seconds[0] - 1e4], seconds[1:], [seconds[-1] + 1e6]])
        self._joules = np.concatenate([[0], np.cumsum(np.diff(self._at) * watts)])
        self.peak_watts = watts.max()
        self.readings = 0

    def joules(self, now: float) -> float:
        """The truth: energy until `now`."""
        return float(np.interp(now - self.start, self._at, self._joules))

    def _updated(self) -> float:
        return math.floor((self.clock.now + self.phase) / self.tick) * self.tick - self.phase

    def _reading(self, supported: bool):
        self.readings += 1
        self.clock.now += self.latency
        reason = self.failure(self.readings) if supported else "Not Supported"
        if reason:
            raise SensorError(f"NVML: {reason}")

    def counter_joules(self) -> float:
        self._reading(self.counter)
        since = (
            self.joules(self.resets_at + self.start) if self._updated() - self.start > self.resets_at else 0
        )
        return math.floor(1000 * (self.joules(self._updated()) - since)) / 1000

    def watts(self) -> float:
        self._reading(self.power)
        end = self._updated()
        return (self.joules(end) - self.joules(end - self.power_window_seconds)) / self.power_window_seconds

    def celsius(self) -> float:
        return 50.0

    def processes(self) -> dict[int, int | None]:
        return {1: 2**30}


def meter_of(gpu: SimulatedGpu) -> Meter:
    """A meter in virtual time that polls `gpu` ten times a second."""
    meter = Meter("cpu", gpu=gpu, cpu=None, clock=gpu.clock, poll_seconds=None)
    gpu.clock.every(0.1, meter.sample)
    return meter


def training_trace(rng: np.random.Generator, seconds: float) -> list[tuple[float, float]]:
    """Idle, then training steps (loading, forward, backward, optimizer) for `seconds`, then idle."""
    points, now = [(0.0, 30.0)], 5.0
    step = rng.uniform(0.05, 1.2)
    levels = rng.uniform((55, 130, 150, 90), (75, 180, 200, 130))
    shares = np.cumsum(np.concatenate([[0], rng.dirichlet((2, 8, 12, 2))]))[:4]
    while now < 5.0 + seconds:
        points += [(now + share * step, level) for share, level in zip(shares, levels)]
        now += step
    points.append((now, 30.0))
    return points
