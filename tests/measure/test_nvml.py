"""The real pynvml, end to end, with a C library in place of the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.measure import Nvml, SensorError

HERE = Path(__file__).parents[1] / "helpers"

# The library reads its environment variables at every call, so one process can play all scenes.
SCENES = """
import json, os
from toolkit.measure import Meter, Nvml, SensorError
from toolkit.measure.memory import own_process_bytes

class Clock:
    def move_to(self, seconds):
        self.seconds, os.environ["FAKE_NVML_NOW"] = seconds, str(seconds)

    def perf_counter(self):
        return self.seconds

def window(**environment):
    os.environ.update(environment)
    clock = Clock()
    clock.move_to(1000.0)
    meter = Meter("cpu", gpu=Nvml("GPU-simulated"), cpu=None, clock=clock, poll_seconds=None)
    with meter.window("train") as window:
        for tick in range(1, 21):
            clock.move_to(1000 + tick / 10)
            meter.sample()
    for name in environment:
        del os.environ[name]
    return window.to_dict() | {"average": meter.gpu.power_window_seconds}

def device():
    nvml = Nvml("GPU-simulated")
    return [nvml.name, nvml.driver_version(), nvml.power_limit_watts(), own_process_bytes(nvml)]

told = {
    "plain": window(),
    "no counter": window(FAKE_NVML_NO_COUNTER="1"),
    "old driver": window(FAKE_NVML_NO_COUNTER="1", FAKE_NVML_NO_INSTANT="1"),
    "lost": window(FAKE_NVML_LOST_AFTER="0.7"),
    "device": device(),
}
os.environ["FAKE_NVML_PID"] = "1"
told["device in a container"] = device()
try:
    Nvml("GPU-other")
except SensorError as error:
    told["unknown"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    """The output of a process that found a fake libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to build the fake driver library with")
    folder = tmp_path_factory.mktemp("driver")
    library = str(folder / "libnvidia-ml.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, str(HERE / "fake_nvml.c")], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", SCENES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


JOULES = 300  # 100 W in even seconds of the clock, 200 W in odd ones, for 2 s


def test_counter_and_polling_through_pynvml(told):
    window = told["plain"]
    assert window["source"] == "fake" and "simulated" in window["flags"] and window["average"] == 0.1
    assert window["energy_joules"] == pytest.approx(JOULES)
    assert window["poll_joules"] == pytest.approx(JOULES, rel=0.05)
    assert window["start_celsius"] == window["end_celsius"] == 47


@pytest.mark.parametrize(("scene", "average"), [("no counter", 0.1), ("old driver", 1.0)])
def test_polling_where_the_counter_is_not_supported(told, scene, average):
    window = told[scene]
    assert window["energy_joules"] == pytest.approx(JOULES, rel=0.05)
    assert window["disagreement_pct"] is None and "sensor_failed" not in window["flags"]
    assert window["average"] == average


def test_a_gpu_lost_in_the_middle_is_null_with_its_reason(told):
    window = told["lost"]
    assert window["energy_joules"] is None and "GPU is lost" in window["reason"]
    assert window["seconds"] == pytest.approx(2.0)


def test_driver_and_device_properties_are_read(told):
    assert told["device"] == ["Simulated Square Wave", "000.00", 250.0, 500 * 2**20]
    assert told["device in a container"] == told["device"], "the host's process ids are not ours"


def test_an_unknown_uuid_is_an_error_with_a_reason(told):
    assert told["unknown"].startswith("NVML:")


def test_the_reason_names_a_missing_gpu():
    with pytest.raises(SensorError, match="NVML"):
        Nvml("GPU-simulated")
