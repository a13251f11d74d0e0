"""Integers and bools have values in a run on fake tensors.

Which way a model goes often depends on them: whether a mask hides anything, which positions are asked for,
how long the longest text is.  Token ids, masks and labels are small, so they and what follows from them alone
are computed for real, while weights and activations are fake.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_leaves, tree_unflatten

_MOST_ELEMENTS = 2**20  # of a tensor that is computed for real
_index = torch.ops.aten.index.Tensor


class RealIntegers(TorchDispatchMode):
    """Computes for real what depends on small real tensors alone; to be entered after the fake mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is _index and any(map(_selects, args[1])):  # as indices, whose number is known
            return func(args[0], [i for index in args[1] for i in _indices(index)])
        if torch.Tag.nondeterministic_seeded in func.tags or not all(map(_computed, tensors)):
            return func(*args, **kwargs)
        if not tensors:
            made = func(*args, **kwargs)
            if not (isinstance(made, torch.Tensor) and _has_values(made)):
                return made
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def with_values(fakes, batch):
    """`fakes` of a batch, with the integers and bools of the batch as they are, if these have values."""
    leaves, structure = tree_flatten(fakes)
    return tree_unflatten([_real(*pair) for pair in zip(leaves, tree_leaves(batch))], structure)


def described(tensor: torch.Tensor) -> torch.Tensor:
    """A meta tensor like `tensor`; small integers keep their values, outside of the device's memory."""
    meta = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
    if _has_values(tensor) and not tensor.is_meta:
        meta.values_outside = tensor.detach().cpu().numpy().copy()
    return meta


def _real(fake, original):
    if not isinstance(original, torch.Tensor):
        return fake
    if hasattr(original, "values_outside"):
        with unset_fake_temporarily():
            return torch.from_numpy(original.values_outside).to(fake.device)
    return original if _computed(original) and _has_values(original) else fake


def _computed(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and not tensor.is_meta and tensor.numel() <= _MOST_ELEMENTS


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _MOST_ELEMENTS


def _selects(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype is torch.bool and _computed(index)


def _indices(index: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if not _selects(index):
        return (index,)
    with unset_fake_temporarily():
        return index.nonzero().unbind(1)
