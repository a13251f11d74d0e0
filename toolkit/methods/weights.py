"""The trained weights of an adapted model: in memory, as a file, and as a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from toolkit.errors import InputError
from toolkit.files import SEAL, replacing


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters and all buffers: what the backbone alone lacks."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    packed = tuple(f"{name}." for name, p in model.named_parameters() if hasattr(p, "quant_state"))
    return {
        key: value
        for key, value in model.state_dict().items()
        if key not in frozen and not key.startswith(packed)  # scales of packed ones
    }


def save_adapted(model: nn.Module, path: Path) -> Path:
    """Write `trained_state` as safetensors, with its digest as metadata."""
    state = {name: value.detach().cpu().contiguous() for name, value in trained_state(model).items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(state, temporary, {SEAL: state_sha256(state)})
    return path


def load_adapted(model: nn.Module, path: Path) -> None:
    """Load the file of `save_adapted` into a model that was built and adapted like the saved one.

    The frozen weights are not in the file, and are not checked.  Raises `InputError` for a file that is not
    what was written, and for tensors of other names, shapes or types, or that are not finite.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sha256 = (file.metadata() or {}).get(SEAL)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as adapted weights: {error}") from error
    if sha256 != state_sha256(state):
        raise InputError(f"{path} is damaged, or was not written by save_adapted; save the weights again.")
    forms = {name: (tuple(value.shape), value.dtype) for name, value in trained_state(model).items()}
    other = sorted({(n, (tuple(v.shape), v.dtype)) for n, v in state.items()} ^ set(forms.items()), key=str)
    if other:
        raise InputError(
            f"{path} is of a model adapted in another way; first differing tensor: {other[0][0]}."
        )
    infinite = [name for name, value in state.items() if not value.isfinite().all()]
    if infinite:
        raise InputError(f"{path} holds weights that are not finite, in {infinite[0]}; train again.")
    model.load_state_dict(state, strict=False)


def weights_sha256(model: nn.Module) -> str:
    """Digest of all parameters and buffers, by name."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Digest of tensors by name, with their shapes and types."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
