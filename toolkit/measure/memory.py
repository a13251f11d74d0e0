"""Observers of a step's memory: over time by phase and block, by category, kept for backward."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from toolkit.budget import DeviceMemory, TensorMemory, find_blocks, tensors_of
from toolkit.budget.flops import current_phase
from toolkit.budget.memory import StorageRef
from toolkit.budget.optimizers import make_state
from toolkit.budget.step import run_step
from toolkit.errors import InputError
from toolkit.measure.sensors import GpuSensor, SensorError


class MemoryTrace(TorchDispatchMode):
    """Logs the allocated bytes after every operator of a step, by phase and block, while it is entered.

    `segments`: `{"phase": forward | backward | recompute | optimizer, "block": name or None,
    "bytes": [...]}` in the order of time.  In backward an operator belongs to the block whose forward
    pass made its node of the graph.
    """

    def __init__(self, memory: DeviceMemory, model: nn.Module):
        super().__init__()
        self.memory = memory
        self.segments: list[dict] = []
        self._optimizing = False
        self._block: str | None = None
        self._starts: list[int] = []  # autograd sequence numbers at which a block begins or ends
        self._owners: list[str | None] = []
        try:
            self._blocks = find_blocks(model)
        except InputError:  # no repeated blocks: only the phases are shown
            self._blocks = {}

    def start_optimizer(self) -> None:
        """Count what follows to the optimizer."""
        self._optimizing = True

    def __enter__(self) -> MemoryTrace:
        self._hooks = [
            handle
            for name, block in self._blocks.items()
            for handle in (
                block.register_forward_pre_hook(lambda *_, name=name: self._enter_block(name)),
                block.register_forward_hook(lambda *_: self._enter_block(None), always_call=True),
            )
        ]
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        for handle in self._hooks:
            handle.remove()
        super().__exit__(*exc)

    def _enter_block(self, name: str | None) -> None:
        if current_phase() == "forward":
            self._block = name
            self._starts.append(torch._C._autograd._get_sequence_nr())
            self._owners.append(name)

    def _block_now(self, phase: str) -> str | None:
        if phase == "forward":
            return self._block
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() < 2**63:  # leaves have no place in the order
            position = bisect_right(self._starts, node._sequence_nr()) - 1
            self._block = self._owners[position] if position >= 0 else None
        return self._block

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return result  # `.item()` after backward is not a forward pass
        phase = "optimizer" if self._optimizing else current_phase()
        block = None if self._optimizing else self._block_now(phase)
        last = self.segments[-1] if self.segments else None
        if last is None or (last["phase"], last["block"]) != (phase, block):
            last = {"phase": phase, "block": block, "bytes": []}
            self.segments.append(last)
        last["bytes"].append(self.memory.allocated_bytes)
        return result


class CategoryMemory(TensorMemory):
    """`TensorMemory` that also counts by category.

    The categories: parameters, buffers, gradients, optimizer, activations, temporaries (of backward), and
    those given to `track_as`.  `category_peaks` are the categories' own maxima, whenever they occur.  Some
    tools call their sum the peak, although no moment reaches it: it is at least `peak_bytes`.
    """

    def __init__(self, device: torch.device, model: nn.Module):
        super().__init__(device)
        self.category_bytes: Counter = Counter()
        self.category_peaks: Counter = Counter()
        self.optimizing = False
        self.optimizer: torch.optim.Optimizer | None = None  # one that is fused into backward
        self._category: dict[int, str] = {}
        self._announced: str | None = None
        self.track_as("parameters", model.parameters())
        self.track_as("buffers", tensors_of(model))  # the parameters are known
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._has_gradient)

    def track_as(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made outside the mode, under `category`."""
        self._announced = category
        self.track(tensors)
        self._announced = None

    def reset_peak(self) -> None:
        super().reset_peak()
        self.category_peaks = Counter(self.category_bytes)

    def _category_now(self) -> str:
        if self._announced:
            return self._announced
        if self.optimizing:
            return "optimizer"
        return "temporaries" if current_phase() == "backward" else "activations"

    def _count(self, tensor: torch.Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        known = key in self._live
        super()._count(tensor)
        if not known and key in self._live:
            self._add(key, self._live[key].nbytes, self._category_now())

    def _add(self, key: int, nbytes: int, category: str) -> None:
        self._category[key] = category
        self.category_bytes[category] += nbytes
        self.category_peaks[category] = max(self.category_peaks[category], self.category_bytes[category])

    def start_optimizer(self) -> None:
        """Count what follows to the optimizer, and the state that a fused one has made in backward."""
        self.optimizing = True
        for tensor in (t for state in self.optimizer.state.values() for t in state.values()):
            self._move(tensor, "optimizer")

    def _has_gradient(self, parameter: torch.Tensor) -> None:
        """Count `parameter.grad`, and the gradients that a fused optimizer has put away before."""
        kept = getattr(self.optimizer, "gradients", {}).values()
        for tensor in (parameter.grad, *kept):
            if tensor is not None:  # an optimizer in the backward pass may have taken it before
                self._move(tensor, "gradients")

    def _move(self, tensor: torch.Tensor, category: str) -> None:
        key = tensor.untyped_storage()._cdata
        nbytes = self._live[key].nbytes
        self.category_bytes[self._category[key]] -= nbytes
        self._add(key, nbytes, category)

    def _freed(self, reference) -> None:
        if self._live.get(reference.key) is reference:
            self.category_bytes[self._category.pop(reference.key)] -= reference.nbytes
        super()._freed(reference)


class KeptTensors(saved_tensors_hooks):
    """Counts the bytes that autograd saves while it is entered, without the tensors `known`.

    A graph that is freed before the forward pass ends adds nothing.  `forward_bytes`: what was saved when the
    forward pass of `run_step` ended.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._saved: dict[int, StorageRef] = {}
        self.forward_bytes = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._saved:
            self._saved[key] = StorageRef(storage, self._freed, key, storage.nbytes())
        return tensor.detach()  # an output that its own graph holds would never be freed

    def _freed(self, reference: StorageRef) -> None:
        if self._saved.get(reference.key) is reference:
            del self._saved[reference.key]

    @property
    def nbytes(self) -> int:
        """Bytes of saved tensors that are still alive."""
        return sum(reference.nbytes for reference in self._saved.values())

    def end_forward(self) -> None:
        """Note what is saved now."""
        self.forward_bytes = self.nbytes


def memory_of_step(
    model: nn.Module,
    batch,
    loss: Callable | None,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *observers: AbstractContextManager,
) -> CategoryMemory:
    """Memory by category of one training step in fp32 whose optimizer has its state.

    `make_optimizer` is called after the gradients are watched, so that those which a fused optimizer takes
    away at once are counted.  `batch`, `loss`, `observers`: as in `run_step`.
    """
    memory = CategoryMemory(next(model.parameters()).device, model)
    memory.track_as("inputs", (leaf for leaf in tree_iter(batch) if isinstance(leaf, torch.Tensor)))
    memory.optimizer = make_optimizer(model)
    memory.optimizing = True
    with memory:
        make_state(model, memory.optimizer)
    memory.optimizing = False
    memory.reset_peak()
    run_step(model, batch, loss, memory.optimizer, "fp32", memory, *observers)
    return memory


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still get on a CUDA device, or of the host's memory; None if unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def context_bytes(sensor: GpuSensor, device: torch.device) -> int:
    """Bytes that this process holds on a CUDA device outside its allocator: context, kernels, libraries.

    Read it after the first steps: kernels are loaded on first use.  Raises `SensorError`.
    """
    context = own_process_bytes(sensor) - torch.cuda.memory_reserved(device)
    if context < 0:
        raise SensorError("NVML reports less memory for this process than its allocator holds")
    return context


def own_process_bytes(sensor: GpuSensor) -> int:
    """Device memory of this process, by NVML: the allocator's and the context's.

    In a container the listed process ids may be the host's; a single process is assumed to be this one.
    """
    processes = sensor.processes()
    used = processes.get(os.getpid())
    if used is None and len(processes) == 1:
        (used,) = processes.values()
    if used is None:
        raise SensorError("NVML does not tell the memory of this process")
    return used
