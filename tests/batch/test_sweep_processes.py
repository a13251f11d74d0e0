"""Sweeps that are killed, and sweeps that share a folder: every run is there once, and whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

import toolkit
from toolkit.training.record import load_curves

RUNS = 12


@pytest.fixture(scope="module")
def sweeps():
    """`sweeps(runs, count, kill_after_seconds)`: exit statuses of `count` sweeps at the same time."""
    script = Path(__file__).parents[1] / "helpers" / "sweep_processes.py"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as server:

        def run(runs: Path, count: int = 1, kill_after_seconds: float = 0) -> list[int]:
            sweep = {"runs": str(runs), "kill_after_seconds": kill_after_seconds}
            print(json.dumps({"sweep": sweep, "count": count}), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


def records(runs: Path) -> dict[str, str]:
    """The run's own id by experiment, of every record; one that is not whole would raise."""
    found = [json.loads(path.read_text())["run"] for path in runs.glob("*/record.json")]
    return {run["experiment_id"]: run["run_id"] for run in found}


def test_thirty_kills_lose_no_run(sweeps, tmp_path):
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
    assert killed[-signal.SIGALRM] >= 15, "the sweeps were too fast to be killed"


@pytest.mark.parametrize("count", [2, 6])
def test_sweeps_that_share_a_folder_run_each_experiment_once(sweeps, tmp_path, count):
    for repeat in range(3):
        runs = tmp_path / str(repeat)
        assert sweeps(runs, count) == [0] * count
        executed = Counter((runs / "executed.log").read_text().split())
        assert executed == Counter(records(runs).keys()) and len(executed) == RUNS


def test_two_killed_sweeps_are_continued_by_two_others(sweeps, tmp_path):
    """Both are killed, and two new ones go on together."""
    sweeps(tmp_path, 2, kill_after_seconds=0.05)
    before = records(tmp_path)
    assert sweeps(tmp_path, 2) == [0, 0]
    assert before.items() <= records(tmp_path).items() and len(records(tmp_path)) == RUNS


# --- with real kernels ----------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "toolkit", "run", "--method", "linear", "--checkpointing", "none",
           "--epochs", "8", "--seed", "0", "1", "2"]  # fmt: skip


def sweep(runs: Path, *flags: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *flags, "--runs", str(runs)], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> pd.DataFrame:
    runs, start = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    assert sweep(runs).wait() == 0
    records = toolkit.load_records(runs)
    records.attrs["sweep_seconds"] = time.monotonic() - start
    return records


def assert_same(runs: Path, undisturbed: pd.DataFrame) -> None:
    """The records of `runs` say what undisturbed ones say, order and timings aside."""
    columns = ["experiment_id", "status", "test_top1_pct", "test_loss", "train_peak_bytes", "steps"]
    frames = [
        frame[columns].sort_values("experiment_id") for frame in (toolkit.load_records(runs), undisturbed)
    ]
    pd.testing.assert_frame_equal(*(frame.reset_index(drop=True) for frame in frames), check_exact=True)
    for folder in undisturbed.folder:
        histories = [load_curves(where)["history"] for where in (folder, runs / Path(folder).name)]
        assert histories[0] == histories[1]


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--workers", "2")])
def test_thirty_kills_with_kernels_change_no_record(tmp_path, undisturbed, flags):
    """Finished runs stay, and what is resumed ends bit for bit as if it had not been killed."""
    moments, killed, before = random.Random(0), 0, {}
    while killed < 30 // (1 + len(flags)):
        process = sweep(tmp_path, *flags)
        try:
            process.wait(moments.uniform(0, undisturbed.attrs["sweep_seconds"] / 1.5))
        except subprocess.TimeoutExpired:
            process.kill()  # -9, of the sweep alone: kernels and workers have to notice
            killed += 1
        assert process.wait() in (0, -9)
        now = records(tmp_path)
        assert before.items() <= now.items(), "a finished run was lost or repeated"
        before = now
        if len(before) == len(undisturbed):
            assert_same(tmp_path, undisturbed)
            tmp_path, before = tmp_path / "again", {}
    assert sweep(tmp_path, *flags).wait() == 0
    assert_same(tmp_path, undisturbed)


@pytest.mark.long
def test_two_workers_leave_the_records_that_one_leaves(tmp_path, undisturbed):
    assert sweep(tmp_path, "--workers", "2").wait() == 0
    assert_same(tmp_path, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--workers", "2")])
def test_ten_preemptions_with_kernels_change_no_record(tmp_path, undisturbed, flags):
    """What SLURM sends before it kills: runs are saved, the sweep says 143, and the same command goes on."""
    moments, stopped = random.Random(1), 0
    while stopped < 10:
        process = sweep(tmp_path, *flags)
        try:
            process.wait(moments.uniform(0.2, 0.6) * undisturbed.attrs["sweep_seconds"])
        except subprocess.TimeoutExpired:
            process.send_signal(moments.choice([signal.SIGTERM, signal.SIGUSR1]))
            stopped += 1
        status = process.wait()
        assert status in (0, 143, -signal.SIGTERM, -signal.SIGUSR1)
        if status == 143:
            assert set(toolkit.load_records(tmp_path).status) <= {"ok", "interrupted"}
        if status == 0:
            assert_same(tmp_path, undisturbed)
            tmp_path = tmp_path / "again"
    assert sweep(tmp_path, *flags).wait() == 0
    assert_same(tmp_path, undisturbed)
