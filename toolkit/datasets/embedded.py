"""Classification data sets inside installed packages: no download, seconds to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits

from toolkit.datasets.catalog import Dataset, Prompt, register_dataset
from toolkit.datasets.splits import Policy, Splits, in_memory, three_way

# Photographs inside scikit-image's package.
TEXTURE_PHOTOGRAPHS = (
    "astronaut", "brick", "cat", "cell", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
TEXTURE_TILE, TEXTURE_CROP = 64, 48  # pixels
TEXTURE_CROPS = {"train": 72, "val": 18, "test": 30}  # per class


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,077 train, 270 val, 450 test."""
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rows = three_way(bunch.target, val=0.15, test=0.25)
    parts = {split: (images[r], bunch.target[r]) for split, r in rows.items()}
    return in_memory("digits", parts, [str(digit) for digit in range(10)])


def textures() -> Splits:
    """Grey crops of 48 px from photographs: which photograph is it from?

    Each photograph is cut into tiles of 64 px; a tile belongs to one split, and every crop lies inside
    one tile, so that no pixel of a test crop was trained on.  Grey, so that colour does not give it away.
    """
    rng = np.random.default_rng(0)
    parts: dict[str, tuple[list, list]] = {split: ([], []) for split in TEXTURE_CROPS}
    for label, name in enumerate(TEXTURE_PHOTOGRAPHS):
        grey = grey_photograph(name)
        for split, tiles in assign_tiles(rng, grey.shape).items():
            room = TEXTURE_TILE - TEXTURE_CROP + 1  # positions of a crop in a tile, per axis
            for place in rng.choice(len(tiles) * room**2, TEXTURE_CROPS[split], replace=False):
                tile, offset = divmod(place, room**2)
                y, x = tiles[tile] + divmod(offset, room)
                parts[split][0].append(grey[y : y + TEXTURE_CROP, x : x + TEXTURE_CROP])
                parts[split][1].append(label)
    arrays = {split: (np.stack(crops), np.array(labels)) for split, (crops, labels) in parts.items()}
    return in_memory("textures", arrays, list(TEXTURE_PHOTOGRAPHS))


def grey_photograph(name: str) -> np.ndarray:
    """A photograph of scikit-image as grey pixels, uint8 (H, W)."""
    return np.asarray(Image.fromarray(getattr(skimage.data, name)()).convert("L"))


def write_photos(folder: Path, count: int = 16) -> None:
    """Make a folder of photos to try things on: crops of scikit-image's photographs, a subfolder each."""
    rng = np.random.default_rng(0)
    for name in ("cat", "coffee", "retina", "rocket"):
        photograph = getattr(skimage.data, name)()
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            y, x = (rng.integers(side - 160) for side in photograph.shape[:2])
            Image.fromarray(photograph[y : y + 160, x : x + 160]).save(folder / name / f"{number:02}.jpg")


def assign_tiles(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Top left corners (n, 2) of the tiles of each split: a quarter test, an eighth val, the rest train."""
    rows, columns = shape[0] // TEXTURE_TILE, shape[1] // TEXTURE_TILE
    corners = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    corners = rng.permutation(corners * TEXTURE_TILE)
    test, val = max(1, len(corners) // 4), max(1, len(corners) // 8)
    return {"test": corners[:test], "val": corners[test : test + val], "train": corners[test + val :]}


# The prompts that CLIP's authors publish for MNIST and for DTD (openai/CLIP, data/prompts.md).
DIGIT_PROMPT = Prompt(('a photo of the number: "{}".',))
TEXTURE_PROMPT = Prompt(
    tuple(
        f"a photo of {article} {{}} {noun}."
        for article in ("a", "the")
        for noun in ("texture", "pattern", "thing", "object")
    ),
    "texture",
)
# No flip: a mirrored digit is not a digit.
register_dataset(Dataset("digits", lambda root: digits(), prompt=DIGIT_PROMPT))
register_dataset(Dataset("textures", lambda root: textures(), Policy(flip=True), prompt=TEXTURE_PROMPT))
