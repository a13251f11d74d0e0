"""Sweeps that are killed, and sweeps that share a folder: every run is there once, and whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import toolkit

RUNS = 12


@pytest.fixture(scope="module")
def sweeps():
    """`sweeps(runs, count, kill_after_seconds)`: exit statuses of `count` sweeps at the same time."""
    script = Path(__file__).parent / "sweep_processes.py"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as server:

        def run(runs: Path, count: int = 1, kill_after_seconds: float | None = None) -> list[int]:
            command = {"runs": str(runs), "sweeps": count, "kill_after_seconds": kill_after_seconds}
            print(json.dumps(command), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


def records(runs: Path) -> dict[str, str]:
    """The run's own id by experiment, of every record; one that is not whole would raise."""
    found = [json.loads(path.read_text())["run"] for path in runs.glob("*/record.json")]
    return {run["experiment_id"]: run["run_id"] for run in found}


def test_thirty_kills(sweeps, tmp_path):
    moments, killed = random.Random(0), Counter()
    for sweep in range(5):  # a sweep is finished after a few attempts
        runs, before = tmp_path / str(sweep), {}
        for _ in range(6):
            killed.update(sweeps(runs, kill_after_seconds=moments.uniform(0, 0.06)))
            now = records(runs)
            assert before.items() <= now.items(), "a finished run was lost or repeated"
            before = now
        assert sweeps(runs) == [0]
        assert before.items() <= records(runs).items()
        frame = toolkit.load_records(runs)
        assert sorted(frame.seed) == list(range(RUNS)) and set(frame.status) == {"ok"}
        temporary = [path for path in runs.glob("*/.record*")]
        assert len(temporary) <= 6, "at most one of each kill"
    assert killed[-9] >= 15, "the sweeps were too fast to be killed"


@pytest.mark.parametrize("count", [2, 6])
def test_sweeps_that_share_a_folder(sweeps, tmp_path, count):
    for repeat in range(3):
        runs = tmp_path / str(repeat)
        assert sweeps(runs, count) == [0] * count
        executed = Counter((runs / "executed.log").read_text().split())
        assert executed == Counter(records(runs).keys()) and len(executed) == RUNS


def test_a_killed_sweep_beside_another(sweeps, tmp_path):
    """Both are killed, and two new ones go on together."""
    sweeps(tmp_path, 2, kill_after_seconds=0.05)
    before = records(tmp_path)
    assert sweeps(tmp_path, 2) == [0, 0]
    assert before.items() <= records(tmp_path).items() and len(records(tmp_path)) == RUNS
