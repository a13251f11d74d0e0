"""Where things lie, whatever folder a kernel starts in.

Jupyter starts kernels in `notebooks/`, papermill in the caller's folder: relative paths would work in
one and fail in the other.  `TOOLKIT_RUNS`, `TOOLKIT_FIGURES` and `TOOLKIT_CACHE` move what is written.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
DOWNLOADS = DATA / "downloads"
RUNS = Path(os.environ.get("TOOLKIT_RUNS", DATA / "runs"))
CACHE = Path(os.environ.get("TOOLKIT_CACHE", DATA / "cache"))
FIGURES = Path(os.environ.get("TOOLKIT_FIGURES", ROOT / "figures"))
