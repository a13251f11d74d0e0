"""The optimizer of a planned step: the loop's own, of any class, on the model's fake parameters."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.budget.found import Found
from toolkit.errors import InputError, check_name, one_line

_KNOWN = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
}


def is_optimizer(value: object) -> bool:
    """Whether `value` is an optimizer, of any class, and not a function that makes one."""
    made = not isinstance(value, type) and hasattr(value, "step")
    return made and (hasattr(value, "param_groups") or hasattr(value, "optimizer"))


def optimizer_like(optimizer, model: nn.Module) -> Callable[[nn.Module], object]:
    """A function that gives the optimizer of `model`, while its parameters are real or fake.

    `optimizer`: "adamw", "sgd", a function of the trained parameters, or an optimizer of `model`, which is
    returned as it is.  Raises `InputError` if it trains other tensors.
    """
    if isinstance(optimizer, str):
        optimizer = _KNOWN[check_name("optimizer", optimizer, _KNOWN)]
    if not is_optimizer(optimizer):
        if not callable(optimizer):
            raise InputError(
                f"optimizer must be {' or '.join(_KNOWN)}, an optimizer of the model, or a function of its "
                f"trained parameters, got {optimizer!r}."
            )

        def make(other: nn.Module) -> object:
            with unset_fake_temporarily():  # constructors may compute tables
                made = optimizer([p for p in other.parameters() if p.requires_grad])
                found = Found((made, "optimizer"))
                numbers = [
                    t for t in found.tensors if not t.dim() and type(t) is torch.Tensor and not t.is_cuda
                ]
                values = [number.item() for number in numbers]
            # Counters of steps, which fake optimizers have to read.
            made_here = (torch.tensor(value, dtype=t.dtype) for t, value in zip(numbers, values))
            found.replace({id(number): new for number, new in zip(numbers, made_here)})
            return made

        return make
    known = {id(parameter) for parameter in model.parameters()}
    foreign = [p for group in _groups(optimizer) for p in group["params"] if id(p) not in known]
    if foreign:
        raise InputError(
            f"the optimizer trains {len(foreign)} tensors that are not parameters of the model; make it from "
            "model.parameters()."
        )
    return lambda _: optimizer


def _groups(optimizer) -> Sequence[dict]:
    groups = getattr(optimizer, "param_groups", None)
    return _groups(optimizer.optimizer) if groups is None else groups


def deposit_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Give each parameter a gradient of zeros by a backward pass, so that hooks of optimizers run."""
    for parameter in parameters:
        parameter.backward(torch.zeros_like(parameter))


def make_state(model: nn.Module, optimizer) -> None:
    """Let `optimizer` make its state, in a step on gradients of zeros."""
    deposit_gradients(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Stepper:
    """An optimizer in a run on fake tensors, whatever its step asks for.

    `state`: fakes of the state that it has already.  One that cannot step on fakes keeps that state, or has
    AdamW's in its place; `note` says so.
    """

    def __init__(self, optimizer, model: nn.Module, state: Sequence[torch.Tensor] = ()):
        self.optimizer, self.note = optimizer, ""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._has_state = any(tensor.dim() for tensor in state)
        self._way = 0
        groups = _groups(optimizer) if is_optimizer(optimizer) else ()
        for group in groups:
            on_cuda = any(p.device.type == "cuda" for p in group["params"])
            if on_cuda and group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # torch's default there, which it would not choose for fakes
        # L-BFGS fills its memory of pairs over many steps.
        pairs = [
            (group["history_size"], p) for group in groups if "history_size" in group for p in group["params"]
        ]
        self._pairs = [torch.zeros_like(p) for size, p in pairs for _ in range(2 * size)]

    def step(self) -> None:
        """Step in the first way that the optimizer can, which is the same in later steps."""
        while True:
            try:
                return self._step()
            except InputError:
                raise
            except Exception as error:  # an optimizer may raise anything
                self._way += 1
                if self._way > 3:
                    raise
                if self._way == 3:
                    self._replace(error)

    def _step(self) -> None:
        """A step alone, with a closure, with values that it reads assumed, or by the replacement."""
        if self._way == 0:
            self.optimizer.step()
        elif self._way <= 2:
            with _Assumed() if self._way == 2 else contextlib.nullcontext():
                self.optimizer.step(self._closure)
        elif not self._has_state:
            self.optimizer.step()

    def _closure(self) -> torch.Tensor:
        """What a closure of the loop does: gradients, and the loss."""
        deposit_gradients(self._trained)
        return torch.tensor(0.0)

    def _replace(self, error: Exception) -> None:
        taken = "that it has, and its step to need no memory" if self._has_state else "of AdamW"
        self.note = (
            f"the state of {type(self.optimizer).__name__} is assumed to be the one {taken}: it cannot step "
            f"on fake tensors ({one_line(error)[:100]})."
        )
        deposit_gradients(p for p in self._trained if p.grad is None)
        self.optimizer = self.optimizer if self._has_state else torch.optim.AdamW(self._trained)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        try:
            self.optimizer.zero_grad(set_to_none=set_to_none)
        except TypeError:
            self.optimizer.zero_grad()
        for parameter in self._trained:
            parameter.grad = None


class _Assumed(TorchDispatchMode):
    """Answers what code asks of a fake tensor's value: 1, and no.  Sizes of states seldom depend on it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return args[0].dtype is not torch.bool
