"""Records the operators of a forward pass, so that their results need not be kept for backward.

Under a `Tape` every operator below autograd is recorded with its real arguments.  A plan decides which of the
tensors that autograd saves are kept; the others are recomputed from those in backward, when they are needed:
by the same operators on the same bytes with the same random numbers, so gradients are equal bit for bit.
Nothing is computed that backward does not need, and a tensor that two operators save exists once.

This is `torch.utils.checkpoint` at the granularity of operators.  The model's Python code does not run a
second time, so its side effects (running statistics) happen once, and no plan can change a gradient.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_iter

from toolkit.budget.memory import StorageRef
from toolkit.budget.own_checkpoints import own_checkpoints_off

aten = torch.ops.aten

KEEP, CACHE, DROP = "keep", "cache", "drop"

# These update running statistics (arguments 3 and 4; argument 5 is `training`), which no schema declares.
_BATCH_NORMS = {
    getattr(aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
    if hasattr(aten, name)
}
# The outputs of these depend on whether gradients are recorded.
_GRADIENT_DEPENDENT = ("rnn", "lstm", "gru")
# Only the shape of their first argument matters.
_EMPTY = {aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}

_thread = threading.local()


def recomputing() -> bool:
    """Whether this thread is recomputing something."""
    return getattr(_thread, "depth", 0) > 0


class Buffer:
    """The content of a storage at one time.

    `tensor` holds the content if it is kept, or recomputed and still needed; otherwise `op` computes it.
    Buffers live as long as something references them.
    """

    __slots__ = ("__weakref__", "blank", "cached", "dtype", "op", "tensor", "version")

    def __init__(self, op: Op | None, dtype: torch.dtype | None = None):
        self.op = op
        self.dtype = dtype
        self.cached = False
        self.blank = False  # made without a value
        self.tensor = None
        self.version: int | None = None  # of the tensor, if others can reach it


@dataclass(slots=True, eq=False)
class Op:
    """A recorded call.  In its arguments tensors of the tape are `View`s, all others `External`s.

    `writes`: buffers whose storage it changes in place.  `outputs`: first the new contents of these
    storages, then the new tensors, which are the leaves `fresh` of its result.
    """

    func: Callable
    args: tuple
    kwargs: dict
    inputs: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    rng_state: tuple[torch.device, torch.Tensor] | None
    repeatable: bool
    fresh: tuple[int, ...] = ()
    outputs: tuple[weakref.ref, ...] = ()


@dataclass(slots=True, eq=False)
class View:
    """A tensor as a window on a buffer; sizes in elements."""

    buffer: Buffer
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, content: torch.Tensor) -> torch.Tensor:
        """This window on `content`."""
        return content.as_strided(self.size, self.stride, self.offset)


@dataclass(slots=True, eq=False)
class External:
    """A tensor that the tape does not compute (a parameter, the batch, a kept tensor), with its version."""

    tensor: torch.Tensor
    version: int

    def now(self) -> torch.Tensor:
        """The tensor, if it has not changed since."""
        _check_version(self.tensor, self.version)
        return self.tensor


def _check_version(tensor: torch.Tensor, version: int) -> None:
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that is needed for gradients, or to recompute "
            "activations, was changed in place between the forward and the backward pass."
        )


@dataclass(slots=True, eq=False)
class Handle:
    """Held by autograd instead of a tensor that is not kept."""

    view: View
    __weakref__: object = field(init=False, repr=False)


def materialize(buffer: Buffer, execute: Callable, copy: Callable):
    """The content of `buffer`, computed from kept tensors; each tensor is freed after its last use.

    `execute(op, contents of its buffers)` returns the contents of the operator's outputs, `copy(content)` a
    copy: tensors at run time, counted bytes when a plan is simulated.
    """
    if buffer.tensor is not None:
        return buffer.tensor
    order = _missing(buffer)
    uses = Counter(read for op in order for read in (*op.inputs, *op.writes))
    uses[buffer] += 1
    contents: dict[Buffer, object] = {}
    for op in order:
        present = {
            read: contents[read] if read.tensor is None else read.tensor for read in (*op.inputs, *op.writes)
        }
        for written in op.writes:
            if written.tensor is not None or uses[written] > 1 + op.inputs.count(written):
                present[written] = copy(present[written])
        made = execute(op, present)
        present.clear()
        for read in (*op.inputs, *op.writes):
            uses[read] -= 1
            if not uses[read]:
                contents.pop(read, None)
        for reference in op.outputs:
            content, output = made.pop(0), reference()
            if output is None or output.tensor is not None:
                continue
            if output.cached:
                output.tensor, output.op = content, None
            elif uses[output]:
                contents[output] = content
        content = None
    return contents[buffer] if buffer.tensor is None else buffer.tensor


def compute(buffer: Buffer) -> torch.Tensor:
    """The content of `buffer`, outside any graph."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        with torch.no_grad():
            return materialize(buffer, _execute, torch.clone)
    finally:
        _thread.depth -= 1


def _missing(buffer: Buffer) -> list[Op]:
    """The operators that compute `buffer`, each after those whose outputs it reads."""
    order: dict[Op, None] = {}
    stack = [(buffer, False)]
    while stack:
        needed, inputs_done = stack.pop()
        if needed.tensor is not None or needed.op in order:
            continue
        if needed.op is None:
            raise RuntimeError("an activation that backward needs was changed in place after it was kept.")
        if inputs_done:
            order[needed.op] = None
        else:
            stack.append((needed, True))
            stack += [(read, False) for read in reversed((*needed.op.inputs, *needed.op.writes))]
    return list(order)


class Tape(TorchDispatchMode):
    """Records the operators that run while it is entered, and replaces the tensors that autograd saves.

    `decide(op, contents)` is called after each recorded operator has run, with the contents of its outputs'
    storages.  It returns `KEEP`, `CACHE` (recompute, hold until the last use) or `DROP` (recompute at each
    use) for each of `op.outputs`, or None to leave all to autograd.  `passes(func)` says in advance that an
    operator is never recomputed, nor its result changed in place, so that it need not be recorded.
    """

    def __init__(
        self,
        decide: Callable[[Op, dict[int, torch.Tensor]], Sequence[str] | None],
        passes: Callable[[Callable], bool] | None = None,
    ):
        super().__init__()
        self._decide, self._passes = decide, passes
        self._buffers: dict[int, Buffer] = {}  # storage -> its present content
        self._alive: dict[int, StorageRef] = {}
        self._paused, self._outside = False, (None, None)

    def __enter__(self) -> Tape:
        self._plain = own_checkpoints_off()
        self.own_checkpoints = self._plain.__enter__()
        self._enter()
        return self

    def __exit__(self, *exc) -> None:
        if not self._paused:
            self._leave()
        self._plain.__exit__(*exc)

    def _enter(self) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._hooks.__enter__()
        super().__enter__()

    def _leave(self) -> None:
        super().__exit__(None, None, None)
        self._hooks.__exit__(None, None, None)
        del self._hooks  # they reference this tape, which lives as long as the graph
        self._buffers.clear()  # from now on a buffer lives as long as a handle references it
        self._alive.clear()

    def pause(self) -> None:
        """Record nothing until `resume`: what was made before is from outside then.

        Does nothing while modes or hooks of others are inside this tape.
        """
        if not self._paused and _entered() == (self, self.pack):
            self._leave()
            self._outside = _entered()
            self._paused = True

    def resume(self) -> bool:
        """Record again; returns whether it does, which modes and hooks entered in between prevent."""
        if self._paused and _entered() == self._outside:
            self._paused = False
            self._enter()
        return not self._paused

    def pack(self, tensor: torch.Tensor) -> External | Handle:
        """The object that autograd holds instead of `tensor`."""
        view = self._view(tensor)
        if view is not None and view.buffer.tensor is None:
            return Handle(view)
        return External(tensor if tensor.grad_fn is None else _detached(tensor), tensor._version)

    def unpack(self, held: External | Handle) -> torch.Tensor:
        """The tensor that was packed."""
        if isinstance(held, External):
            return held.now()
        with torch.no_grad():
            return held.view.of(compute(held.view.buffer))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or func.is_view:
            return func(*args, **kwargs)
        if self._passes is not None and self._passes(func):
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        op = self._record(func, args, kwargs, written)
        out = func(*args, **kwargs)
        self._note_outputs(op, written, out)
        return out

    def _view(self, tensor: torch.Tensor) -> View | None:
        """`tensor` as a window on a buffer of this tape; None if it is not one."""
        buffer = self._buffers.get(storage_key(tensor))
        if buffer is None or tensor.dtype != buffer.dtype or tensor.is_conj() or tensor.is_neg():
            return None
        return View(buffer, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _record(self, func, args: tuple, kwargs: dict, written: list[torch.Tensor]) -> Op:
        """A call as an `Op` that can be repeated; `written`: the tensors that it changes in place."""
        rng_state = _rng_state(args, kwargs) if draws_random_numbers(func, args, kwargs) else None
        views = [self._view(tensor) for tensor in written]
        alone = not views or func._schema.name.endswith("_")  # its output is the only tensor that it writes
        repeatable = _repeatable(func) and kwargs.get("generator") is None and None not in views and alone
        if couples_samples(func, args):
            args = (*args[:3], None, None, *args[5:])
        inputs: list[Buffer] = []
        noted_args = tuple([self._noted(value, inputs) for value in args])
        noted_kwargs = {name: self._noted(value, inputs) for name, value in kwargs.items()}
        writes = tuple(dict.fromkeys(view.buffer for view in views if view is not None))
        reads = tuple(dict.fromkeys(buffer for buffer in inputs if buffer not in writes))
        return Op(func, noted_args, noted_kwargs, reads, writes, rng_state, repeatable)

    def _noted(self, value, inputs: list[Buffer]):
        """An argument in the form that an `Op` holds; buffers that it reads are added to `inputs`."""
        if isinstance(value, torch.Tensor):
            view = self._view(value)
            if view is None:
                return External(value, value._version)
            inputs.append(view.buffer)
            return view
        if type(value) in (list, tuple):
            return type(value)([self._noted(item, inputs) for item in value])
        return value

    def _note_outputs(self, op: Op, written: list[torch.Tensor], out) -> None:
        """Give every new content a buffer, which holds the content if it is kept."""
        contents = {storage_key(t): t for t in written if storage_key(t) in self._buffers}
        leaves = (out,) if isinstance(out, torch.Tensor) else list(tree_iter(out))
        fresh = []
        for index, leaf in enumerate(leaves):
            key = storage_key(leaf) if isinstance(leaf, torch.Tensor) else None
            if key is not None and key not in self._buffers and key not in contents:
                if _hides_alias(op.func) and key in _storages_from_outside(op):
                    continue
                contents[key] = leaf
                fresh.append(index)
                if leaf.untyped_storage().nbytes() != leaf.numel() * leaf.element_size():
                    op.repeatable = False  # a window on a larger storage
        if not contents:
            return
        op.fresh = tuple(fresh)
        if op.func in _EMPTY:
            (empty,) = contents.values()
            op.func, op.args = aten.empty_strided.default, (tuple(empty.size()), empty.stride())
            op.kwargs, op.inputs = {"dtype": empty.dtype, "device": empty.device}, ()
        buffers = [Buffer(op, content.dtype) for content in contents.values()]
        op.outputs = tuple(map(weakref.ref, buffers))
        outside = [key for key in map(storage_key, written) if key not in self._buffers]
        decisions = self._decide(op, contents)
        if decisions is not None and not op.repeatable:
            decisions = [KEEP] * len(buffers)
        for key in map(storage_key, written):
            if key not in self._buffers:
                continue
            old = self._buffers[key]
            old.tensor = None  # overwritten
            if old.blank and not op.repeatable:
                # Allocated for this call to fill; autograd may have saved it before.
                old.tensor, old.op = contents[key].detach(), None
        for place, (key, content) in enumerate(contents.items()):
            if decisions is None:
                self._buffers.pop(key, None)
                continue
            if key not in self._alive:
                self._alive[key] = StorageRef(content.untyped_storage(), self._forget, key, 0)
            buffer = self._buffers[key] = buffers[place]
            buffer.blank = op.func is aten.empty_strided.default
            if (
                decisions[place] == KEEP
            ):  # what is written into a tensor from outside may be overwritten there
                buffer.tensor = content.detach().clone() if key in outside else content.detach()
                buffer.op, buffer.version = None, buffer.tensor._version
            buffer.cached = decisions[place] == CACHE

    def _forget(self, reference: StorageRef) -> None:
        """Forget a freed storage: its address may be used again."""
        if self._alive.get(reference.key) is reference:
            del self._alive[reference.key]
            self._buffers.pop(reference.key, None)


@functools.cache
def _hides_alias(func) -> bool:
    """Whether an operator may return a window on its input though its schema does not say so."""
    return "unsafe" in func._schema.name


def _storages_from_outside(op: Op) -> set[int | None]:
    values = tree_iter((op.args, op.kwargs))
    return {storage_key(value.tensor) for value in values if isinstance(value, External)}


def _entered() -> tuple[TorchDispatchMode | None, Callable | None]:
    """The mode and the hooks for saved tensors that were entered last in this thread."""
    modes = _get_current_dispatch_mode_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return modes[-1] if modes else None, hooks[0] if hooks else None


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor.detach()` without the tape, in a quarter of the time."""
    if type(tensor) is not torch.Tensor:  # subclasses such as fake tensors need the dispatch
        return tensor.detach()
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


def storage_key(tensor: torch.Tensor) -> int | None:
    """What identifies the storage of `tensor` while it lives; None if it has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors without a storage, for example sparse ones
        return None


@functools.cache
def _written_places(func) -> tuple[int, ...]:
    """Positions of the arguments that `func` changes in place."""
    if not func._schema.is_mutable:
        return ()
    places = enumerate(func._schema.arguments)
    return tuple(place for place, a in places if a.alias_info is not None and a.alias_info.is_write)


def _written(func, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that a call changes in place."""
    places = _written_places(func)
    if not places:
        return []
    names = func._schema.arguments
    values = [args[place] if place < len(args) else kwargs.get(names[place].name) for place in places]
    return [leaf for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _repeatable(func) -> bool:
    return not any(part in func._schema.name for part in _GRADIENT_DEPENDENT)


@functools.cache
def operator_name(func) -> str:
    """The full name of an operator; cached, because str(func) builds it each time."""
    return str(func)


@functools.cache
def _may_draw(func) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def draws_random_numbers(func, args: tuple, kwargs: dict) -> bool:
    """Whether a call changes the state of a random number generator."""
    if not _may_draw(func):
        return False
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")  # attention draws only with dropout
    return (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)) > 0


def couples_samples(func, args: tuple) -> bool:
    """Whether a call is a batch norm that normalises with the statistics of the batch."""
    return func in _BATCH_NORMS and bool(args[5])


def _rng_state(args: tuple, kwargs: dict) -> tuple[torch.device, torch.Tensor] | None:
    """The random state of the device that a call names, or of its first tensor's device."""
    first = next((leaf for leaf in tree_iter(args) if isinstance(leaf, torch.Tensor)), None)
    device = torch.device("cpu") if first is None else first.device
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    if isinstance(first, FakeTensor):
        return None
    return device, torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _execute(op: Op, contents: dict[Buffer, torch.Tensor]) -> list[torch.Tensor]:
    """Run a recorded call on the contents of its buffers; returns the contents of `op.outputs`."""
    args = _real(op.args, contents)
    kwargs = {name: _real(value, contents) for name, value in op.kwargs.items()}
    with _random_numbers_of(op.rng_state):
        out = op.func(*args, **kwargs)
    leaves = list(tree_iter(out)) if op.fresh else []
    return [contents[buffer] for buffer in op.writes] + [leaves[i] for i in op.fresh]


def _real(value, contents: dict[Buffer, torch.Tensor]):
    """An argument of an `Op` in the form that the operator takes."""
    # Not a closure: a recursive closure would hold the contents until the garbage collector runs.
    if isinstance(value, View):
        content, buffer = contents[value.buffer], value.buffer
        if content is buffer.tensor and buffer.version is not None:
            _check_version(content, buffer.version)
        return value.of(content)
    if isinstance(value, External):
        return value.now()
    if type(value) in (list, tuple):
        return type(value)([_real(item, contents) for item in value])
    return value


@contextlib.contextmanager
def _random_numbers_of(state: tuple[torch.device, torch.Tensor] | None) -> Iterator[None]:
    """Run with the random numbers of an earlier moment, then restore the present state."""
    if state is None:
        yield
        return
    device, then = state
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        if on_cuda:
            torch.cuda.set_rng_state(then, device)
        else:
            torch.set_rng_state(then)
        yield
