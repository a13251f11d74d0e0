"""Kernels that start with everything imported: forked from a process that has done it once.

Imports are most of the time of a short run.  Where a fork is not safe (with CUDA, or on a platform without
it), and for kernels of another Python or environment, jupyter starts the kernel as usual.

`serve` is that process.  For a line [argv, environment, folder] on its input it becomes a kernel in a fork,
and answers with the kernel's process number; for such a number it answers with the kernel's exit status.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
import weakref
from collections.abc import Mapping

import torch
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

_IMPORTED = (
    "ipykernel.kernelapp",
    "seaborn",
    "toolkit.baselines",
    "toolkit.forecast.forecasts",
    "toolkit.training.evaluation",
    "toolkit.training.loop",
    "toolkit.plots",
    "toolkit.widgets",
)
# Libraries read variables of these names while they are imported.
_READ_AT_IMPORT = ("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "TORCH", "PYTHON", "TOOLKIT_", "HF_")


class WarmKernelManager(AsyncKernelManager):
    """Starts kernels by a fork where that is safe; for papermill's `kernel_manager_class`."""

    async def _async_pre_start_kernel(self, **kwargs):
        if self.provisioner is None:
            self.kernel_id = self.kernel_id or str(uuid.uuid4())
            self.provisioner = _Provisioner(
                kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self
            )
        return await super()._async_pre_start_kernel(**kwargs)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs):
        environment = kwargs.get("env") or dict(os.environ)
        forkable = hasattr(os, "fork") and not torch.cuda.is_available()
        if not forkable or cmd[0] != sys.executable or "ipykernel_launcher" not in cmd:
            return await super().launch_kernel(cmd, **kwargs)
        self.cwd = kwargs.get("cwd") or os.getcwd()
        argv = cmd[cmd.index("ipykernel_launcher") :]
        server = _server(read_at_import(environment))
        self.process = _ForkedKernel(server, argv, environment, str(self.cwd))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


def read_at_import(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The variables that decide how libraries are imported."""
    return tuple(sorted(item for item in environment.items() if item[0].startswith(_READ_AT_IMPORT)))


class _Server:
    """The process that kernels are forked from; it ends with this one, and its kernels with it."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import {__name__} as kernels; kernels.serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self._turn = threading.Lock()
        weakref.finalize(self, _end, self._process)

    def ask(self, question) -> int | None:
        """Send a question as JSON and return its answer; raises `RuntimeError` if the process has ended."""
        with self._turn:
            try:
                print(json.dumps(question), file=self._process.stdin, flush=True)
                return json.loads(self._process.stdout.readline())
            except (OSError, ValueError):
                _server.cache_clear()
                raise RuntimeError("the process that kernels are forked from has ended") from None


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@functools.lru_cache(maxsize=1)
def _server(read: tuple[tuple[str, str], ...]) -> _Server:
    """A process that has imported everything with these variables."""
    return _Server()


class _ForkedKernel:
    """A kernel's process, with the part of `subprocess.Popen` that jupyter uses."""

    stdin = stdout = stderr = None

    def __init__(self, server: _Server, argv: list[str], environment: dict[str, str], folder: str):
        self._server = server
        self.pid = server.ask([argv, environment, folder])
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask(self.pid)
        return self.returncode

    wait = poll  # jupyter waits for the end before

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve() -> None:
    """Answer questions until the input ends."""
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what imports and kernels print is no answer
    for name in _IMPORTED:
        importlib.import_module(name)
    ended: dict[int, int] = {}
    for line in questions:
        question = json.loads(line)
        if isinstance(question, list):
            answer = os.fork()
            if answer == 0:
                questions.close()
                answers.close()
                _be_kernel(*question)
        else:
            if question not in ended:
                pid, status = os.waitpid(question, os.WNOHANG)
                if pid:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = ended.get(question)
        print(json.dumps(answer), file=answers, flush=True)


def _be_kernel(argv: list[str], environment: dict[str, str], folder: str) -> None:
    import matplotlib
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()  # signals for the kernel reach the processes that it starts
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = argv
    # Read from the environment when matplotlib is imported, which has been.
    inline = "module://matplotlib_inline.backend_inline"
    matplotlib.rcParams["backend"] = os.environ.setdefault("MPLBACKEND", inline)
    status = 1
    try:
        IPKernelApp.launch_instance(argv=[*argv[1:], f"--IPKernelApp.parent_handle={os.getppid()}"])
        status = 0
    finally:
        os._exit(status)
