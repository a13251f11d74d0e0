"""Training that is killed, told to stop, or runs out of disk, at any moment, ends as if undisturbed."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from draws import few_or_many

CALLS = 30  # of fsync and replace in a run, about


@pytest.fixture(scope="module")
def train():
    """`train(folder, **fault)`: how a training in a process of its own ended, see `training_process.py`."""
    script = Path(__file__).parents[1] / "helpers" / "training_process.py"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as server:

        def run(folder: Path | None, **fault: object) -> dict:
            command = {"folder": folder and str(folder)} | fault
            print(json.dumps(command), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def expected(train) -> dict:
    found = train(None)
    assert (found["exit"], found["status"]) == (0, "ok")
    return found


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


@few_or_many(3, 200)
def test_kills(train, expected, tmp_path, count):
    """Killed at the n-th call that writes, up to three times in a row before the run may end."""
    rng, killed, runs = random.Random(0), 0, 0
    while killed < count:
        runs += 1
        folder = tmp_path / str(runs)
        for _ in range(rng.randint(1, 3)):
            killed += train(folder, kill_at=rng.randint(1, CALLS))["exit"] == -signal.SIGKILL
        assert train(folder) == expected
        assert temporaries(folder) == [], "temporaries of killed saves pile up"


@few_or_many(3, 20)
def test_signals(train, expected, tmp_path, count):
    """SIGTERM or SIGUSR1 at any moment of a process; the next one goes on."""
    rng, stopped, runs = random.Random(1), 0, 0
    while stopped < count:
        runs += 1
        folder = tmp_path / str(runs)
        for _ in range(2):
            number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
            found = train(folder, signal_at=(number, rng.uniform(0.01, 0.2)))
            assert found["exit"] == 0 and found["status"] in ("ok", "interrupted")
            stopped += found["status"] == "interrupted"
        assert train(folder) == expected


@few_or_many(3, 50)
def test_full_disks(train, expected, tmp_path, count):
    """One line names the file; with room again the run goes on."""
    rng, met, runs = random.Random(2), 0, 0
    while met < count:
        runs += 1
        folder = tmp_path / str(runs)
        error = train(folder, full_at=rng.randint(1, CALLS)).get("error")
        if error:
            met += 1
            assert "No space left" in error and str(folder) in error and "\n" not in error
        assert temporaries(folder) == []
        assert train(folder) == expected


def test_ten_preemptions_change_nothing(train, expected, tmp_path):
    """A run that gets SIGTERM after every step ends with the losses of an undisturbed one."""
    ends = [train(tmp_path, preempted=True) for _ in range(10)]
    assert [end["status"] for end in ends[:5]] == ["interrupted"] * 5
    assert ends[-1] == expected
