"""Run a model on fake tensors: shapes and storages as in a real step, no memory and no arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_map_only

from toolkit.errors import InputError


@contextmanager
def on_fake_tensors(model: nn.Module, batch) -> Iterator:
    """`model` holds fake parameters and buffers inside the with statement, as it was afterwards.

    Yields `batch` (any nest of tensors) as fakes.  Parameters of a subclass (4-bit weights) stay what
    they are; operators take them as they come.  Raises `InputError` where the model's path depends on
    values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    modules = list(model.modules())
    saved = [
        (vars(m).copy(), {k: v.copy() for k, v in vars(m).items() if isinstance(v, dict)}) for m in modules
    ]
    try:
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if type(tensor) in (torch.Tensor, nn.Parameter):
                        tensors[name] = mode.from_tensor(tensor, static_shapes=True)
        with mode:
            yield tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), batch)
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
