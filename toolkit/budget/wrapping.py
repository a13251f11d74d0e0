"""A function around a module's forward, whatever that forward is, was or becomes.

Setting `module.forward` loses what others set there later, and restoring it what they had set.  Here the
module gets a subclass of its class, as under torch's parametrizations, in which `forward` is a descriptor:
reading it gives the forward that the module has at that time, with the functions around it; setting and
deleting it reaches the module as ever.  The signature is the forward's own, and copies and pickles of the
module are of its own class, with nothing around them.
"""

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_KEY = "_functions_around_forward"  # in `vars` of a wrapped module: its wrappings, the outermost last


_thread = threading.local()  # `running`: the wrapped modules whose forward is running in this thread


class Wrapping:
    """Calls `around(forward, *args, **kwargs)` in place of a module's `forward(*args, **kwargs)`.

    A later wrapping is around an earlier one; they can be removed in any order.
    """

    def __init__(self, module: nn.Module, around: Callable):
        self.module, self.around = module, around
        vars(module)[_KEY] = _Wrappings((*wrappings_of(module), self))
        if not issubclass(type(module), _Wrapped):
            object.__setattr__(module, "__class__", _wrapped(type(module)))

    def remove(self) -> None:
        """Take the function off; nothing happens if it is off already."""
        left = _Wrappings(wrapping for wrapping in wrappings_of(self.module) if wrapping is not self)
        if left:
            vars(self.module)[_KEY] = left
            return
        vars(self.module).pop(_KEY, None)
        if type(self.module) is not own_class(self.module):
            object.__setattr__(self.module, "__class__", own_class(self.module))


class _Wrappings(tuple):
    """The wrappings of a module, of which a copy of the module gets none."""

    def __reduce__(self):
        return tuple, ()


def wrappings_of(module: nn.Module) -> tuple[Wrapping, ...]:
    """The functions around a module's forward, the outermost last."""
    return vars(module).get(_KEY, ())


def own_class(module: nn.Module) -> type:
    """The class of a module without the subclass of a wrapped one."""
    kind = type(module)
    return kind.__bases__[1] if kind.__bases__[0] is _Wrapped else kind


@dataclass(frozen=True)
class _Forward:
    """A module's forward with the functions around it.

    Inside of these functions it is the forward alone: another function that was put around it, and set as the
    module's forward, is part of the forward already.
    """

    module: nn.Module
    __wrapped__: Callable

    @torch.compiler.disable(recursive=False)  # what it calls may be compiled
    def __call__(self, *args, **kwargs):
        running = vars(_thread).setdefault("running", set())
        if self.module in running:
            return self.__wrapped__(*args, **kwargs)
        forward = self.__wrapped__
        for wrapping in vars(self.module).get(_KEY, ()):
            forward = functools.partial(wrapping.around, forward)
        running.add(self.module)
        try:
            return forward(*args, **kwargs)
        finally:
            running.discard(self.module)

    def __getattr__(self, name: str):
        if name == "__wrapped__":  # not there yet
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)  # its name, its `__func__`


class _Descriptor:
    """The attribute `forward` of wrapped modules."""

    def __get__(self, module: nn.Module | None, kind: type):
        if module is None:
            return super(_Wrapped, kind).forward
        return _Forward(module, vars(module).get("forward") or super(_Wrapped, module).forward)

    def __set__(self, module: nn.Module, forward: Callable) -> None:
        if isinstance(forward, _Forward) and forward.module is module:  # read before, and restored
            forward = forward.__wrapped__
        if forward == super(_Wrapped, module).forward:
            vars(module).pop("forward", None)
        else:
            vars(module)["forward"] = forward

    def __delete__(self, module: nn.Module) -> None:
        try:
            del vars(module)["forward"]
        except KeyError:
            raise AttributeError("forward") from None


class _Wrapped:
    """What the subclasses of wrapped modules add to their class."""

    forward = _Descriptor()

    def __init_subclass__(cls):
        """Keep the subclass from classes that register or change theirs, as layers of transformers do."""

    def __reduce_ex__(self, protocol):
        """The module without its wrappings and their class."""
        make, args, *rest = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__:  # which pickle accepts for the present class only
            make, args = copyreg._reconstructor, (own_class(self), object, None)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != _KEY}
        return (make, args, *rest)


@functools.cache
def _wrapped(kind: type) -> type:
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (_Wrapped, kind), names)
