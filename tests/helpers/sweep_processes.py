"""Runs whole sweeps in processes that `test_sweep_processes.py` can kill, without kernels.

Reads one JSON command per line from stdin and writes one answer per line to stdout.  Each sweep is a fork of
this process, which has imported everything and computed nothing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from toolkit.batch import sweep
from toolkit.experiment import Experiment
from toolkit.training.record import RunRecord, run_fields

TRAIN_SHA256 = "0" * 64


def execute_notebook(name: str, output: Path, parameters: dict) -> None:
    """Replace a kernel: take a moment, and leave a line in a log and a record."""
    experiment = Experiment(**{key: value for key, value in parameters.items() if key != "runs"})
    time.sleep(random.uniform(0.001, 0.02))
    with open(output.parent.parent / "executed.log", "a") as log:
        log.write(experiment.id + "\n")
    record = RunRecord(run_fields(experiment, "ok", None), experiment.config, {"train_sha256": TRAIN_SHA256})
    record.save(output.parent)


def check_runnable(experiments, runs):
    return {"digits": SimpleNamespace(hashes={"train": TRAIN_SHA256})}


def main() -> None:
    sweep.execute_notebook, sweep.check_runnable = execute_notebook, check_runnable
    experiments = sweep.grid(seed=range(12))
    for line in sys.stdin:
        command = json.loads(line)
        children = [start(experiments, **command["sweep"]) for _ in range(command["count"])]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(statuses), flush=True)


def start(experiments: list[Experiment], runs: str, kill_after_seconds: float) -> int:
    """Run a sweep in a process that the system kills after some time (0: never), on a busy machine too."""
    child = os.fork()
    if child:
        return child
    signal.setitimer(signal.ITIMER_REAL, kill_after_seconds)
    random.seed(os.getpid())
    os._exit(len(sweep.run_experiments(experiments, Path(runs))))


if __name__ == "__main__":
    main()
