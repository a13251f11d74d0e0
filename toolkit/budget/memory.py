"""Bytes of device memory, allocated now and at the peak; sizes as text (`parse_bytes`, `format_bytes`).

On CUDA the caching allocator counts.  The CPU has no such counter, so a dispatch mode counts the storages of
live tensors: the same bytes on every run, which makes every memory statement of this project testable without
a GPU.  Not counted on the CPU: temporaries that a kernel allocates and frees inside one operator, unless they
are registered as workspaces.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from toolkit.errors import InputError

ROUNDING_BYTES = 512  # CUDA's caching allocator hands out multiples of this; the CPU's count rounds alike
CARDS_BYTES = tuple(gigabytes * 10**9 for gigabytes in (2, 4, 6, 8))  # memory of common small GPUs

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_PATTERN = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Whole bytes of `2_000_000_000`, `"2GB"` (10^9), `"1.5 GiB"` (2^30) or `"800 MB"`.

    Raises `InputError` for anything else, and for sizes below one byte.
    """
    match = _PATTERN.fullmatch(str(size))
    unit = match and _UNITS.get(match["unit"].lower())
    if not unit:
        raise InputError(f"{size!r} is not a size; write for example '2GB', '1.5 GiB' or plain bytes.")
    count = int(float(match["number"]) * unit) if "." in match["number"] else int(match["number"]) * unit
    if count < 1:
        raise InputError(f"a size must be at least one byte, got {size!r}.")
    return count


def format_bytes(count: int) -> str:
    """`count` in the largest of bytes, KiB, MiB and GiB that it reaches."""
    if count < 2**10:
        return f"{count:,.0f} bytes"
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def rounded(nbytes: int) -> int:
    """`nbytes` rounded up to the allocator's granularity."""
    return -(-nbytes // ROUNDING_BYTES) * ROUNDING_BYTES


class DeviceMemory(Protocol):
    """Memory of a device, for strategies and training loops.  Enter it around every training step."""

    kind: str  # how the bytes were obtained, for the record

    @property
    def allocated_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...

    @property
    def reserved_peak_bytes(self) -> int | None: ...  # None where nothing is reserved ahead

    def reset_peak(self) -> None: ...

    def track(self, tensors: Iterable[torch.Tensor]) -> None: ...

    def __enter__(self): ...

    def __exit__(self, *exc): ...


def device_memory(device: torch.device) -> DeviceMemory:
    """The memory counter of `device`: the allocator on CUDA, a dispatch mode on the CPU."""
    return CudaMemory(device) if device.type == "cuda" else TensorMemory(device)


class CudaMemory:
    """Bytes of live tensors as the CUDA caching allocator counts them (`memory_allocated`)."""

    kind = "cuda_allocator"

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    @property
    def reserved_peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Nothing to do: the allocator sees every tensor."""

    def __enter__(self) -> CudaMemory:
        return self

    def __exit__(self, *exc) -> None:
        pass


_ATTACHED: list[Callable[[nn.Parameter], Iterable[torch.Tensor]]] = []


class StorageRef(weakref.ref):
    """Weak reference to a storage that keeps its key and size after the storage is freed."""

    __slots__ = ("key", "nbytes")

    def __new__(cls, storage, callback, key, nbytes):
        self = super().__new__(cls, storage, callback)
        self.key, self.nbytes = key, nbytes
        return self

    def __init__(self, storage, callback, key, nbytes):
        super().__init__(storage, callback)


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and tensors attached to parameters, such as the scales of 4-bit weights."""
    parameters = list(model.parameters())
    attached = [tensor for find in _ATTACHED for parameter in parameters for tensor in find(parameter)]
    return [*parameters, *model.buffers(), *attached]


def register_attached(find: Callable[[nn.Parameter], Iterable[torch.Tensor]]) -> None:
    """Add `find(parameter)`, which returns tensors that a parameter holds besides its values."""
    _ATTACHED.append(find)


def _recurrent_workspace(x: torch.Tensor, *rest) -> int:
    """The workspace of a fused recurrent layer: an output, so counted, but empty on fake tensors."""
    if isinstance(x, FakeTensor):
        library = "cudnn" if x.device.type == "cuda" else "mkldnn"
        raise InputError(
            "the memory of this model's recurrent layers cannot be predicted: the workspace of their fused "
            f"kernel is known only when it runs. Plan and train inside `with torch.backends.{library}.flags("
            "enabled=False):`, where the layers are ordinary operators."
        )
    return 0


# Memory that an operator takes while it runs, which no mode sees: operator -> bytes, from its arguments.
WORKSPACES: dict[object, Callable[..., int]] = {
    # Exponentiates into a copy.
    torch.ops.aten.logsumexp.default: lambda x, dim, keepdim=False: rounded(x.nbytes),
    torch.ops.aten.mkldnn_rnn_layer.default: _recurrent_workspace,
    torch.ops.aten._cudnn_rnn.default: _recurrent_workspace,
}


def register_workspace(operator, nbytes: Callable[..., int]) -> None:
    """Add `nbytes(*arguments)`: the bytes that a call of `operator` takes besides its inputs and outputs."""
    WORKSPACES[operator] = nbytes


def workspace_bytes(func, args: tuple, kwargs: dict) -> int:
    """Bytes that a call takes besides its inputs and outputs, as far as `WORKSPACES` tells."""
    workspace = WORKSPACES.get(func)
    return workspace(*args, **kwargs) if workspace else 0


class TensorMemory(TorchDispatchMode):
    """Bytes of live tensor storages on one device, each rounded up to 512, and of known workspaces.

    Counts every tensor that an operator returns while the mode is entered, until the tensor is freed, even
    outside the mode.  Tensors made outside (parameters, the batch, a loaded optimizer state) are added by
    `track`.  With `history`, a list, the bytes at every operator are appended to it.
    """

    kind = "tracked_tensors"
    reserved_peak_bytes = None

    def __init__(self, device: torch.device, history: list[int] | None = None):
        super().__init__()
        self.device_type = device.type
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.history = history
        self._live: dict[int, StorageRef] = {}

    def reset_peak(self) -> None:
        self.peak_bytes = self.allocated_bytes

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made outside the mode; known storages are skipped."""
        for tensor in tensors:
            self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        nbytes = rounded(storage.nbytes())
        self._live[key] = StorageRef(storage, self._freed, key, nbytes)
        self.allocated_bytes += nbytes
        if self.allocated_bytes > self.peak_bytes:
            self.peak_bytes = self.allocated_bytes

    def _freed(self, reference: StorageRef) -> None:
        if self._live.get(reference.key) is reference:
            del self._live[reference.key]
            self.allocated_bytes -= reference.nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result)
        else:
            for leaf in tree_iter(result):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        workspace = workspace_bytes(func, args, kwargs or {}) if func in WORKSPACES else 0
        if workspace:
            self._take_for_a_moment(workspace)
        if self.history is not None:
            self.history.append(self.allocated_bytes + workspace)
        return result

    def _take_for_a_moment(self, nbytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes + nbytes)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that memory ran out, in any of the wordings of torch and CUDA."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        words in message
        for words in ("out of memory", "can't allocate memory", "_ALLOC_FAILED", "not enough memory")
    )


def release_failed_backward() -> None:
    """Free the nodes that a failed backward pass has left in autograd's queue of this thread.

    The engine stops at the error and would keep the waiting nodes, and the tensors that they saved, forever:
    a later pass takes its own, younger nodes first.  A node that is older than all of them makes the engine
    empty the queue; a new thread numbers its nodes from the start, so it makes one.
    """
    made: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.zeros((), requires_grad=True) * 1))
    thread.start()
    thread.join()
    made[0].backward()
