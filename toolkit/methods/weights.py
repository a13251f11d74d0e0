"""The trained weights of an adapted model: in memory, as a file, and as a digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from toolkit.errors import InputError


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
    """Write `trained_state` as safetensors."""
    state = {name: value.detach().cpu().contiguous() for name, value in trained_state(model).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, path)
    return path


def load_adapted(model: nn.Module, path: Path) -> None:
    """Load the file of `save_adapted` into a model that was built and adapted like the saved one.

    The frozen weights are not in the file, and are not checked.
    """
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read as adapted weights: {error}") from error
    if state.keys() != trained_state(model).keys():
        different = sorted(state.keys() ^ trained_state(model).keys())
        raise InputError(
            f"{path} is of a model adapted in another way; first differing tensor: {different[0]}."
        )
    model.load_state_dict(state, strict=False)


def weights_sha256(model: nn.Module) -> str:
    """Digest of all parameters and buffers, by name."""
    return state_sha256(model.state_dict())


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Digest of tensors by name, in their order."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
