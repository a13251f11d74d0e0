"""Segmentation that comes inside installed packages: mosaics of photographs' textures, with exact masks."""

from __future__ import annotations

import functools

import numpy as np
import skimage.data
import torch
from PIL import Image

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.embedded import TEXTURE_TILE, assign_tiles
from toolkit.datasets.splits import InMemoryDense, Policy, Splits

# Photographs of scikit-image whose grey tiles of 64 px look alike among themselves and unlike the others.
MATERIALS = ("brick", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon")
MOSAICS = {"train": 240, "val": 60, "test": 120}  # images
REGIONS = (2, 5)  # fewest and most in an image
LEAST_SHARE = 0.06  # of the image's area that a region covers


def texture_mosaics() -> Splits:
    """64 px images of two to five regions, each filled from another photograph: which is a pixel from?

    The regions are the pixels nearest to random points under a random metric, so that their borders are
    straight or stepped.  Each is filled from one tile of its photograph, turned, mirrored, and made
    brighter or darker.  Tiles belong to one split: no pixel of a test image was ever trained on.
    """
    data = {}
    for number, (split, count) in enumerate(MOSAICS.items()):
        tiles = [tiles_of(name)[split] for name in MATERIALS]
        pairs = [_mosaic(np.random.default_rng((number, row)), tiles) for row in range(count)]
        images, masks = (np.stack(arrays) for arrays in zip(*pairs))
        images = images[:, None].repeat(3, axis=1)
        data[split] = InMemoryDense(images, list(torch.from_numpy(masks)))
    hashes = {split: split_data.sha256() for split, split_data in data.items()}
    return Splits(
        name="mosaics", **data, classes=list(MATERIALS), hashes=hashes
    )  # fmt: skip


@functools.cache
def tiles_of(name: str) -> dict[str, np.ndarray]:
    """Grey tiles uint8 (n, 64, 64) of scikit-image's photograph `name` by split; no two share a pixel."""
    grey = np.asarray(Image.fromarray(getattr(skimage.data, name)()).convert("L"))
    side = TEXTURE_TILE
    return {
        split: np.stack([grey[y : y + side, x : x + side] for y, x in corners])
        for split, corners in assign_tiles(np.random.default_rng(0), grey.shape).items()
    }


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


def varied(rng: np.random.Generator, tile: np.ndarray) -> np.ndarray:
    """`tile` turned by a multiple of 90 degrees, perhaps mirrored, with another contrast and brightness."""
    turned = np.rot90(tile, rng.integers(4))
    if rng.random() < 0.5:
        turned = turned[:, ::-1]
    shifted = rng.uniform(0.75, 1.25) * (turned - turned.mean()) + turned.mean() + rng.uniform(-25, 25)
    return shifted.round().clip(0, 255).astype(np.uint8)


register_dataset(
    Dataset("mosaics", lambda root: texture_mosaics(), Policy(flip=True), "segmentation", image_pixels=64)
)
