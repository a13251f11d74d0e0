"""One training step: its parts, and how it runs (`run_step`).

On fake tensors (`on_fake_tensors`) shapes and storages are those of a real step; nothing is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_iter, tree_map_only

from toolkit.budget.wrapping import Wrapping
from toolkit.errors import InputError, check_name

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
}


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


def optimizer_like(optimizer, model: nn.Module) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """A function that makes the same optimizer for the same model with other (fake) parameters.

    `optimizer`: "adamw", "sgd", a function of the trained parameters, or an optimizer of `model`, whose
    class and settings are copied.
    """
    if isinstance(optimizer, str):
        optimizer = _OPTIMIZERS[check_name("optimizer", optimizer, _OPTIMIZERS)]
    if not isinstance(optimizer, torch.optim.Optimizer):

        def make_new(other: nn.Module) -> torch.optim.Optimizer:
            with unset_fake_temporarily():  # constructors may compute tables
                return optimizer([p for p in other.parameters() if p.requires_grad])

        return make_new
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    if foreign:
        raise InputError(
            f"the optimizer trains {len(foreign)} tensors that are not parameters of the model; make it from "
            "model.parameters()."
        )
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in accepted}

    def make(other: nn.Module) -> torch.optim.Optimizer:
        parameters = dict(other.named_parameters())
        groups = []
        for group in optimizer.param_groups:
            chosen = {name: value for name, value in group.items() if name in accepted}
            on_cuda = any(p.device.type == "cuda" for p in group["params"])
            if on_cuda and "foreach" in accepted and group.get("foreach") is None and not group.get("fused"):
                chosen["foreach"] = True  # torch's default there, which it would not choose for fakes
            groups.append({**chosen, "params": [parameters[names[id(p)]] for p in group["params"]]})
        with unset_fake_temporarily():
            return type(optimizer)(groups, **settings)

    return make


def deposit_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Give each parameter a gradient of zeros by a backward pass, so that hooks of optimizers run."""
    for parameter in parameters:
        parameter.backward(torch.zeros_like(parameter))


def make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer` make its state, in a step on gradients of zeros."""
    deposit_gradients(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


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


@contextmanager
def on_fake_tensors(model: nn.Module, batch) -> Iterator:
    """Replace the parameters and buffers of `model` by fake ones inside the with statement.

    Yields `batch` (any nest of tensors) as fakes.  Meta tensors represent tensors on the model's device, or
    on the CPU if the whole model is meta because it is too large to allocate.  Parameters of a subclass
    (4-bit weights) stay real.  Raises `InputError` if the model's path depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_meta: dict[int, torch.Tensor] = {}  # id of a meta tensor -> its fake
    devices = (p.device for p in model.parameters() if not p.is_meta)
    device = next(devices, torch.device("cpu"))

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor, static_shapes=True)
        if id(tensor) not in on_meta:
            with mode:
                made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            on_meta[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        return on_meta[id(tensor)]

    modules = list(model.modules())
    saved = [
        (vars(m).copy(), {k: v.copy() for k, v in vars(m).items() if isinstance(v, dict)}) for m in modules
    ]
    try:
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if type(tensor) in (torch.Tensor, nn.Parameter):
                        tensors[name] = fake(tensor)
        with mode:
            yield tree_map_only(torch.Tensor, fake, batch)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    ) as error:
        raise InputError(
            f"{type(model).__name__} cannot run on fake tensors, its path depends on values ({error}); "
            "measure a real step instead."
        ) from error
    finally:
        for module, (attributes, dicts) in zip(modules, saved):
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in dicts.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
