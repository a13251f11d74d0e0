"""Failures of the Hugging Face hub as one error that says what to do."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)

from toolkit.errors import InputError, one_line

# Raised by the hub's client if it cannot be reached or a connection breaks.  Its HTTP library differs by
# version, and not all of that library's errors are an OSError.
_HTTP = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ in ("HTTPError", "RequestException"))
NETWORK = (OSError, RuntimeError, _HTTP)
# Raised by transformers, open_clip and timm for files that are missing, damaged or of another kind.
UNREADABLE = (
    *NETWORK,
    *(EOFError, ValueError, KeyError, TypeError, AttributeError, ImportError),
    *(safetensors.SafetensorError, pickle.UnpicklingError, StrictDataclassError),
)


@contextmanager
def reading(source: str, revision: str | None) -> Iterator[None]:
    """Raise `InputError` if the repository `source` cannot be read inside the with statement.

    The error tells apart consent to the licence, the name, the `revision` and the network.
    """
    page = f"https://huggingface.co/{source}"
    try:
        yield
    except GatedRepoError as error:  # a RepositoryNotFoundError, too
        cause = error
        problem, remedy = "asks for consent", f"accept the licence at {page} and log in with `hf auth login`"
    except RepositoryNotFoundError as error:
        cause = error
        problem, remedy = "is not on the hub", "check the name, or log in if the repository is private"
    except RevisionNotFoundError as error:
        cause = error
        problem, remedy = f"has no revision {revision!r}", f"name one that is listed at {page}/commits/main"
    except HFValidationError as error:
        cause = error
        problem, remedy = "is neither a folder nor the name of a hub repository", "correct the path"
    except NETWORK as error:
        cause = error
        problem = f"cannot be fetched ({one_line(error)})"
        remedy = "connect to the Hugging Face hub once so that it is cached, or name a local folder"
    else:
        return
    raise InputError(f"{source} {problem}; {remedy}.") from cause


@contextmanager
def opening(source: str | Path, remedy: str) -> Iterator[None]:
    """Raise `InputError`, with the `remedy`, if files of `source` are missing, damaged or of another kind."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {one_line(error)}".rstrip(".")
        raise InputError(f"{source} cannot be loaded ({reason}). {remedy}") from error
