"""Dense tasks from pictures that are composed here, with exact targets and without a download.

* mosaics: segmentation of photographs' textures.
* digit_scenes: detection of handwritten digits scattered over these textures.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.embedded import TEXTURE_TILE, assign_tiles, digits, grey_photograph
from toolkit.datasets.splits import InMemory, Policy, Splits, in_memory

# Photographs of scikit-image whose grey tiles of 64 px resemble one another and differ from the others'.
MATERIALS = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon")

MOSAICS = {"train": 240, "val": 60, "test": 120}  # images
REGIONS = (2, 5)  # fewest and most in a mosaic
LEAST_SHARE = 0.06  # of the image's area that a region covers

SCENES = {"train": 480, "val": 60, "test": 120}  # images
DIGITS = (1, 4)  # fewest and most in a scene
SIDES = (12, 28)  # pixels; least and greatest side of a digit's raster of 8 x 8
CONTRAST = (60, 120)  # grey levels between a digit and the mean of its background


@functools.cache
def tiles_of(name: str) -> dict[str, np.ndarray]:
    """Grey tiles uint8 (n, 64, 64) of scikit-image's photograph `name` by split; no two share a pixel."""
    grey, side = grey_photograph(name), TEXTURE_TILE
    return {
        split: np.stack([grey[y : y + side, x : x + side] for y, x in corners])
        for split, corners in assign_tiles(np.random.default_rng(0), grey.shape).items()
    }


def varied(rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
    """Turn `tile` by a multiple of 90 degrees, mirror it or not, and change contrast and brightness."""
    turned = np.rot90(tile, rng.integers(4))
    if rng.random() < 0.5:
        turned = turned[:, ::-1]
    shifted = rng.uniform(0.75, 1.25) * (turned - turned.mean()) + turned.mean() + rng.uniform(-25, 25)
    return shifted.round().clip(0, 255).astype(np.uint8)


# --- mosaics --------------------------------------------------------------------------------------


def texture_mosaics() -> Splits:
    """64 px images of two to five regions, each filled from another photograph: which is a pixel from?

    The regions are the pixels nearest to random points under a random metric, so that their borders are
    straight or stepped.  Each is filled from one tile of its photograph, turned, mirrored, and made
    brighter or darker.  Tiles belong to one split: no pixel of a test image was trained on.
    """
    parts = {}
    for number, (split, count) in enumerate(MOSAICS.items()):
        tiles = [tiles_of(name)[split] for name in MATERIALS]
        pairs = [_mosaic(np.random.default_rng((number, row)), tiles) for row in range(count)]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs))
        parts[split] = images[:, None].repeat(3, axis=1), list(torch.from_numpy(masks))
    return in_memory("mosaics", parts, list(MATERIALS))


def _mosaic(rng: np.random.Generator, tiles: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, both uint8 (64, 64); `tiles`: those of each class."""
    regions = _regions(rng, TEXTURE_TILE)
    classes = rng.permutation(len(tiles))[: regions.max() + 1]
    image = np.zeros(regions.shape, np.uint8)
    for region, label in enumerate(classes):
        inside = regions == region
        image[inside] = varied(rng, tiles[label][rng.integers(len(tiles[label]))])[inside]
    return image, classes.astype(np.uint8)[regions]


def _regions(rng: np.random.Generator, side: int) -> np.ndarray:
    """The region 0, 1, ... of each pixel (side, side); drawn again until none is small."""
    count = rng.integers(REGIONS[0], REGIONS[1], endpoint=True)
    centres = np.arange(side)[:, None] + 0.5
    metric = (np.add, np.hypot, np.maximum)[rng.integers(3)]  # city blocks, straight lines, squares
    while True:
        y, x = rng.uniform(0, side, (2, count))
        distances = metric(abs(centres - y)[:, None], abs(centres - x)[None])  # (side, side, count)
        regions = distances.argmin(-1)
        if np.bincount(regions.ravel(), minlength=count).min() >= LEAST_SHARE * side**2:
            return regions


# --- scenes ---------------------------------------------------------------------------------------


def digit_scenes() -> Splits:
    """64 px textures with one to four coloured digits of 12 to 28 px: where are they, and which?

    The digits are scikit-learn's, in the splits of `digits()`; the textures are tiles of the photographs
    that `texture_mosaics()` uses, in its splits.  Boxes do not overlap; a box is tight around its digit's
    ink, and the instances are exactly the inked pixels.
    """
    written, parts = digits(), {}
    for number, (split, count) in enumerate(SCENES.items()):
        tiles = [tiles_of(name)[split] for name in MATERIALS]
        ink = getattr(written, split)
        pairs = [_scene(np.random.default_rng((number, row)), tiles, ink) for row in range(count)]
        images, targets = zip(*pairs)
        parts[split] = np.stack(images), targets
    return in_memory("digit_scenes", parts, written.classes)


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
    """Paint a digit of a random colour, brighter or darker than the mean, over pixels (3, h, w)."""
    mean, contrast = below.mean(), rng.uniform(*CONTRAST)
    brighter = rng.random() < 0.5 if CONTRAST[1] < mean < 255 - CONTRAST[1] else mean < 128
    tint = rng.uniform(-40, 40, 3)
    colour = mean + (contrast if brighter else -contrast) + tint - tint.mean()
    painted = below + opacity * (colour[:, None, None].clip(0, 255) - below)
    return painted.round().astype(np.uint8)


register_dataset(
    Dataset("mosaics", lambda root: texture_mosaics(), Policy(flip=True), "segmentation", image_pixels=64)
)
# No flip: a mirrored digit is not a digit.
register_dataset(
    Dataset(
        "digit_scenes", lambda root: digit_scenes(), task="detection", instances=True, image_pixels=64
    )
)  # fmt: skip
