"""What a model's code can reach, noted before a trial run and put back after it.

A forward pass may change more than its output: buffers, counters, lists that hooks fill, configuration
objects, closures, globals, caches.  `Found` notes the contents of all of them without copying a tensor.  It
follows references from its roots, and from functions the globals, methods and closures that they name.
"""

from __future__ import annotations

import dis
import functools
import gc
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

# Code of these is not followed, nor are their objects: what they change is their own business.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision", "numpy", "scipy", "pandas"}
_DATA = 20_000  # entries from which on a list or dict is data, which no forward pass changes
_MISSING = object()
SHARED = "shared"  # the owner of what several modules reach


@dataclass(slots=True, eq=False)
class _Contents:
    """The contents of a container: all, or of an object or of globals those called `names`."""

    holder: object
    owner: Hashable
    names: tuple[str, ...] | None = None
    before: list = field(default_factory=list)
    during: list = field(default_factory=list)

    def read(self) -> list:
        holder = self.holder
        if self.names is not None:
            get = holder.get if isinstance(holder, dict) else functools.partial(_attribute, holder)
            return [get(name, _MISSING) for name in self.names]
        if isinstance(holder, dict):
            return [*dict.keys(holder), *dict.values(holder)]
        if isinstance(holder, list | deque | set):
            return list(holder)
        parts = gc.get_referents(holder)  # of a cache: its results, or a dict of them
        return [*parts, *(v for part in parts if isinstance(part, dict) for v in (*part, *part.values()))]

    @property
    def changed(self) -> bool:
        """Whether it holds something else than before."""
        return not _same(self.read(), self.before)

    @property
    def ids(self) -> set[int]:
        """The ids of what it held before."""
        return set(map(id, self.before))

    def write(self, contents: list) -> None:
        holder = self.holder
        if self.names is not None:
            for name, value, now in zip(self.names, contents, self.read()):
                if value is not now:
                    _set(holder, name, value)
        elif isinstance(holder, dict):
            kind, half = OrderedDict if isinstance(holder, OrderedDict) else dict, len(contents) // 2
            kind.clear(holder)  # subclasses may forbid changes
            for key, value in zip(contents[:half], contents[half:]):
                kind.__setitem__(holder, key, value)
        elif isinstance(holder, set):
            holder.clear()
            holder.update(contents)
        elif isinstance(holder, list | deque):
            kind = list if isinstance(holder, list) else deque
            kind.clear(holder)
            kind.extend(holder, contents)
        else:
            holder.cache_clear()


def _attribute(holder: object, name: str, missing: object) -> object:
    if isinstance(holder, type):
        return vars(holder).get(name, missing)
    try:
        return getattr(holder, name, missing)
    except ValueError:  # an empty cell
        return missing


def _set(holder: object, name: str, value: object) -> None:
    if isinstance(holder, dict):
        holder.pop(name, None) if value is _MISSING else holder.__setitem__(name, value)
    elif value is _MISSING:
        delattr(holder, name)
    else:
        setattr(holder, name, value)


def tensors_held(root: object) -> Iterator[torch.Tensor]:
    """The tensors that an object holds as data, in containers and attributes, however deep."""
    stack, seen = [root], {id(root): root}
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
            continue
        parts = []
        if isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, list | tuple | deque):
            parts = value
        elif isinstance(value, torch.optim.Optimizer) or (_is_own(type(value)) and not callable(value)):
            parts = vars(value).values() if hasattr(value, "__dict__") else ()
        new = {id(part): part for part in parts if _may_change(part) and id(part) not in seen}
        seen |= new
        stack += new.values()


class Found:
    """The state of everything that `roots`, pairs of an object and its owner, can reach.

    Modules own what hangs on them; what several owners reach is `SHARED`.
    """

    def __init__(self, *roots: tuple[object, Hashable]):
        self.contents: dict[tuple, _Contents] = {}
        self.tensors: list[torch.Tensor] = []
        self._owners: dict[int, tuple[object, Hashable]] = {}  # with the object, so that ids stay unique
        for root, owner in roots:
            self._follow(root, owner)
        self._values = [(t, t._version, t.requires_grad, t.grad) for t in self.tensors if t.is_leaf]
        self._random = random_states(*_torchs())

    def _follow(self, root: object, owner: Hashable) -> None:
        stack = [(root, owner)]
        while stack:
            value, owner = stack.pop()
            if isinstance(value, nn.Module):
                owner = value
            known = self._owners.get(id(value))
            if known is not None:
                if known[1] is owner or known[1] == SHARED:
                    continue
                owner = SHARED
            self._owners[id(value)] = value, owner
            stack += [(child, owner) for child in self._children(value, owner) if _may_change(child)]

    def replace(self, fakes: dict[int, torch.Tensor]) -> None:
        """Put `fakes`, by the id of the tensor, in the place of tensors."""
        for contents in self.contents.values():
            contents.during = [fakes.get(id(value), value) for value in contents.before]
            if not _same(contents.during, contents.before):
                contents.write(contents.during)
                contents.during = contents.read()

    def put_back(self) -> set[Hashable]:
        """Restore everything; returns the owners of what had changed."""
        changed: set[Hashable] = set()
        for contents in self.contents.values():
            now = contents.read()
            if not _same(now, contents.during):
                changed.add(contents.owner)
            if not _same(now, contents.before):
                contents.write(contents.before)
        for tensor, version, requires_grad, grad in self._values:
            if tensor.grad_fn is not None:
                tensor.detach_().requires_grad_(requires_grad)
            if tensor.grad is not grad:
                tensor.grad = grad
            if tensor._version != version:
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        for state in self._random:
            if state.changed:
                changed.add(SHARED)
                state.write(state.before)
        return changed

    def _note(self, holder: object, owner: Hashable, names: tuple[str, ...] | None = None) -> list:
        """Note the contents of `holder`, once, and return them."""
        key = id(holder), names
        if key in self.contents:
            self.contents[key].owner = owner
        else:
            contents = _Contents(holder, owner, names)
            contents.before = contents.during = contents.read()
            self.contents[key] = contents
        return self.contents[key].before

    def _children(self, value: object, owner: Hashable) -> list:
        if isinstance(value, torch.Tensor):
            if type(value) in (torch.Tensor, nn.Parameter) and not value.is_inference():
                self.tensors.append(value)
            hooks = value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None)
            return [hook for hook in hooks if hook]
        if isinstance(value, dict | list | deque | set):
            attributes = [vars(value)] if hasattr(value, "__dict__") else []
            return attributes + (self._note(value, owner) if len(value) < _DATA else [])
        if isinstance(value, tuple | frozenset):
            return list(value)
        if isinstance(value, types.CellType):
            return self._note(value, owner, ("cell_contents",))
        if isinstance(value, types.MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, functools._lru_cache_wrapper):
            self._note(value, owner)
            return [value.__wrapped__]
        if isinstance(value, property):
            return [value.fget]
        if isinstance(value, staticmethod | classmethod):
            return [value.__func__]
        if isinstance(value, types.FunctionType):
            return [] if _is_library(value.__module__) else self._of_function(value, owner)
        if isinstance(value, type):
            return self._of_class(value, owner) if _is_own(value) else []
        if not (_is_own(type(value)) or isinstance(value, nn.Module | torch.optim.Optimizer)):
            return []
        slots = [n for c in type(value).__mro__ for n in _tuple(c.__dict__.get("__slots__", ()))]
        slots = tuple(n for n in slots if n not in ("__dict__", "__weakref__") and not n.startswith("__"))
        attributes = [vars(value)] if hasattr(value, "__dict__") else []
        return [*attributes, *(self._note(value, owner, slots) if slots else ()), type(value)]

    def _of_function(self, function: types.FunctionType, owner: Hashable) -> list:
        children = [*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__]
        children.append(vars(function))
        space = function.__globals__
        if not _is_library(space.get("__name__")):
            names = _names_in(function.__code__)
            if assigned := _globals_assigned_in(function.__code__):
                children += self._note(space, owner, assigned)
            values = [space[name] for name in names if name in space]
            for value in values:
                if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
                    here = tuple(name for name in names if name in vars(value))
                    children += self._note(vars(value), owner, here) if here else ()
            children += values
        return children

    def _of_class(self, kind: type, owner: Hashable) -> list:
        """The class's own attributes, and the methods that a call of its objects may run."""
        own = [vars(parent) for parent in kind.__mro__ if _is_own(parent)]
        children, wanted, seen = [], ["forward", "__call__", "step"], set()
        while wanted:
            name = wanted.pop()
            method = next((space[name] for space in own if name in space), None)
            if name in seen or method is None:
                continue
            seen.add(name)
            children.append(method)
            code = getattr(getattr(method, "__func__", getattr(method, "fget", method)), "__code__", None)
            wanted += _names_in(code) if code else ()
        for parent in kind.__mro__:
            if _is_own(parent):
                data = [n for n, v in vars(parent).items() if not n.startswith("__") and not callable(v)]
                children += self._note(parent, owner, tuple(data))
        return children


def _may_change(value: object) -> bool:
    """Whether it can hold something: numbers, words and modules are not followed."""
    return not isinstance(
        value, int | float | str | bytes | types.ModuleType | torch.dtype | torch.device | None
    )


def _is_own(kind: type) -> bool:
    return not _is_library(getattr(kind, "__module__", None))


def _is_library(name: str | None) -> bool:
    name = name or "builtins"
    return name.partition(".")[0] in _LIBRARIES or name.startswith("toolkit.budget")


@functools.cache
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes in a function and in those that it defines."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(name for c in inner for name in _names_in(c))]))


@functools.cache
def _globals_assigned_in(code: types.CodeType) -> tuple[str, ...]:
    inner = [
        name for c in code.co_consts if isinstance(c, types.CodeType) for name in _globals_assigned_in(c)
    ]
    if dis.opmap["STORE_GLOBAL"] not in code.co_code[::2]:  # rare, and quicker to see than to list
        return tuple(inner)
    return (*inner, *(i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"))


def _tuple(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _same(one: Sequence, other: Sequence) -> bool:
    return len(one) == len(other) and all(
        a is b or (isinstance(a, tuple) and isinstance(b, tuple) and _same(a, b)) for a, b in zip(one, other)
    )


def _equal(one: object, other: object) -> bool:
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return bool((one == other).all())
    return one == other


@dataclass(slots=True, eq=False)
class _RandomState:
    """A random number generator and its state."""

    read: Callable
    write: Callable
    before: object

    @property
    def changed(self) -> bool:
        return not _equal(self.read(), self.before)


def random_states(*torchs: tuple[Callable, Callable]) -> list[_RandomState]:
    """The state of the random number generators of Python and numpy, and of more: (read, write)."""
    kinds = (random.getstate, random.setstate), (np.random.get_state, np.random.set_state), *torchs
    return [_RandomState(read, write, read()) for read, write in kinds]


def _torchs() -> Iterator[tuple[Callable, Callable]]:
    yield torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all


# Attributes of every module that hold its structure, and do not change in a forward pass.
_STRUCTURE = vars(nn.Module()).keys() - {"_buffers"}


def contents_of(module: nn.Module) -> list[_Contents]:
    """The attributes of a module and of its parts, and the lists, dicts and sets among them."""
    holders = []
    for part in module.modules():
        holders.append(vars(part))
        holders += [
            value
            for name, value in vars(part).items()
            if name not in _STRUCTURE and isinstance(value, list | dict | set | deque)
        ]
    found = [_Contents(holder, None) for holder in holders]
    for contents in found:
        contents.before = contents.read()
    return found
