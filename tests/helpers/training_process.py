"""Trains in processes that `test_killed_and_full.py` can disturb.

Reads one JSON command per line from stdin and writes one answer per line to stdout.  Each training is a fork
of this process, which has imported everything and computed nothing: autograd does not survive a fork.
"""

import errno
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import toolkit
from toolkit.datasets import in_memory, load_dataset
from toolkit.errors import FileError
from toolkit.methods.weights import state_sha256, trained_state
from toolkit.training import resume
from toolkit.training.progress import View


class SignalAfterEachStep(View):
    def step(self, progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def at_call(number: int, action) -> None:
    """Have `action` called before the `number`-th call of `os.fsync` or `os.replace`."""
    left = [number]

    def wrapped(original):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                action()
            return original(*arguments)

        return call

    os.fsync, os.replace = wrapped(os.fsync), wrapped(os.replace)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def disturb(kill_at: int = 0, full_at: int = 0, signal_at: tuple[int, float] | None = None) -> None:
    at_call(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    at_call(full_at, full)
    if signal_at:  # by processor time: a busy machine would be too slow for another clock
        number, seconds = signal_at
        signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)


def train(splits, folder: str | None, preempted: bool = False, **faults: object) -> dict:
    experiment = toolkit.Experiment(
        method="linear", epochs=2, batch_size=32, budget="1GB", device="cpu", checkpointing="none"
    )
    toolkit.seed_everything(0)
    model = toolkit.adapt(toolkit.build_backbone("demo_vit", 10, False), "linear")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # outside `fit` it would end the process
    view = SignalAfterEachStep() if preempted else View()
    disturb(**faults)
    try:
        result = toolkit.fit(
            model, splits, experiment, folder=folder and Path(folder), snapshot_seconds=0, view=view
        )
    except FileError as error:
        return {"error": str(error)}
    sha256 = state_sha256(trained_state(model))
    return {"status": result.status, "history": result.history, "weights": sha256}


def main() -> None:
    digits = load_dataset("digits")
    sizes = {"train": 96, "val": 32, "test": 40}
    parts = {
        split: (getattr(digits, split).images[:size], getattr(digits, split).labels[:size])
        for split, size in sizes.items()
    }
    splits, output = in_memory("digits", parts, digits.classes), os.dup(1)
    os.dup2(2, 1)  # what training prints
    resume.SAVE_SHARE = 1e9  # a snapshot after each step
    for line in sys.stdin:
        with tempfile.NamedTemporaryFile() as file:
            child = os.fork()
            if not child:
                Path(file.name).write_text(json.dumps(train(splits, **json.loads(line))))
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = {"exit": status} | json.loads(file.read() or b"{}")
        os.write(output, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
