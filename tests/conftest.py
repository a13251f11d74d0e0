"""Shared by all tests: no network, nothing written outside a temporary folder, small data."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

# No network, here and in every process that a test starts: see no_network/sitecustomize.py.  These processes
# (notebook kernels, sweeps) import the package of this tree, whatever else is installed.
_guard, _tree = str(Path(__file__).parent / "no_network"), str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_guard, _tree, os.environ.get("PYTHONPATH")]))
sys.path.insert(0, _guard)

# Before anything imports toolkit.files, and inherited by notebook kernels.
_folder = tempfile.mkdtemp(prefix="toolkit-tests-")
os.environ["TOOLKIT_RUNS"] = os.path.join(_folder, "runs")
os.environ["TOOLKIT_CACHE"] = os.path.join(_folder, "cache")
os.environ["HF_HUB_OFFLINE"] = "1"

# One test process per core (pytest-xdist): two threads in each would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ.get("TEST_THREADS", "1")

import hypothesis  # noqa: E402
import no_network_guard  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack  # noqa: E402

import toolkit  # noqa: E402
from toolkit.budget import auto  # noqa: E402
from toolkit.datasets import Splits, in_memory, load_dataset  # noqa: E402

# A loaded machine is slow, not wrong.
hypothesis.settings.register_profile(
    "toolkit", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("toolkit")


@pytest.fixture(autouse=True)
def plans_end():
    """Plans that a test leaves on its models end with it, and watch nothing afterwards."""
    yield
    for handle in list(auto._HANDLES):
        handle.remove()
    assert _get_current_dispatch_mode_stack() == []


@pytest.fixture(scope="session")
def digits() -> Splits:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def few_digits(digits) -> Splits:
    """96 training, 32 validation and 40 test digits."""
    sizes = {"train": 96, "val": 32, "test": 40}
    parts = {
        split: (getattr(digits, split).images[:size], getattr(digits, split).labels[:size])
        for split, size in sizes.items()
    }
    return in_memory("digits", parts, digits.classes, digits.policy)


@pytest.fixture
def demo_model():
    """`demo_model("lora")`: demo_vit with 10 classes and random weights from seed 0, adapted."""

    def build(method: str = "full", pretrained: bool = False, **options):
        toolkit.seed_everything(0)
        return toolkit.adapt(toolkit.build_backbone("demo_vit", 10, pretrained), method, **options)

    return build


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print what tests recorded as properties: figures that are worth a look in every run."""
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties if report.when == "call" else []:
            terminalreporter.write_line(f"{name}: {value}")
