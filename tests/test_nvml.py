"""The real pynvml, end to end, against a C library that stands in for the driver's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.measure import Nvml, SensorError

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def driver(tmp_path_factory) -> Path:
    """A folder with a fake libnvidia-ml.so.1."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to build the fake driver library with")
    folder = tmp_path_factory.mktemp("driver")
    library = str(folder / "libnvidia-ml.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", library, str(HERE / "fake_nvml.c")], check=True)
    return folder


def run(driver: Path, code: str, **environment: str) -> dict:
    """Run `code` in a process that finds the fake driver; what it prints last is JSON."""
    variables = {**os.environ, "LD_LIBRARY_PATH": str(driver), **environment}
    program = "import json, time\nfrom toolkit.measure import Meter, Nvml, SensorError\n" + code
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MEASURE = """
meter = Meter("cpu", gpu=Nvml("GPU-simulated"), cpu=None)
with meter.window("train") as window:
    time.sleep(2.0)
print(json.dumps(window.to_dict()))
"""


def test_counter_and_polling_through_pynvml(driver):
    """Any two seconds of the square wave hold 300 J."""
    window = run(driver, MEASURE)
    assert window["source"] == "fake" and "simulated" in window["flags"]
    assert window["energy_joules"] == pytest.approx(150 * window["seconds"], rel=0.03)
    assert window["poll_joules"] == pytest.approx(window["energy_joules"], rel=0.1)
    assert window["start_celsius"] == window["end_celsius"] == 47


def test_polling_where_the_counter_is_not_supported(driver):
    window = run(driver, MEASURE, FAKE_NVML_NO_COUNTER="1")
    assert window["energy_joules"] == pytest.approx(150 * window["seconds"], rel=0.1)
    assert window["disagreement_pct"] is None and "sensor_failed" not in window["flags"]


def test_a_gpu_lost_in_the_middle_is_null_with_its_reason(driver):
    window = run(driver, MEASURE, FAKE_NVML_LOST_AFTER="0.7")
    assert window["energy_joules"] is None and "GPU is lost" in window["reason"]
    assert window["seconds"] == pytest.approx(2.0, abs=0.5)


def test_what_the_driver_tells_of_the_device(driver):
    code = """
from toolkit.measure.memory import own_process_bytes
nvml = Nvml("GPU-simulated")
print(json.dumps([nvml.name, nvml.driver_version(), nvml.power_limit_watts(), own_process_bytes(nvml)]))
"""
    told = run(driver, code)
    assert told == ["Simulated Square Wave", "000.00", 250.0, 500 * 2**20]
    assert run(driver, code, FAKE_NVML_PID="1") == told, "a container does not see the host's ids"


def test_an_unknown_uuid_is_an_error_with_a_reason(driver):
    code = """
try:
    Nvml("GPU-other")
except SensorError as error:
    print(json.dumps(str(error)))
"""
    assert run(driver, code).startswith("NVML:")


def test_without_a_driver_the_reason_says_so():
    try:
        Nvml("GPU-simulated")
    except SensorError as error:
        assert "NVML" in str(error)
    else:
        pytest.fail("there is no such GPU")
