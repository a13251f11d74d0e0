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

    Yields `batch` (any nest of tensors) as fakes.  Meta tensors stand for tensors on the model's device, or
    where the model itself is on none, as it is too large to be allocated, on the CPU.  Parameters of a
    subclass (4-bit weights) stay what they are; operators take them as they come.  Raises `InputError` where
    the model's path depends on values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_meta: dict[int, torch.Tensor] = {}  # fakes by what they stand for
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
