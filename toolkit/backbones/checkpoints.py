"""Published checkpoints of this package's own backbones: downloaded, verified and loaded strictly.

Wrong weights are worse than none: a known digest is checked before a file is opened, pickles may hold only
tensors and training arguments, and every key but the classifier's must be there with its shape.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from toolkit.errors import InputError, one_line, some
from toolkit.files import answers, sha256_of

_WRAPPERS = ("state_dict", "model")  # keys under which training scripts store weights
_NOT_CACHED = LocalEntryNotFoundError, OfflineModeIsEnabled
RANDOM_WEIGHTS = "set pretrained=False for random weights"
_PREFIXES = ("module.", "model.")  # of DistributedDataParallel and Hugging Face's wrappers


@dataclass(frozen=True)
class Checkpoint:
    """One file on the Hugging Face hub."""

    repo: str
    file: str
    license: str  # SPDX identifier, in lower case as the hub writes it
    revision: str | None = None  # commit of the repository; None: the newest
    sha256: str | None = None  # of the file; None: unknown, only keys and shapes are checked
    notice: str = ""  # printed before the download

    @property
    def config(self) -> dict[str, str]:
        """Source and licence, by the keys of timm's `pretrained_cfg`."""
        return {
            "hf_hub_id": f"{self.repo}@{self.revision}" if self.revision else self.repo,
            "hf_hub_filename": self.file,
            "license": self.license,
        }


@contextmanager
def opening(source: object, otherwise: str = RANDOM_WEIGHTS) -> Iterator[None]:
    """Raise `InputError` if the files of `source` cannot be fetched, are damaged or of another kind.

    A hub that does not answer is not asked again and again: inside, only its cache is used.  Any exception
    becomes that error: libraries raise many types for such files, and their messages tell a missing consent
    from a missing name or revision.  `otherwise`: what to do without a network.
    """
    offline, logged = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    local = str(source).startswith("local-dir:") or Path(str(source)).is_dir()
    silent = not (offline or local or answers(constants.ENDPOINT))
    if silent:
        constants.HF_HUB_OFFLINE = True
        logging.disable(logging.ERROR)  # of every file that is tried
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".")
        if any(isinstance(one, _NOT_CACHED) for one in _chain(error)):
            reason = f"{constants.ENDPOINT} cannot be reached" if silent else "HF_HUB_OFFLINE is set"
        raise InputError(
            f"{source} cannot be loaded ({reason}). Connect to the Hugging Face hub once, so that its files "
            f"are cached, or {otherwise}."
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(logged)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def fetch(checkpoint: Checkpoint) -> Path:
    """Return the path of the file in the hub's cache, downloaded if it is not there yet.

    Prints the checkpoint's notice, once per process.  Raises `InputError` if the hub cannot be reached.
    """
    if checkpoint.notice:
        _print_once(checkpoint.notice)
    repo, file = checkpoint.repo, checkpoint.file
    with opening(f"{file} of {repo}"):
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=checkpoint.revision))


@functools.cache
def _print_once(notice: str) -> None:
    print(notice)


def read_weights(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint by name, without the names' common prefix (`module.`, `model.`).

    The file is `.safetensors` or a pickle of tensors and `argparse.Namespace`s; its `["model"]` or
    `["state_dict"]` is used if there is one.  Raises `InputError` for another digest than `sha256` (checked
    before opening) and for any other content.
    """
    if not path.exists():
        raise InputError(f"there is no checkpoint {path}.")
    if sha256 is not None and sha256_of(path) != sha256:
        raise InputError(f"{path} is not the file that was published (sha256 {sha256}): delete it and retry.")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{path} cannot be read as a file of weights: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(weights, dict) and isinstance(weights.get(wrapper), dict):
            weights = weights[wrapper]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in weights.items()
    ):
        raise InputError(f"{path} holds no weights: it needs tensors by name, or under one of {_WRAPPERS}.")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def fill(model: nn.Module, weights: dict[str, torch.Tensor], path: Path, *, head: bool = False) -> None:
    """Copy `weights`, read from `path`, into all of `model`, or without `head` into all but its classifier.

    Raises one `InputError` that names all missing, unexpected and misshapen keys, before anything is copied.
    """
    state = model.state_dict()
    left_out = set() if head else head_parameters(model)
    own, given = state.keys() - left_out, weights.keys() - left_out
    misshapen = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(state[name].shape)}"
        for name in sorted(own & given)
        if weights[name].shape != state[name].shape
    ]
    problems = {
        "missing": sorted(own - given),
        "unexpected": sorted(given - own),
        "of another shape": misshapen,
    }
    found = [f"{len(names)} {kind}: {some(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{path} does not fit {type(model).__name__}; " + "; ".join(found) + ".")
    model.load_state_dict(state | {name: weights[name] for name in given})


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters."""
    own = {id(parameter) for parameter in model.get_classifier().parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}
