"""Runs a model on fake tensors: shapes and storages are those of a real run; nothing is computed.

The model's own objects run, with fakes in the place of its parameters and buffers, so that hooks, losses and
optimizers that refer to them see the fakes, too.  Afterwards everything is as it was found (`budget.found`).
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from toolkit.budget.found import Found, tensors_held
from toolkit.budget.memory import is_out_of_memory
from toolkit.errors import InputError, one_line

_LOG = logging.getLogger("torch._subclasses.fake_tensor")  # tells at length of what fails, besides raising
_PLAIN = (torch.Tensor, nn.Parameter)
_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
_SMALL = 2**20  # elements
_SHARDED = (
    "{} is sharded over processes, as FSDP does. Plan the model before it is wrapped, or use "
    "DistributedDataParallel, whose models are planned as they are."
)
RECORD = "record a real step instead: auto_checkpoint(model, budget, batch=None)"


@dataclass(eq=False)
class Others:
    """What a step refers to besides model and batch, and what a run on fake tensors finds out."""

    optimizer: object = None
    loss: Callable | None = None
    state: list[torch.Tensor] = field(default_factory=list)  # fakes of what the optimizer holds
    effects: set = field(default_factory=set)  # modules that change more than their output, or SHARED


@contextmanager
def on_fake_tensors(model: nn.Module, batch, others: Others | None = None) -> Iterator:
    """Replace the parameters and buffers of `model` by fake ones inside the with statement.

    Yields `batch` (any nest of tensors) as fakes.  Meta tensors represent tensors on the model's device, or
    on the CPU if the whole model is meta because it is too large to allocate.  Parameters of a subclass
    (4-bit weights) stay real.  An optimizer in `others` sees the fakes, and its state is fake.

    All that the model's code can reach, and random numbers, are left as found.  Raises `InputError` for what
    cannot run on fakes.
    """
    refuse_unsuitable(model)
    others = others or Others()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = _Fakes(mode, next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu")))
    found = Found((others.optimizer, "optimizer"), (others.loss, "loss"), (model, model))
    held = [
        (module, tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in list(tensors.items())
        if type(tensor) in _PLAIN
    ]
    versions: list[int] = []
    was_silent, _LOG.disabled = _LOG.disabled, True
    try:
        known = {id(tensor): fakes.of(tensor, exact=True) for *_, tensor in held}
        for value in tensors_held(others.optimizer):
            if type(value) in _PLAIN and id(value) not in known:
                known[id(value)] = fakes.of(value, exact=True)
                others.state.append(known[id(value)])
        # Tensors of others may be changed in place for real: counters of modules in lists.
        others_small = (t for t in found.tensors if id(t) not in known and t.numel() < _SMALL)
        known |= {id(t): t.clone() for t in others_small if not (t.requires_grad or t.is_meta)}
        for _, tensors, name, tensor in held:
            tensors[name] = known[id(tensor)]
        found.replace(known)
        versions = [known[id(tensor)]._version for *_, tensor in held]
        with mode, torch.enable_grad():
            yield tree_map_only(torch.Tensor, fakes.of, batch)
    except Exception as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise InputError(_why_not(model, error)) from error
    finally:
        for (module, _, _, tensor), version in zip(held, versions):
            if known[id(tensor)]._version != version and not isinstance(tensor, nn.Parameter):
                others.effects.add(module)
        others.effects |= found.put_back()
        for _, tensors, name, tensor in held:  # of scripted modules, whose dicts are not Python's
            if tensors[name] is not tensor:
                tensors[name] = tensor
        others.state.clear()
        _LOG.disabled = was_silent
        _MODES.append(weakref.ref(mode))


def _is_number(tensor: torch.Tensor) -> bool:
    return not tensor.dim() and tensor.device.type == "cpu" and not tensor.requires_grad


class _Fakes:
    """Fake tensors of `mode` for real ones; for meta tensors on `device`."""

    def __init__(self, mode: FakeTensorMode, device: torch.device):
        self.mode, self.device = mode, device
        self.made: dict[int, torch.Tensor] = {}  # id of a tensor -> its fake

    def of(self, tensor: torch.Tensor, exact: bool = False) -> torch.Tensor:
        """The fake of `tensor`; if `exact`, of a single number with its value, so that code can read it."""
        if id(tensor) in self.made:
            return self.made[id(tensor)]
        is_leaf = tensor.is_leaf and tensor.requires_grad
        if tensor.is_meta:
            with self.mode:
                fake = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self.device
                )
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, tensor.requires_grad)
        elif exact and _is_number(tensor):
            value = tensor.item()
            with self.mode:
                fake = torch.tensor(value, dtype=tensor.dtype)
        else:
            fake = self.mode.from_tensor(tensor, static_shapes=True)
        if is_leaf and tensor._backward_hooks:
            fake._backward_hooks = tensor._backward_hooks.copy()
        if is_leaf and tensor._post_accumulate_grad_hooks:
            fake._post_accumulate_grad_hooks = tensor._post_accumulate_grad_hooks.copy()
        self.made[id(tensor)] = fake
        return fake


def refuse_unsuitable(model: nn.Module) -> None:
    """Raise `InputError` for models that no plan can be made for, whatever their batch."""
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise InputError(
                f"{kind}.{name} has no shape yet: it is lazy. Run the model on one batch first, for example "
                "`with torch.no_grad(): model(images)`."
            )
        if hasattr(parameter, "placements") or hasattr(parameter, "_sharding_spec"):
            raise InputError(_SHARDED.format(f"{kind}.{name}"))
    for name, module in model.named_modules():
        if "FullyShardedDataParallel" in (parent.__name__ for parent in type(module).__mro__):
            raise InputError(_SHARDED.format(name or kind))
        weight = dict(module._parameters.items()).get("weight")  # a parametrized one would be computed
        if weight is not None and weight.requires_grad and getattr(module, "sparse", False) is True:
            raise InputError(
                f"{name or kind} has sparse gradients, whose size depends on the values of the batch; make "
                "it with sparse=False, or freeze it."
            )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise InputError(
            "no step can be planned inside torch.func.grad, vmap or jvp: call plan or auto_checkpoint before."
        )


def _why_not(model: nn.Module, error: Exception) -> str:
    kind, said = type(model).__name__, one_line(error)
    if isinstance(error, _VALUES) or "numpy" in said or "FakeTensor" in said or "fake" in said.lower():
        return f"{kind} cannot run on fake tensors, its path depends on values ({said}); {RECORD}."
    if "Sparse" in said:
        return f"{kind} uses sparse tensors, whose size depends on values ({said}); make them dense."
    return (
        f"a training step of {kind} fails on this batch ({type(error).__name__}: {said}). If a real step "
        f"runs, {RECORD}."
    )


_MODES: list[weakref.ref] = []  # of finished runs


def swept(run: Callable) -> Callable:
    """Decorator of functions that use `on_fake_tensors`: no fake tensor outlives them.

    They run without the garbage collector, which makes those that do easy to find among the new objects.
    """

    @functools.wraps(run)
    def wrapper(*args, **kwargs):
        collects, failed = gc.isenabled(), True
        gc.disable()
        try:
            result = run(*args, **kwargs)
            failed = False
            return result
        finally:
            kept = _sweep()
            if collects:
                gc.enable()
            if kept and not failed:  # after an error its traceback holds them
                warnings.warn(
                    f"{', '.join(sorted(kept))} still holds tensors without values, from planning; empty it "
                    "before training.",
                    stacklevel=2,
                )

    return wrapper


def _sweep() -> set[str]:
    """Remove the fake tensors of finished runs from caches, lists and dicts that `Found` does not reach.

    Returns the types of other objects that hold some.
    """
    gc.collect(0)
    modes = [mode for reference in _MODES if (mode := reference()) is not None]
    _MODES.clear()
    new = gc.get_objects(generation=1) if sys.version_info < (3, 14) else gc.get_objects()
    left = [o for o in new if issubclass(type(o), FakeTensor) and any(o.fake_mode is m for m in modes)]
    return _remove(left, {id(left), id(new)}) if left else set()


def _remove(values: list, ours: set[int], depth: int = 4) -> set[str]:
    """Remove `values` from the containers that hold them; returns the types of other holders."""
    kept, tuples = set(), []
    ids = set(map(id, values))
    for holder in gc.get_referrers(*values):
        if id(holder) in ours or isinstance(holder, types.FrameType | FakeTensor):
            continue
        if isinstance(holder, dict):
            for key in [k for k, v in dict.items(holder) if id(v) in ids or id(k) in ids]:
                dict.__delitem__(holder, key)
        elif isinstance(holder, list):
            holder[:] = [value for value in holder if id(value) not in ids]
        elif isinstance(holder, set | deque):
            for value in [value for value in holder if id(value) in ids]:
                holder.remove(value)
        elif isinstance(holder, functools._lru_cache_wrapper):
            holder.cache_clear()
        elif isinstance(holder, tuple) and depth:
            tuples.append(holder)
        else:
            kept.add(f"{type(holder).__module__}.{type(holder).__qualname__}")
    return kept | (_remove(tuples, {*ours, id(values), id(tuples)}, depth - 1) if tuples else set())
