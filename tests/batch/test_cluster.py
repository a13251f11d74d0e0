"""Sweeps on a real cluster of two worker processes, without kernels; one of the workers is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import cloudpickle
import pytest
from distributed import Scheduler, SpecCluster, Worker, WorkerPlugin

import toolkit
from toolkit.batch import cluster, sweep
from toolkit.errors import InputError
from toolkit.training.record import RunRecord, run_fields


class Install(WorkerPlugin):
    """Replaces the kernel in every worker by a record and, once, if the file `deadly` exists, by a kill."""

    name = "install"

    def __init__(self, train_sha256: str, deadly: Path | None = None):
        self.train_sha256, self.deadly = train_sha256, deadly

    def setup(self, worker) -> None:
        sweep.execute_notebook = self.execute_notebook

    def execute_notebook(self, name: str, output: Path, parameters: dict) -> None:
        if self.deadly is not None:
            with contextlib.suppress(FileNotFoundError):
                self.deadly.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        experiment = toolkit.Experiment(**{key: value for key, value in parameters.items() if key != "runs"})
        with open(output.parent / "executed_by", "a") as log:
            log.write(f"{os.environ.get('OMP_NUM_THREADS')} {os.getpid()}\n")
        if experiment.seed == 3:
            raise ValueError("no such file")
        record = RunRecord(run_fields(experiment, "ok", None), experiment.config)
        record.data["train_sha256"] = self.train_sha256
        record.save(output.parent)


@pytest.fixture(scope="module")
def two_workers():
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with cluster.local_workers(2) as client:
        yield client


def test_workers_listen_on_this_machine_only(two_workers):
    two_workers.wait_for_workers(2)
    workers = two_workers.scheduler_info(n_workers=-1)["workers"]
    assert [address.split(":")[1] for address in workers] == ["//127.0.0.1"] * 2
    assert two_workers.scheduler.address.startswith("tcp://127.0.0.1:")


@pytest.mark.long  # new workers start for ten seconds
def test_a_lost_worker_loses_no_run(two_workers, digits, tmp_path, monkeypatch):
    deadly = tmp_path / "deadly"
    deadly.touch()
    two_workers.register_plugin(Install(digits.hashes["train"], deadly))
    monkeypatch.setattr(cluster, "local_workers", lambda count: contextlib.nullcontext(two_workers))
    runs = tmp_path / "runs"
    experiments = sweep.grid(seed=range(6), method=["linear", "lora"])
    failed = sweep.run_experiments(experiments, runs, workers=2)
    assert not deadly.exists(), "no worker was killed"
    assert [(e.seed, e.method) for e in sorted(failed, key=lambda e: e.method)] == [
        (3, "linear"),
        (3, "lora"),
    ]
    frame = toolkit.load_records(runs)
    assert sorted(frame.experiment_id) == sorted(e.id for e in experiments)
    assert set(frame.status[frame.seed != 3]) == {"ok"}
    assert set(frame.error[frame.seed == 3]) == {"ValueError: no such file"}
    executed = [path.read_text().split("\n")[:-1] for path in runs.glob("*/executed_by")]
    assert [len(lines) for lines in executed] == [1] * 12, "each is run once"
    threads = str((os.cpu_count() or 2) // 2)
    assert {line.split()[0] for lines in executed for line in lines} == {threads}, "they share the cores"


# --- a scheduler that the user started --------------------------------------------------------------------


def test_a_missing_scheduler_is_an_input_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.2)
    for address in ("tcp://127.0.0.1:1", "nonsense://x"):
        with pytest.raises(InputError, match=r"no scheduler answers at .*start one"):
            sweep.run_experiments(sweep.grid(method=["linear"]), tmp_path / "runs", scheduler=address)


def test_unusable_workers_are_refused(tmp_path, monkeypatch):
    """Threads in one process stand for workers: enough for what is asked of them before anything runs."""
    here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    worker = {"cls": Worker, "options": here | {"nthreads": 2}}
    with SpecCluster(worker=worker, scheduler={"cls": Scheduler, "options": here}) as there:

        def connect(on_gpu: bool = False):
            return cluster.remote_workers(there.scheduler_address, tmp_path / "runs", on_gpu=on_gpu)

        with pytest.raises(InputError, match=r"has no workers; start one per GPU: .*dask worker"), connect():
            pass
        there.scale(1)
        there.wait_for_workers(1)
        with pytest.raises(InputError, match=r"has no GPU, but device 'cuda' is asked"), connect(on_gpu=True):
            pass
        with pytest.raises(InputError, match=r"has several threads"), connect():
            pass
        with monkeypatch.context() as patch:
            view = cluster._View(True, "other", False)
            for found, message in (
                (lambda marker: view, "has another version of toolkit"),
                (lambda marker: view._replace(runs=False), "does not see .*runs; use a folder that all"),
                (lambda marker: __import__("toolkitt"), r"has no toolkit \(No module named 'toolkitt'"),
            ):
                patch.setattr(cluster, "_view", found)
                with pytest.raises(InputError, match=message), connect():
                    pass
    assert list((tmp_path / "runs").iterdir()) == [], "the marker is gone"


def test_a_scheduler_runs_experiments_on_its_workers(two_workers, digits, tmp_path):
    two_workers.register_plugin(Install(digits.hashes["train"]))
    runs = tmp_path / "runs"
    experiments = sweep.grid(seed=[0, 1], method=["linear"])
    assert sweep.run_experiments(experiments, runs, scheduler=two_workers.scheduler.address) == []
    assert sorted(toolkit.load_records(runs).seed) == [0, 1]


@pytest.mark.long
def test_a_call_that_kills_its_workers_fails_alone(two_workers):
    """A call that takes four workers with it; those that wait are not counted as lost with them."""

    def call(number: int) -> int:
        if number == 0:
            os._exit(1)
        return number

    results = dict(cluster.each(two_workers, call, range(60)))
    assert isinstance(results.pop(0), Exception)
    assert results == {number: number for number in range(1, 60)}
