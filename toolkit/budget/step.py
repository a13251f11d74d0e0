"""One training step: its parts, and how it runs (`run_step`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_iter

from toolkit.budget.wrapping import Wrapping
from toolkit.errors import InputError, check_name

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to `precision` (fp32: none) on `device`, for a with statement."""
    dtype = AUTOCAST[check_name("precision", precision, AUTOCAST)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def split_batch(batch) -> tuple:
    """(inputs, targets) of a batch; targets None if it has none."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return tuple(batch)
    return batch, None


def call(model: nn.Module, inputs):
    """Call `model` on a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def loss_of(outputs, targets, loss: Callable | None) -> torch.Tensor:
    """`loss(outputs, targets)`; by default the loss that the model returns, or cross-entropy, or without
    targets the sum of all outputs."""
    if loss is not None:
        return loss(outputs, targets)
    if getattr(outputs, "loss", None) is not None:
        return outputs.loss
    outputs = getattr(outputs, "logits", outputs)
    if targets is not None:
        return F.cross_entropy(outputs, targets)
    return sum_of(outputs)


def sum_of(outputs) -> torch.Tensor:
    """The sum of all numbers in the tensors that a model returns: in a nest of tuples, lists, dicts and
    dataclasses.  Integers have no gradient and are left out."""
    sums = [
        (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float().sum()
        for tensor in tensors_in(outputs)
        if tensor.is_floating_point() or tensor.is_complex()
    ]
    if not sums:
        raise InputError(
            f"the model returns {type(outputs).__name__}, which holds no tensor of real numbers; let it "
            "return tensors, or a tuple, list, dict or dataclass of tensors."
        )
    return functools.reduce(torch.add, sums)


def tensors_in(outputs) -> Iterator[torch.Tensor]:
    """The tensors in a nest of tuples, lists, dicts and dataclasses."""
    for leaf in tree_iter(outputs):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def run_step(
    model: nn.Module,
    batch,
    loss: Callable | None,
    optimizer: torch.optim.Optimizer,
    precision: str,
    *observers: AbstractContextManager,
) -> None:
    """Run one training step: forward pass, loss, backward pass, optimizer.

    `batch` and `loss`: as in `plan`.  `observers` are entered around the step, in this order: counters of
    memory, FLOPs, kept bytes.  Those with a method `end_forward` or `start_optimizer` are told when the
    backward pass and the optimizer's step begin.  For the memory of a usual step call `make_state` before.
    """
    inputs, targets = split_batch(batch)
    with ExitStack() as entered:
        for observer in observers:
            entered.enter_context(observer)
        with autocast(next(model.parameters()).device, precision):
            outputs = call(model, inputs)
            value = loss_of(outputs, targets, loss)
        _tell(observers, "end_forward")
        value.backward()
        del value, outputs
        _tell(observers, "start_optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _tell(observers: Iterable, moment: str) -> None:
    for observer in observers:
        if hasattr(observer, moment):
            getattr(observer, moment)()


@contextmanager
def segmented(
    blocks: dict[str, nn.Module], ended: Callable, slices: dict[str, int] | None = None
) -> Iterator[None]:
    """Run blocks on `slices` parts of their batch; call `ended(name, args, kwargs, output)` after each."""
    wrappings = [
        Wrapping(block, functools.partial(run_block, name, ended, (slices or {}).get(name, 1)))
        for name, block in blocks.items()
    ]
    try:
        yield
    finally:
        for wrapping in wrappings:
            wrapping.remove()


def run_block(name: str, ended: Callable, slices: int, forward: Callable, *args, **kwargs):
    """Run a block's forward on `slices` parts of its batch, then call `ended`; see `segmented`."""
    if slices == 1:
        output = forward(*args, **kwargs)
    else:
        (x,) = args
        output = torch.cat([forward(part, **kwargs) for part in x.chunk(slices)])
    ended(name, args, kwargs, output)
    return output


def on_fakes() -> bool:
    """Whether operators run on fake tensors now."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
