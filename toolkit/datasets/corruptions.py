"""Corruptions of small images in five severities: what the field does to a model trained on clean ones.

The names are those of Hendrycks & Dietterich 2019 (arXiv 1903.12261).  Their strengths are made for
224 px photographs; ours are for 32 to 48 px, set so that a model trained on clean images gets worse with
the severity and, under all six together, is in trouble but well above chance at the fifth.  Where a
strength is a length it is a share of the image's side.

An image's noise is drawn from (corruption, severity, split, index) alone: whatever the order and the
process, it comes out the same.  Arithmetic is float64 or Pillow's integers and rounded once, so that
hashes of the data agree between machines as far as the libraries do.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from toolkit.errors import InputError, check_name

MIXED = "mixed"  # each image one of the corruptions, in equal parts
SEVERITIES = ("1", "2", "3", "4", "5")


def corrupt(images: np.ndarray, corruption: str, severity: int, split: str) -> np.ndarray:
    """`images`, corrupted: uint8 (N, H, W) or (N, 3, H, W), the same shape again.

    `corruption`: one of `CORRUPTIONS`, or `mixed`: a fixed shuffle deals the six to the images, whatever
    their classes, and an image keeps its own through all severities.  `severity`: 1 to 5.  `split` names
    the set, so that images of the same index in two sets do not share their noise.

    Raises `InputError` for a name or severity that there is not, and for arrays of another form.
    """
    check_name("corruption", corruption, [*CORRUPTIONS, MIXED])
    check_name("severity", str(severity), SEVERITIES)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[1:-2] not in ((), (3,)):
        raise InputError(
            f"images to corrupt must be uint8 (N, H, W) or (N, 3, H, W), got {images.dtype} {images.shape}."
        )
    names = [corruption] * len(images)
    if corruption == MIXED:
        dealt = np.random.default_rng(list(split.encode())).permutation(len(images)) % len(CORRUPTIONS)
        names = np.array(list(CORRUPTIONS))[dealt].tolist()
    corrupted = np.empty_like(images)
    for index, (image, name) in enumerate(zip(images, names)):
        function, strengths = CORRUPTIONS[name]
        rng = np.random.default_rng([index, *f"{name}:{severity}:{split}".encode()])
        changed = function(image, strengths[int(severity) - 1], rng)
        corrupted[index] = np.clip(np.rint(changed), 0, 255)
    return corrupted


# Each takes an image (H, W) or (3, H, W) of 0..255, a strength and a generator, and returns 0..255.


def _gaussian_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the standard deviation as a share of 255; each channel has its own noise."""
    return image + 255 * strength * rng.standard_normal(image.shape)


def _gaussian_blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the standard deviation as a share of the side."""
    sigma = strength * image.shape[-1]
    return gaussian_filter(image.astype(np.float64), sigma, mode="nearest", axes=(-2, -1))


def _contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the share of the distance from the mean that is left."""
    mean = image.mean(axis=(-2, -1), keepdims=True)
    return mean + strength * (image - mean)


def _brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: what is added, as a share of 255, to every channel (of HSV's value in the paper)."""
    return image + 255 * strength


def _pixelate(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the share of the side that is left, in pixels."""
    picture = _picture(image)
    side = tuple(max(1, round(strength * length)) for length in picture.size)
    small = picture.resize(side, Image.Resampling.BOX)
    return _array(small.resize(picture.size, Image.Resampling.NEAREST))


def _jpeg_compression(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the quality, 1 to 95."""
    with io.BytesIO() as file:
        _picture(image).save(file, "JPEG", quality=strength)
        with Image.open(file, formats=["JPEG"]) as picture:
            return _array(picture)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image if image.ndim == 2 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def _array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, float, np.random.Generator], np.ndarray], tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.05, 0.10, 0.15, 0.20, 0.26)),
    "gaussian_blur": (_gaussian_blur, (0.02, 0.04, 0.06, 0.08, 0.10)),
    "contrast": (_contrast, (0.85, 0.7, 0.55, 0.4, 0.25)),
    "brightness": (_brightness, (0.05, 0.1, 0.2, 0.3, 0.4)),
    "pixelate": (_pixelate, (0.65, 0.5, 0.28, 0.22, 0.16)),
    "jpeg_compression": (_jpeg_compression, (12, 8, 5, 3, 1)),
}
