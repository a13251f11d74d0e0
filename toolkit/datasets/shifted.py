"""Data sets under a distribution shift: the clean set's images, labels and splits, corrupted.

Digits and textures are corrupted here (`corruptions`); CIFAR-10-C (Hendrycks & Dietterich 2019,
arXiv 1903.12261) is its authors' archive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit.datasets import embedded, public  # noqa: F401  (they register the clean sets)
from toolkit.datasets.catalog import DATASETS, load_dataset, register_dataset
from toolkit.datasets.corruptions import CORRUPTIONS, MIXED, SEVERITIES, corrupt
from toolkit.datasets.splits import Splits, in_memory, three_way
from toolkit.errors import InputError, check_name

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


def _parsed(family: str, member: str, corruptions: Iterable[str]) -> tuple[str, int]:
    """The corruption and the severity in `member`; raises `InputError` for unknown ones."""
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
    """Grey images (N, 8, 8) at 32 px: of 8 px there is nothing to blur, to pixelate or for JPEG's blocks.

    Bilinear, as the demo backbones enlarge the clean ones: what differs from those is the corruption.
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
    images = _array(folder / f"{corruption}.npy", (5 * CIFAR10_C_IMAGES, 32, 32, 3))
    labels = _array(folder / "labels.npy", (5 * CIFAR10_C_IMAGES,))
    of_severity = slice((severity - 1) * CIFAR10_C_IMAGES, severity * CIFAR10_C_IMAGES)
    images, labels = images[of_severity].transpose(0, 3, 1, 2), labels[of_severity]
    if set(np.unique(labels)) != set(range(len(CIFAR10))):
        raise InputError(
            f"{folder / 'labels.npy'} does not hold the labels 0 to 9; unpack the archive again."
        )
    rows = three_way(labels, val=0.1, test=0.5)
    parts = {split: (images[r], labels[r]) for split, r in rows.items()}
    return in_memory(f"cifar10-c:{member}", parts, list(CIFAR10))


def _array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
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
