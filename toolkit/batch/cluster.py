"""Several experiments at a time: worker processes of dask.distributed, one experiment each.

On this machine each worker has a GPU and sees no other, and everything listens on 127.0.0.1 only.
Other machines join through a scheduler of their own, `dask scheduler`, and on each of them, once per GPU,
`CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 1`.  Anyone who reaches a scheduler can run code on
its workers: keep it inside an SSH tunnel or give it TLS.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from toolkit.errors import InputError
from toolkit.measure.environment import code_sha256

# dask logs every connection; it reads this when it is first imported, here and in the workers.
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")
from distributed import Client, Nanny, Scheduler, SpecCluster, as_completed

CONNECT_SECONDS = 10
LOCAL = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Client]:
    """`count` worker processes on this machine, which die with this one.

    Each has its own GPU or, without GPUs, its share of the cores.  Raises `InputError` for more workers than
    GPUs, or than cores.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if not 1 <= count <= (gpus or cores):
        raise InputError(
            f"workers must be between 1 and {gpus or cores}, one for each {'GPU' if gpus else 'core'} of "
            f"this machine; got {count}."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    share = {"OMP_NUM_THREADS": str(cores // count)}
    workers = {}
    for i in range(count):
        own = {"CUDA_VISIBLE_DEVICES": visible.split(",")[i]} if gpus else share
        # A kernel's memory is not the worker's, so dask has no memory to limit.
        workers[i] = {"cls": Nanny, "options": LOCAL | {"nthreads": 1, "memory_limit": 0, "env": own}}
    scheduler = {"cls": Scheduler, "options": LOCAL}
    with (
        SpecCluster(workers=workers, scheduler=scheduler, silence_logs="ERROR") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(count)
        yield client


@contextlib.contextmanager
def remote_workers(scheduler: str, runs: Path, *, on_gpu: bool) -> Iterator[Client]:
    """The workers of the scheduler at `scheduler`, such as "tcp://127.0.0.1:8786".

    Raises `InputError` if nothing answers there or a worker cannot be used: it has another version of this
    code, several threads (papermill changes the working directory of the whole process), does not see the
    folder `runs`, or does not have the device that the experiments were planned for (`on_gpu`).
    """
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no scheduler answers at {scheduler!r} ({error}); start one: dask scheduler."
        ) from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        start = f"CUDA_VISIBLE_DEVICES=0 dask worker {scheduler} --nthreads 1"
        if not workers:
            raise InputError(f"the scheduler at {scheduler} has no workers; start one per GPU: {start}.")
        runs.mkdir(parents=True, exist_ok=True)
        marker = runs / f".shared-{uuid.uuid4().hex}"
        marker.touch()
        try:
            views = client.run(_view, marker, on_error="return")
        finally:
            marker.unlink()
        for address, view in views.items():
            problem = _problem(view, runs, on_gpu)
            if not problem and workers[address]["nthreads"] != 1:
                problem = f"has several threads; start it with one: {start}"
            if problem:
                raise InputError(f"worker {address} {problem}.")
        yield client


class _View(NamedTuple):
    """What one worker sees."""

    runs: bool
    code_sha256: str
    gpu: bool


def _view(marker: Path) -> _View:
    return _View(marker.exists(), code_sha256(), torch.cuda.is_available())


def _problem(view: _View | Exception, runs: Path, on_gpu: bool) -> str:
    """Why a worker cannot be used, or an empty text."""
    if isinstance(view, Exception):
        return f"has no toolkit ({view}); install it there"
    if not view.runs:
        return f"does not see {runs}; use a folder that all machines share"
    if view.code_sha256 != code_sha256():
        return "has another version of toolkit; install the same one there"
    if view.gpu != on_gpu:
        has, wanted = ("a GPU", "cpu") if view.gpu else ("no GPU", "cuda")
        return f"has {has}, but device {wanted!r} is asked for; give the command where 'auto' means the same"
    return ""


def each(client: Client, function: Callable, arguments: Iterable) -> Iterator[tuple]:
    """Pairs of an argument and `function(argument)`, computed by the workers, in the order of completion.

    The call of a lost worker is repeated on another one, so `function` must tolerate that.  If a call raises,
    or its workers are lost again and again, the exception takes the place of the result.
    """
    waiting, running = iter(arguments), {}

    def submit(count: int) -> list:
        new = {
            client.submit(function, argument, pure=False): argument
            for argument in itertools.islice(waiting, count)
        }
        running.update(new)
        return list(new)

    # One call per worker and no more: dask blames a lost worker on all calls that wait there.
    ended = as_completed(submit(len(client.scheduler_info(n_workers=-1)["workers"])), loop=client.loop)
    for future in ended:
        ended.update(submit(1))
        yield running.pop(future), future.exception() or future.result()
