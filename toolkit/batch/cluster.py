"""Several experiments at a time: worker processes of dask.distributed, one experiment each.

On this machine there is one worker per GPU, which sees no other, and everything listens on 127.0.0.1 only.
Other machines join through a scheduler of their own, `dask scheduler`, and on each, once per GPU,
`CUDA_VISIBLE_DEVICES=0 dask worker ADDRESS --nthreads 1 --resources GPU=1`.  Whoever reaches a scheduler can
run code on its workers: keep it inside an SSH tunnel or give it TLS.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from toolkit.errors import InputError
from toolkit.measure.environment import code_sha256

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10


def _quiet() -> None:
    """dask tells every connection; it reads this when it is first imported, here and in the workers."""
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")


@contextlib.contextmanager
def local_workers(count: int) -> Iterator[Client]:
    """`count` worker processes on this machine, which die with this one.

    Each has a GPU of its own, or where there is none its share of the cores.  Raises `InputError` for more
    workers than GPUs, or than cores.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if not 1 <= count <= (gpus or cores):
        raise InputError(
            f"workers must lie between 1 and {gpus or cores}, one for each "
            f"{'GPU' if gpus else 'core'} of this machine; got {count}."
        )
    _quiet()
    from distributed import Client, Nanny, Scheduler, SpecCluster

    here = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    own = {"nthreads": 1, "memory_limit": 0}  # a kernel's memory is not the worker's: nothing to watch
    spec = {}
    for i in range(count):
        env = {"CUDA_VISIBLE_DEVICES": _visible(i)} if gpus else {"OMP_NUM_THREADS": str(cores // count)}
        resources = {"GPU": 1} if gpus else {}
        spec[i] = {"cls": Nanny, "options": here | own | {"env": env, "resources": resources}}
    scheduler = {"cls": Scheduler, "options": here}
    with (
        SpecCluster(workers=spec, scheduler=scheduler, silence_logs="ERROR") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(count)
        yield client


def _visible(index: int) -> str:
    """What `CUDA_VISIBLE_DEVICES` must be for the GPU that torch counts as `index` here."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index] if named else str(index)


@contextlib.contextmanager
def remote_workers(scheduler: str, runs: Path, *, on_gpu: bool) -> Iterator[Client]:
    """The workers of the scheduler at `scheduler`, such as "tcp://127.0.0.1:8786".

    Raises `InputError` if there is none, or a worker has other code, several threads (papermill changes the
    folder of the whole process), or does not see the folder `runs`, and if runs want GPUs (`on_gpu`) but no
    worker has one, or the other way round.
    """
    _quiet()
    from distributed import Client

    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no scheduler answers at {scheduler!r} ({error}); start one: dask scheduler."
        ) from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        start = f"dask worker {scheduler} --nthreads 1 --resources GPU=1"
        if not workers:
            raise InputError(f"the scheduler at {scheduler} has no workers; start one per GPU: {start}.")
        have_gpu = any(worker["resources"].get("GPU") for worker in workers.values())
        if on_gpu and not have_gpu:
            raise InputError(f"no worker of {scheduler} has the resource GPU; start them so: {start}.")
        if have_gpu and not on_gpu:
            raise InputError(
                f"workers of {scheduler} have GPUs, but no run has device 'cuda', which 'auto' means only "
                "where there is one; give the command on a machine with a GPU."
            )
        runs.mkdir(parents=True, exist_ok=True)
        marker = runs / f".shared-{uuid.uuid4().hex}"
        marker.touch()
        try:
            seen = client.run(_what_a_worker_sees, marker, on_error="return")
        finally:
            marker.unlink()
        for address, found in seen.items():
            if isinstance(found, Exception):
                raise InputError(f"worker {address} has no toolkit ({found}); install it there.")
            sees_runs, sha256 = found
            if not sees_runs:
                raise InputError(
                    f"worker {address} does not see {runs}; use a folder that all machines share."
                )
            if sha256 != code_sha256():
                raise InputError(f"worker {address} has other code of toolkit; install the same there.")
            if workers[address]["nthreads"] != 1:
                raise InputError(f"worker {address} has several threads; start it so: {start}.")
        yield client


def _what_a_worker_sees(marker: Path) -> tuple[bool, str]:
    return marker.exists(), code_sha256()


def each(
    client: Client, function: Callable, arguments: Sequence, resources: Callable[..., dict]
) -> Iterator[tuple]:
    """Pairs of an argument and `function` of it, computed by the workers, in the order in which they end.

    The call of a worker that is lost is made again on another, so `function` must bear that.  What a call
    raised, or that its workers were lost again and again, comes as an exception instead of a result.
    `resources`: what a call takes of its worker, such as `{"GPU": 1}`.
    """
    from distributed import as_completed

    waiting, running = iter(arguments), {}

    def submit() -> list:
        """As many as there are workers: dask counts a lost worker against all that it has in store."""
        free = max(1, len(client.scheduler_info(n_workers=-1)["workers"])) - len(running)
        new = {
            client.submit(function, argument, pure=False, resources=resources(argument)): argument
            for argument in itertools.islice(waiting, max(free, 0))
        }
        running.update(new)
        return list(new)

    ended = as_completed(submit(), loop=client.loop)
    for future in ended:
        argument = running.pop(future)
        ended.update(submit())
        yield argument, future.exception() or future.result()
