"""The folders of the project, files that are written whole and verified when read, and servers that answer.

Jupyter starts kernels in `notebooks/`, papermill in the caller's folder: a relative path would work in one
and fail in the other.  `TOOLKIT_RUNS` and `TOOLKIT_CACHE` name other output folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import ssl
import stat
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from toolkit.errors import FileError

_ABOVE = Path(__file__).resolve().parents
CHECKOUT = (_ABOVE[1] / "pyproject.toml").exists()  # not an installed wheel
# A wheel puts notebooks and weights into share/toolkit of whatever prefix it was installed under.
_SHARES = (above / "share" / "toolkit" for above in _ABOVE)
ROOT = _ABOVE[1] if CHECKOUT else next(filter(Path.is_dir, _SHARES), _ABOVE[0])
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
# An empty variable is as good as none.
RUNS = Path(os.environ.get("TOOLKIT_RUNS") or (DATA / "runs" if CHECKOUT else "runs")).absolute()
_USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toolkit"
CACHE = Path(os.environ.get("TOOLKIT_CACHE") or (DATA / "cache" if CHECKOUT else _USER_CACHE))
DOWNLOADS = DATA / "downloads" if CHECKOUT else CACHE / "downloads"
REACH_SECONDS = 3  # that a server has for an answer; libraries that download try for minutes

SEAL = "sha256"  # the key of a file's digest
MOST_JSON_BYTES = 2**26


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file in the folder of `path`, which takes its place if the body of a with statement ends.

    No reader sees half a file.  Raises `FileError` if the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name[:20]}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        need = f"; {temporary.stat().st_size:,} bytes were written" if temporary.exists() else ""
        raise FileError(f"{path} cannot be written: {error.strerror or error}{need}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing into `folder`."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 32}"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def answers(url: str) -> bool:
    """Whether the server of `url` answers at all, within `REACH_SECONDS`."""
    found: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS)
        except OSError as error:
            # It does if it refuses; and others than Python may trust its certificate.
            reason = getattr(error, "reason", None)
            found.put(isinstance(error, urllib.error.HTTPError) or isinstance(reason, ssl.SSLError))
        else:
            found.put(True)

    # A thread, because no time limit holds for the look-up of a name.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=REACH_SECONDS)
    except queue.Empty:
        return False


def digest(content: object) -> str:
    """The sha256 of what JSON has, as hex digits, whatever the order of keys."""
    plain = json.loads(json.dumps(content))  # keys are text there, and tuples lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, content: dict, *, strict: bool = False) -> None:
    """Write JSON that holds its own digest, as "sha256"; `strict` JSON has no NaN."""
    text = json.dumps(content | {SEAL: digest(content)}, indent=1, allow_nan=not strict)
    write_atomically(path, text.encode())


def read_sealed(path: Path, *, bare: Collection[str] = ()) -> dict:
    """The content that `write_sealed` wrote; with `bare`, also content of just these keys without a digest.

    Raises `ValueError` with the reason for anything else, and `OSError` for a file that cannot be read.
    """
    content = json.loads(read_bounded(path, MOST_JSON_BYTES))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    seal = content.pop(SEAL, None)
    unsealed = seal is None and bare and content.keys() <= set(bare)
    if not unsealed and seal != digest(content):
        raise ValueError("it is damaged: its digest is another one")
    return content


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """The content of a regular file of at most `most_bytes`; raises `ValueError` for others, at once."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"its {status.st_size:,} bytes are more than {most_bytes:,}")
        return file.read(most_bytes)
