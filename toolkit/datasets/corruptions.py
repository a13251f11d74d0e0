"""Data sets under a distribution shift: the clean set's images, labels and splits, corrupted.

`digits-c` and `textures-c` are corrupted here, in five severities.  The names of the corruptions are those of
Hendrycks & Dietterich 2019 (arXiv 1903.12261).  Their strengths are made for 224 px photographs; ours are for
32 to 48 px, set so that a model trained on clean images gets worse with the severity and, under all six
together, is in trouble but well above chance at the fifth.  A strength that is a length is a share of the
image's side.  `cifar10-c` is the paper's archive.

An image's noise is drawn from (corruption, severity, split, index) alone: it comes out the same in any order
and any process.  Arithmetic is float64 or Pillow's integers and rounded once, so that hashes of the data
agree between machines as far as the libraries do.  (torchvision's noise, blur, contrast and brightness are
defined differently.)
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from toolkit.datasets import embedded, public  # noqa: F401  (they register the clean sets)
from toolkit.datasets.catalog import DATASETS, load_dataset, register_dataset
from toolkit.datasets.splits import Splits, in_memory, three_way
from toolkit.errors import InputError, check_name

MIXED = "mixed"  # each image gets one of the corruptions, in equal parts
SEVERITIES = ("1", "2", "3", "4", "5")
FORM = "CORRUPTION:SEVERITY"
ENLARGED_PIXELS = 32  # the side of corrupted digits

CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
CIFAR10_C = (  # the archive's files
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur",
    "gaussian_noise", "glass_blur", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate",
    "saturate", "shot_noise", "snow", "spatter", "speckle_noise", "zoom_blur",
)  # fmt: skip
CIFAR10_C_IMAGES = 10_000  # CIFAR-10's test images, once per severity


def corrupt(images: np.ndarray, corruption: str, severity: int, split: str) -> np.ndarray:
    """Corrupt `images`, uint8 (N, H, W) or (N, 3, H, W).

    `corruption`: one of `CORRUPTIONS`, or `mixed`: a fixed shuffle deals the six to the images, regardless of
    their classes, and an image keeps its own through all severities.  `severity`: 1 to 5.  `split` names the
    set, so that images of the same index in two sets do not share their noise.
    """
    names = [corruption] * len(images)
    if corruption == MIXED:
        dealt = np.random.default_rng(list(split.encode())).permutation(len(images)) % len(CORRUPTIONS)
        names = np.array(list(CORRUPTIONS))[dealt].tolist()
    corrupted = np.empty_like(images)
    for index, (image, name) in enumerate(zip(images, names)):
        function, strengths = CORRUPTIONS[name]
        rng = np.random.default_rng([index, *f"{name}:{severity}:{split}".encode()])
        changed = function(image, strengths[severity - 1], rng)
        corrupted[index] = np.clip(np.rint(changed), 0, 255)
    return corrupted


# Each maps an image (H, W) or (3, H, W) of 0..255, a strength and a generator to values around 0..255.


def _gaussian_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the standard deviation as a share of 255; each channel has its own noise."""
    return image + 255 * strength * rng.standard_normal(image.shape)


def _gaussian_blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the standard deviation as a share of the side."""
    sigma = strength * image.shape[-1]
    return gaussian_filter(image.astype(np.float64), sigma, mode="nearest", axes=(-2, -1))


def _contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the remaining share of the distance from the mean."""
    mean = image.mean(axis=(-2, -1), keepdims=True)
    return mean + strength * (image - mean)


def _brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: added to every channel, as a share of 255 (in the paper: to HSV's value)."""
    return image + 255 * strength


def _pixelate(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """`strength`: the remaining share of the side, in pixels."""
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


# --- the data sets --------------------------------------------------------------------------------


def _parsed(family: str, member: str, corruptions: Iterable[str]) -> tuple[str, int]:
    """Split `member` into corruption and severity; raise `InputError` for unknown ones."""
    corruption, colon, severity = member.partition(":")
    if not colon:
        raise InputError(
            f"dataset '{family}:{member}' is not of the form {family}:{FORM}, such as '{family}:contrast:3'."
        )
    check_name("corruption", corruption, corruptions)
    return corruption, int(check_name("severity", severity, SEVERITIES))


def _corrupted(clean: str, root: Path, member: str) -> Splits:
    """The clean data set with its three splits corrupted image by image."""
    corruption, severity = _parsed(f"{clean}-c", member, [*CORRUPTIONS, MIXED])
    splits, parts = load_dataset(clean, root), {}
    for split in ("train", "val", "test"):
        data = getattr(splits, split)
        images = enlarged(data.images) if clean == "digits" else data.images
        parts[split] = (corrupt(images, corruption, severity, split), data.labels)
    return in_memory(f"{clean}-c:{member}", parts, splits.classes)


def enlarged(images: np.ndarray) -> np.ndarray:
    """Enlarge grey images (N, 8, 8) to 32 px: 8 px leave nothing to blur, pixelate or compress.

    Bilinear, as the demo backbones enlarge the clean ones: they differ from those by the corruption only.
    """
    side = (ENLARGED_PIXELS, ENLARGED_PIXELS)
    pictures = (Image.fromarray(image).resize(side, Image.Resampling.BILINEAR) for image in images)
    return np.stack([np.asarray(picture) for picture in pictures])


def _cifar10_c(root: Path, member: str) -> Splits:
    """The archive's 10,000 images of a severity, CIFAR-10's test set: 4,000 train, 1,000 val, 5,000 test.

    An image is in the same split under every corruption.  Raises `InputError` for missing or damaged files.
    """
    corruption, severity = _parsed("cifar10-c", member, CIFAR10_C)
    folder = root / "CIFAR-10-C"
    images = _archived(folder / f"{corruption}.npy", (5 * CIFAR10_C_IMAGES, 32, 32, 3))
    labels = _archived(folder / "labels.npy", (5 * CIFAR10_C_IMAGES,))
    of_severity = slice((severity - 1) * CIFAR10_C_IMAGES, severity * CIFAR10_C_IMAGES)
    images, labels = images[of_severity].transpose(0, 3, 1, 2), labels[of_severity]
    if set(np.unique(labels)) != set(range(len(CIFAR10))):
        raise InputError(
            f"{folder / 'labels.npy'} does not hold the labels 0 to 9; unpack the archive again."
        )
    rows = three_way(labels, val=0.1, test=0.5)
    parts = {split: (images[r], labels[r]) for split, r in rows.items()}
    return in_memory(f"cifar10-c:{member}", parts, list(CIFAR10))


def _archived(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A file of the archive, not read before it is indexed."""
    remedy = f"Unpack CIFAR-10-C.tar from https://zenodo.org/records/2535967 into {path.parent.parent}."
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"dataset cifar10-c: there is no {path}. {remedy}") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"dataset cifar10-c: {path} cannot be read ({error}). {remedy}") from error
    if array.shape != shape or array.dtype.kind not in "ui" or (len(shape) > 1 and array.dtype != np.uint8):
        raise InputError(
            f"dataset cifar10-c: {path} holds {array.dtype} {array.shape}, not {shape} of bytes. {remedy}"
        )
    return array


def _register_shifted(clean: str, load: Callable[[Path, str], Splits], **known: int) -> None:
    """Register `CLEAN-c` with the policy, task and prompt of the clean data set."""
    register_dataset(replace(DATASETS[clean], name=f"{clean}-c", load=load, members=FORM, **known))


for _clean in ("digits", "textures"):
    _register_shifted(_clean, functools.partial(_corrupted, _clean))
_register_shifted("cifar10", _cifar10_c, train_images=4_000)
