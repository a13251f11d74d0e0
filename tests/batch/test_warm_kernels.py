"""Kernels that are forked from a process with everything imported."""

import os
import signal
import time

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from toolkit.batch import warm_kernels
from toolkit.batch.warm_kernels import WarmKernelManager

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="kernels are not forked on this machine"
)


@pytest.fixture(autouse=True, scope="module")
def servers_end():
    yield
    warm_kernels._server.cache_clear()


def _server_of_now() -> warm_kernels._Server:
    return warm_kernels._server(warm_kernels.read_at_import(os.environ))


def _run(tmp_path, *cells: str) -> list[str]:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, kernel_manager_class=WarmKernelManager, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
    return [output for cell in notebook.cells for output in cell.outputs]


def test_kernels_share_imports_and_nothing_else(tmp_path, monkeypatch):
    ask = "import os, sys; print(os.getppid(), 'torch' in sys.modules, os.getcwd(), os.environ.get('MARK'))"
    monkeypatch.setenv("MARK", "1")
    (first,) = _run(tmp_path, f"{ask}; os.environ['LEFT'] = '1'; import builtins; builtins.left = 1")
    monkeypatch.setenv("MARK", "2")
    nothing_left = "import builtins; assert 'LEFT' not in os.environ and not hasattr(builtins, 'left')"
    (second,) = _run(tmp_path, f"{ask}; {nothing_left}")
    server, imported, folder, mark = first.text.split()
    assert (imported, folder, mark) == ("True", str(tmp_path), "1")
    assert second.text.split() == [server, "True", str(tmp_path), "2"]


def test_figures_are_shown(tmp_path):
    outputs = _run(tmp_path, "from matplotlib import pyplot; pyplot.plot([1, 2]);")
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_a_killed_kernel_is_noticed():
    kernel = warm_kernels._ForkedKernel(
        _server_of_now(), ["ipykernel_launcher"], dict(os.environ), os.getcwd()
    )
    assert kernel.poll() is None
    kernel.kill()
    deadline = time.monotonic() + 60
    while kernel.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kernel.poll() == -signal.SIGKILL


def test_another_environment_gets_other_imports(monkeypatch):
    first = _server_of_now()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _server_of_now() is not first
