"""What tests of data sets share: the images that a small model expects, and files of random pixels."""

from pathlib import Path

import numpy as np
from PIL import Image

CONFIG = {
    "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
    "interpolation": "bilinear", "crop_pct": 0.875,
}  # fmt: skip


def write_image(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
