"""The meter against simulated GPUs whose true energy is known, and without any GPU."""

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_gpu import SimulatedGpu, VirtualClock, meter_of, training_trace

from toolkit.errors import InputError
from toolkit.measure import Meter, Rapl, SensorError, Window, total
from toolkit.measure.windows import BELOW_RESOLUTION, TICK_SECONDS


def measured(seed: int, seconds: float, **sensor) -> tuple[Window, float, SimulatedGpu]:
    """One window over a random training run: the window, its true energy, the GPU."""
    rng = np.random.default_rng(seed)
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, training_trace(rng, seconds), phase=rng.uniform(0, 0.1), **sensor)
    meter = meter_of(gpu)
    clock.sleep(5.0 + rng.uniform(0, 0.3))
    start = clock.now
    with meter.window("train") as window:
        clock.sleep(seconds)
    return window, gpu.joules(clock.now) - gpu.joules(start), gpu


@pytest.mark.parametrize("seconds", [20, 60])
def test_counter_is_within_half_a_per_cent(seconds):
    errors = []
    for seed in range(200):
        window, truth, gpu = measured(seed, seconds)
        errors.append(abs(window.energy_joules - truth) / truth)
        assert abs(window.energy_joules - truth) <= TICK_SECONDS * gpu.peak_watts
        assert "simulated" in window.flags and window.source == "fake"
    assert np.percentile(errors, 95) <= 0.005


@pytest.mark.parametrize(("average", "limit"), [(1.0, 0.01), (0.1, 0.01), (0.025, 0.015)])
def test_polling_alone_is_within_a_per_cent_in_a_minute(average, limit):
    """Sensors of Ampere/Ada (1 s mean), Turing (100 ms) and GA100/GH100 (25 ms of every 100)."""
    errors = []
    for seed in range(100):
        window, truth, _ = measured(seed, 60, window=average, counter=False)
        errors.append(abs(window.energy_joules - truth) / truth)
        if average == 1.0:  # there the edges are all the error; faster sensors miss what is between samples
            assert abs(window.energy_joules - truth) <= window.quantisation_joules
        assert window.disagreement_pct is None, "there is nothing to compare with"
    assert np.percentile(errors, 95) <= limit


def test_counter_and_polling_are_compared():
    window, truth, _ = measured(0, 60)
    assert window.poll_joules == pytest.approx(truth, rel=0.01)
    assert window.disagreement_pct == pytest.approx(
        100 * (window.poll_joules / window.energy_joules - 1), abs=1e-9
    )
    assert window.quantisation_joules == pytest.approx(window.energy_joules / 600, rel=1e-6)
    assert window.samples == pytest.approx(602, abs=1) and window.max_gap_seconds == pytest.approx(0.1)


def test_a_counter_that_disagrees_with_power_is_flagged():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 200.0)])
    honest = gpu.counter_joules
    gpu.counter_joules = lambda: 0.5 * honest()
    meter = meter_of(gpu)
    with meter.window("train") as window:
        clock.sleep(60)
    assert "energy_suspect" in window.flags and window.disagreement_pct == pytest.approx(100, abs=1)


trees = st.recursive(
    st.floats(0.001, 5), lambda children: st.lists(children, min_size=1, max_size=4), max_leaves=12
)


@settings(max_examples=1000)
@given(trees, st.integers(0, 2**32 - 1), st.booleans())
def test_law_windows_are_additive(tree, seed, counter):
    """Children that fill their parent sum to it; a parent counts its children once."""
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, training_trace(np.random.default_rng(seed), 20), counter=counter)
    meter = meter_of(gpu)
    windows = []

    def run(node, depth):
        with meter.window(f"depth {depth}") as window:
            windows.append(window)
            if isinstance(node, float):
                clock.sleep(node)
            else:
                for child in node:
                    run(child, depth + 1)

    start = clock.now
    run(tree, 0)
    for window in windows:
        if window.children:
            parts = total(window.children)
            assert parts.seconds == pytest.approx(window.seconds, rel=1e-6)
            if BELOW_RESOLUTION not in window.flags:
                joules = [child.energy_joules or 0.0 for child in window.children]
                assert sum(joules) == pytest.approx(window.energy_joules, rel=1e-6)
    root = windows[0]
    assert root.seconds == pytest.approx(clock.now - start, rel=1e-6)
    if root.energy_joules:
        slack = 2 * TICK_SECONDS * gpu.peak_watts + 1e-3
        assert root.energy_joules == pytest.approx(gpu.joules(clock.now) - gpu.joules(start), abs=slack)


REASONS = ["Not Supported", "GPU is lost", "Unknown Error", "Insufficient Permissions"]


@settings(max_examples=1000)
@given(
    st.sampled_from(REASONS),
    st.integers(0, 120),
    st.one_of(st.just(math.inf), st.integers(1, 40)),
    st.sampled_from([0.0, 0.001, 0.3]),
    st.one_of(st.just(math.inf), st.floats(0.1, 5)),
    st.tuples(st.booleans(), st.booleans()),
    st.floats(0.01, 8),
)
def test_law_no_failure_becomes_a_zero(reason, first, number, latency, resets_at, supported, seconds):
    """Lost GPUs, unsupported calls, resets and slow drivers: a figure near the truth, or a reason."""
    clock = VirtualClock()
    gpu = SimulatedGpu(
        clock, [(0, 150.0)], latency=latency, resets_at=resets_at, counter=supported[0], power=supported[1],
        failure=lambda reading: reason if first <= reading < first + number else None,
    )  # fmt: skip
    meter = meter_of(gpu)
    with meter.window("train") as window:
        clock.sleep(seconds)
    reliable = supported[0] and number == 0 and resets_at > seconds + 2 and seconds > 0.2
    assert window.energy_joules is not None or not reliable
    if window.energy_joules is None:
        assert window.reason and "None" not in window.reason and window.source == "none"
    else:
        assert window.reason is None and window.source == "fake"
        slack = 150 * (3 * TICK_SECONDS + 2 * latency) + 1e-3
        assert window.energy_joules == pytest.approx(150 * window.seconds, abs=slack)
        assert window.energy_joules > 0


def test_a_reset_of_the_counter_is_bridged_and_flagged():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 150.0)], resets_at=30.0)
    meter = meter_of(gpu)
    with meter.window("train") as window:
        clock.sleep(60)
    assert "counter_reset" in window.flags
    assert window.energy_joules == pytest.approx(9000, rel=0.005)


def test_a_counter_that_never_moves_is_not_used():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 150.0)])
    gpu.counter_joules = lambda: 7.0
    meter = meter_of(gpu)
    with meter.window("train") as window:
        clock.sleep(20)
    assert "counter_stuck" in window.flags and window.energy_joules == pytest.approx(3000, rel=0.01)


def test_windows_too_short_to_resolve_are_null_but_count_in_a_sum():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 100.0)])
    meter = meter_of(gpu)
    windows = []
    for _ in range(3000):
        with meter.window("step") as window:
            clock.sleep(0.01)
        windows.append(window)
    assert any(w.energy_joules is None and "did not move" in w.reason for w in windows)
    whole = total(windows)
    assert whole.seconds == pytest.approx(30)
    assert whole.energy_joules == pytest.approx(3000, rel=0.05)


def test_a_sum_lacks_the_figures_that_one_window_lacks():
    known = Window("a", seconds=1.0, energy_joules=5.0, source="nvml_counter", quantisation_joules=0.5)
    unknown = Window("b", seconds=2.0, reason="NVML: GPU is lost")
    whole = total([known, unknown])
    assert whole.seconds == 3.0 and whole.energy_joules is None and whole.source == "none"
    assert whole.reason == "NVML: GPU is lost"
    assert total([]).energy_joules is None and total([]).reason
    both = total([known, known])
    assert both.energy_joules == 10 and both.quantisation_joules == pytest.approx(0.5 * math.sqrt(2))


def test_sums_of_sums_equal_the_sum():
    """As in a resumed run: windows that the counter could not resolve must not void the others."""
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 150.0)])
    meter = meter_of(gpu)
    windows = []
    for seconds in (0.01, 8, 0.01, 10, 0.02, 0.5):
        with meter.window("fit") as window:
            clock.sleep(seconds)
        windows.append(window)
    assert [w.energy_joules is None for w in windows[::2]] == [True] * 3
    at_once = total(windows)
    nested = total([total([total(windows[:2]), *windows[2:4]]), total(windows[4:])])
    assert nested.energy_joules == pytest.approx(at_once.energy_joules, rel=1e-9)
    assert nested.flags == at_once.flags and nested.reason is None


def test_a_simulated_part_makes_a_sum_simulated():
    real = Window("a", seconds=30.0, energy_joules=3000.0, source="nvml_counter", quantisation_joules=10.0)
    fake = Window("b", seconds=30.0, energy_joules=3000.0, source="fake", quantisation_joules=10.0)
    assert total([real, fake]).source == "fake" and total([real, real]).source == "nvml_counter"


def test_a_short_outage_of_everything_is_bridged_by_the_counter():
    """Two seconds without an answer in an hour: the counter spans them exactly."""
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 150.0)], failure=lambda n: "Unknown Error" if 900 < n < 940 else None)
    meter = meter_of(gpu)
    with meter.window("train") as window:
        clock.sleep(3600)
    assert window.energy_joules == pytest.approx(150 * 3600, rel=1e-4) and window.source == "fake"
    assert "sensor_failed" in window.flags and window.reason is None


def test_power_readings_too_far_apart_are_not_integrated():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 300.0)], counter=False)
    meter = Meter("cpu", gpu=gpu, cpu=None, clock=clock, poll_seconds=None)  # nobody polls
    with meter.window("train") as window:
        clock.sleep(600)
    assert window.energy_joules is None and "too far apart" in window.reason


def test_a_slow_counter_stays_additive():
    """Moves every two seconds only: windows in between borrow from polling and give back."""
    clock = VirtualClock()
    meter = meter_of(SimulatedGpu(clock, [(0, 100.0)], tick=2.0))
    with meter.window("all") as whole:
        for _ in range(10):
            with meter.window("part"):
                clock.sleep(1.5)
    assert sum(part.energy_joules or 0 for part in whole.children) == pytest.approx(whole.energy_joules)


def test_a_window_left_open_by_a_generator_keeps_its_own_start():
    clock = VirtualClock()
    meter = meter_of(SimulatedGpu(clock, [(0, 100.0)]))

    def loader():
        with meter.window("load") as window:
            yield window
            clock.sleep(1)

    with meter.window("train") as train:
        clock.sleep(4)
        batches = loader()
        load = next(batches)
        clock.sleep(16)
    clock.sleep(5)
    batches.close()
    assert train.seconds == pytest.approx(20) and load.seconds == pytest.approx(21)
    assert "overlaps" in train.flags


def test_a_sensor_that_breaks_never_ends_the_run():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 100.0)])
    meter = meter_of(gpu)

    def broken():
        raise OSError("the driver went away")

    with meter.window("train") as window:
        clock.sleep(1)
        gpu.counter_joules = gpu.watts = broken
        clock.sleep(5)
    assert window.energy_joules is None and "driver went away" in window.reason
    with meter.window("train"):
        pass


def test_others_on_the_gpu_are_flagged_in_every_window():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 100.0)])
    meter = meter_of(gpu)
    with meter.window("fit") as outer:
        with meter.window("alone") as alone:
            clock.sleep(1)
        gpu.processes = lambda: {1: None, 2: None}
        with meter.window("train") as inner:
            clock.sleep(1)
    assert "shared_gpu" not in alone.flags
    assert "shared_gpu" in inner.flags and "shared_gpu" in outer.flags


def test_idle_power_adds_net_energy_to_gross_energy():
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 30.0), (10, 180.0)])
    meter = meter_of(gpu)
    assert meter.measure_idle(seconds=5) == pytest.approx(30, rel=0.03)
    clock.sleep(4)
    with meter.window("train") as window:
        clock.sleep(60)
    assert window.energy_joules == pytest.approx(180 * 60, rel=0.005)
    assert window.net_joules == pytest.approx(150 * 60, rel=0.01)
    windows = []
    for _ in range(1000):
        with meter.window("step") as step:
            clock.sleep(0.01)
        windows.append(step)
    assert total(windows).net_joules == pytest.approx(1500, rel=0.05), "steps without a tick idle too"


def test_an_open_window_reports_its_figures_so_far():
    clock = VirtualClock()
    meter = meter_of(SimulatedGpu(clock, [(0, 100.0)]))
    with meter.window("train") as window:
        clock.sleep(30)
        half = meter.so_far(window)
        clock.sleep(30)
    assert half.energy_joules == pytest.approx(3000, rel=0.01)
    assert window.energy_joules == pytest.approx(6000, rel=0.01)
    assert meter.so_far(window) is window


def test_without_a_gpu_energy_is_null_with_a_reason_and_time_is_measured():
    clock = VirtualClock()
    meter = Meter("cpu", clock=clock)
    with meter.window("train") as window:
        clock.sleep(0.02)
    assert window.energy_joules is None and window.source == "none" and window.reason
    assert window.net_joules is None and meter.measure_idle() is None
    assert window.seconds == pytest.approx(0.02)
    assert (window.cpu_joules is None) == bool(window.cpu_reason)


def test_a_window_cannot_contain_itself():
    meter = Meter("cpu")
    with meter.window("train"), pytest.raises(InputError, match="open already"), meter.window("train"):
        pass
    with meter.window("train"):
        pass  # one after the other is fine: a notebook cell runs twice


def test_an_exception_closes_its_windows():
    meter = meter_of(SimulatedGpu(VirtualClock(), [(0, 100.0)]))
    with pytest.raises(KeyboardInterrupt), meter.window("train") as outer, meter.window("step") as inner:
        raise KeyboardInterrupt
    assert outer.seconds is not None and inner.seconds is not None
    with meter.window("train"):
        pass


def test_windows_wait_for_the_device_only_at_their_edges(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device))
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 100.0)])
    meter = Meter("cuda:0", gpu=gpu, cpu=None, clock=clock, poll_seconds=None)
    clock.every(0.1, meter.sample)
    with meter.window("train"):
        with meter.window("step"):
            clock.sleep(10)
        clock.sleep(10)
    assert waited == [torch.device("cuda:0")] * 4


def test_a_thread_polls_while_a_window_is_open():
    asked = threading.Semaphore(0)

    class Sensor(SimulatedGpu):
        def watts(self):
            asked.release()
            return super().watts()

    meter = Meter("cpu", gpu=Sensor(VirtualClock(), [(0, 100.0)]), cpu=None, poll_seconds=0.001)
    with meter.window("train") as window:
        for _ in range(20):
            asked.acquire()
    assert window.samples >= 15
    assert "toolkit-meter" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def powercap(tmp_path):
    """`powercap(energies)` writes the counters of two packages and a memory zone below one."""

    def write(first: int, second: int, range_joules: int = 1000):
        for zone, name, microjoules in (
            ("intel-rapl:0", "package-0", first),
            ("intel-rapl:0:0", "dram", 5),
            ("intel-rapl:1", "package-1", second),
        ):
            folder = tmp_path / zone
            folder.mkdir(exist_ok=True)
            (folder / "name").write_text(name + "\n")
            (folder / "max_energy_range_uj").write_text(f"{range_joules * 10**6 - 1}\n")
            (folder / "energy_uj").write_text(f"{microjoules}\n")
        return tmp_path

    return write


def test_cpu_energy_sums_packages_and_survives_a_counter_wrap(powercap):
    rapl = Rapl(powercap(10_000_000, 999_000_000))
    meter = Meter("cpu", cpu=rapl)
    with meter.window("train") as window:
        powercap(12_000_000, 1_000_000)  # the second counter passed 1000 J and wrapped
    assert window.cpu_joules == pytest.approx(2 + 2)
    assert window.energy_joules is None, "CPU energy never stands in for the GPU's"


@pytest.mark.parametrize(
    ("range_joules", "before", "after"),
    [
        (1000, 400, 1),  # more than half the range
        (262_143, 200_000, 1),  # 62 kJ in less than a minute
        (262_143, 5, 0),
    ],
)
def test_a_reset_of_the_cpu_counters_is_not_a_wrap(powercap, range_joules, before, after):
    folder = powercap(before * 10**6, 0, range_joules)
    meter = Meter("cpu", cpu=Rapl(folder), poll_seconds=None)
    with meter.window("whole") as whole:
        with meter.window("first") as first:
            powercap(after * 10**6, 7 * 10**6, range_joules)
        with meter.window("second") as second:
            powercap((after + 3) * 10**6, 7 * 10**6, range_joules)
    for window in (whole, first, total([first, second])):
        assert window.cpu_joules is None and "reset" in window.cpu_reason
        assert "cpu_counter_reset" in window.flags
    assert second.cpu_joules == pytest.approx(3) and second.flags == []
    powercap(0, 0, range_joules)  # while no window is open
    with meter.window("later") as later:
        powercap(10**6, 0, range_joules)
    assert later.cpu_joules == pytest.approx(1)


def test_cpu_energy_that_becomes_unreadable_is_null_with_a_reason(powercap):
    folder = powercap(0, 0)
    meter = Meter("cpu", cpu=Rapl(folder))
    with meter.window("train") as window:
        (folder / "intel-rapl:1" / "energy_uj").unlink()
    assert window.cpu_joules is None and "RAPL" in window.cpu_reason


def test_unreadable_rapl_is_reported(tmp_path):
    with pytest.raises(SensorError, match="no CPU package"):
        Rapl(tmp_path)
    meter = Meter("cpu")
    assert meter.cpu is not None or "RAPL" in meter.cpu_reason
