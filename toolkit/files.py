"""The folders of the project as absolute paths, atomic writes, and whether a server has files to offer.

Jupyter starts kernels in `notebooks/`, papermill in the caller's folder: a relative path would work in one
and fail in the other.  `TOOLKIT_RUNS` and `TOOLKIT_CACHE` name other output folders.
"""

from __future__ import annotations

import hashlib
import os
import queue
import ssl
import threading
import urllib.error
import urllib.request
import uuid
from pathlib import Path

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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file in the same folder, `fsync` it and rename it: no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
