"""Detection that comes inside installed packages: handwritten digits scattered over photographs' textures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.embedded import TEXTURE_TILE, digits
from toolkit.datasets.mosaics import MATERIALS, tiles_of, varied
from toolkit.datasets.splits import InMemory, InMemoryDense, Splits

SCENES = {"train": 480, "val": 60, "test": 120}  # images
DIGITS = (1, 4)  # fewest and most in an image
SIDES = (12, 28)  # pixels; least and greatest side of a digit's raster of 8 x 8
CONTRAST = (60, 120)  # grey levels between a digit and the mean of what it lies on


def digit_scenes() -> Splits:
    """64 px textures with one to four coloured digits of 12 to 28 px: where are they, and which?

    The digits are scikit-learn's, in the splits of `digits()`; the textures are tiles of the photographs
    behind `texture_mosaics()`, in its splits.  Boxes of two digits do not overlap; a box is tight around its
    digit's ink, and the instances are exactly the inked pixels.
    """
    written, data = digits(), {}
    for number, (split, count) in enumerate(SCENES.items()):
        tiles = [tiles_of(name)[split] for name in MATERIALS]
        ink = getattr(written, split)
        pairs = [_scene(np.random.default_rng((number, row)), tiles, ink) for row in range(count)]
        images, targets = zip(*pairs)
        data[split] = InMemoryDense(np.stack(images), targets)
    hashes = {split: split_data.sha256() for split, split_data in data.items()}
    return Splits(
        name="digit_scenes", **data, classes=written.classes, hashes=hashes
    )  # fmt: skip


def _scene(
    rng: np.random.Generator, tiles: list[np.ndarray], digits: InMemory
) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """An image uint8 (3, 64, 64) and its target; `tiles`: those of each material."""
    material = tiles[rng.integers(len(tiles))]
    image = varied(rng, material[rng.integers(len(material))])[None].repeat(3, axis=0)
    instances, boxes = np.zeros(image.shape[1:], np.uint8), []
    taken = np.zeros(instances.shape, bool)
    for _ in range(rng.integers(*DIGITS, endpoint=True)):
        row = rng.integers(len(digits))
        opacity = _opacity(digits.images[row], rng.integers(*SIDES, endpoint=True))
        height, width = opacity.shape
        for _ in range(20):  # a crowded image keeps fewer digits
            y, x = rng.integers(TEXTURE_TILE - height + 1), rng.integers(TEXTURE_TILE - width + 1)
            place = (slice(y, y + height), slice(x, x + width))
            if not taken[place].any():
                break
        else:
            continue
        image[:, *place] = _painted(rng, image[:, *place], opacity)
        taken[place] = True
        boxes.append([x, y, x + width, y + height, int(digits.labels[row])])
        instances[place][opacity > 0] = len(boxes)
    return image, {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "instances": torch.from_numpy(instances),
    }


def _opacity(digit: np.ndarray, side: int) -> np.ndarray:
    """A digit (8, 8) enlarged to `side` pixels and cut to its ink: 0 (none) to 1 in each pixel."""
    enlarged = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    opacity = ((np.asarray(enlarged) / 255 - 0.25) / 0.5).clip(0, 1)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _painted(rng: np.random.Generator, below: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Pixels (3, h, w) under a digit of a random colour, brighter or darker than they are on average."""
    mean, contrast = below.mean(), rng.uniform(*CONTRAST)
    brighter = rng.random() < 0.5 if CONTRAST[1] < mean < 255 - CONTRAST[1] else mean < 128
    tint = rng.uniform(-40, 40, 3)
    colour = mean + (contrast if brighter else -contrast) + tint - tint.mean()
    painted = below + opacity * (colour[:, None, None].clip(0, 255) - below)
    return painted.round().astype(np.uint8)


# No flip: a mirrored digit is not a digit.
register_dataset(Dataset("digit_scenes", lambda root: digit_scenes(), task="detection", image_pixels=64))
