"""What `auto_checkpoint` sees of a loop besides: calls that go past the model's forward, and peaks."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from toolkit.budget.memory import CudaMemory, TensorMemory, tensors_of
from toolkit.budget.recording import put_underneath, take_away
from toolkit.budget.tape import CACHE, Tape, storage_key


def compiled_modules(model: nn.Module) -> list[str]:
    """Names of the modules in `model` that torch has compiled."""
    return [name or type(model).__name__ for name, module in model.named_modules() if is_compiled(module)]


def is_compiled(module: nn.Module) -> bool:
    """Whether torch has compiled a module."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def is_inside_compiled() -> bool:
    """Whether compiled code is running in this thread.

    A mode that is entered there must be left there: torch restores at its end which modes are looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper":  # of torch._dynamo.eval_frame
            return True
        frame = frame.f_back
    return False


class PastCalls:
    """Blocks of `model` that run outside of its forward, for example by `forward_features`.

    No plan knows what comes before and after them, so each keeps its inputs and computes the rest again.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.counts: Counter[str] = Counter()  # blocks run, by the method that ran them

    @torch.compiler.disable
    def run(self, forward: Callable, *args, **kwargs):
        """Run the forward of a block."""
        entry = self._entry()
        if entry not in self.counts:
            kind = type(self.model).__name__
            warnings.warn(
                f"{entry} runs blocks of {kind} outside of its forward, for which the plan is: there each "
                f"block keeps its inputs and computes the rest again. For a plan call {kind} itself, or give "
                "auto_checkpoint the module that the loop calls.",
                stacklevel=2,
            )
        self.counts[entry] += 1
        with Tape(_caches):
            return forward(*args, **kwargs)

    def _entry(self) -> str:
        """The outermost method of the model, or of a module in it, that is running in this thread."""
        modules, found = set(self.model.modules()), "a loop"
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            is_method = isinstance(own, nn.Module) and hasattr(type(own), code.co_name)
            if is_method and own in modules and not code.co_name.startswith("_"):
                found = f"{type(own).__name__}.{code.co_name}"
            frame = frame.f_back
        return found


def _caches(op, contents: dict) -> list[str]:
    return [CACHE] * len(contents)


class _Reading(TensorMemory):
    """Counts the tensors that operators read, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.track(leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor))
        return super().__torch_dispatch__(func, types, args, kwargs)


class Census(_Reading):
    """Tensors on the CPU that are alive, of those that operators have read or made while it was watching.

    `between()`: whether no step is running; `highest_bytes` were allocated then.
    """

    def __init__(self, device: torch.device, between: Callable[[], bool]):
        super().__init__(device)
        self.between, self.highest_bytes = between, 0
        self.ended = True  # it has not begun

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.allocated_bytes > self.highest_bytes and self.between():
            self.highest_bytes = self.allocated_bytes
        return result

    def watch(self) -> None:
        """Watch what runs from now on, underneath all that the loop does."""
        if self.ended:
            self.ended = False
            put_underneath(self)

    def stop(self) -> None:
        """Watch no more, and forget no tensor."""
        if not self.ended:
            self.ended = True
            take_away(self)

    def bytes_besides(self, tensors: Iterable[torch.Tensor], sizes: Iterable[int]) -> int:
        """Bytes of what is alive besides `tensors`, and besides as many others as there are `sizes`."""
        known = {storage_key(tensor) for tensor in tensors}
        others = Counter(live.nbytes for key, live in self._live.items() if key not in known)
        others.subtract(Counter(sizes))
        return sum(nbytes * count for nbytes, count in others.items() if count > 0)


class StepPeaks:
    """Peak bytes of the next `steps` steps: each from a forward pass to the end of the optimizer's step.

    On the CPU tensors are counted, in steps after one that shows what the loop has made before.
    """

    def __init__(self, model: nn.Module, steps: int):
        self.model, self.steps = model, steps
        self.bytes: list[int] = []
        self._finds = False  # in the present step
        self.device = next(model.parameters()).device
        self._trained = {id(p) for p in model.parameters()}
        self._memory = CudaMemory(self.device) if self.device.type == "cuda" else _Reading(self.device)
        self._hook = None

    @torch.compiler.disable
    def begin(self) -> None:
        """A forward pass begins."""
        if self._hook is not None or len(self.bytes) == self.steps:
            return
        if self.device.type != "cuda" and is_inside_compiled():
            return
        self._finds = self.device.type != "cuda"
        self._memory.track(tensors_of(self.model))
        self._memory.track(p.grad for p in self.model.parameters() if p.grad is not None)
        self._memory.reset_peak()
        if isinstance(self._memory, TorchDispatchMode):
            put_underneath(self._memory)
        self._hook = register_optimizer_step_post_hook(self._ended)

    def _ended(self, optimizer, args, kwargs) -> None:
        if any(id(p) in self._trained for group in optimizer.param_groups for p in group["params"]):
            if not self._finds:
                self.bytes.append(self._memory.peak_bytes)
            self._finds = False
            self._memory.reset_peak()
            if len(self.bytes) == self.steps:
                self.stop()

    def stop(self) -> None:
        """Count no more."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if isinstance(self._memory, TorchDispatchMode):
            take_away(self._memory)
