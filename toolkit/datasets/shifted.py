"""Data sets under a distribution shift: the clean set's images, labels and splits, corrupted.

Digits and textures are corrupted here (`corruptions`); CIFAR-10-C (Hendrycks & Dietterich 2019,
arXiv 1903.12261) is its authors' archive.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from toolkit.datasets.corruptions import CORRUPTIONS, MIXED, SEVERITIES, corrupt
from toolkit.datasets.embedded import digits, textures
from toolkit.datasets.splits import POLICIES, Splits, in_memory, three_way
from toolkit.errors import InputError, check_name

SHIFTED = ("digits-c", "textures-c", "cifar10-c")
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


def clean_name(dataset: str) -> str:
    """The data set that a shifted one is made of: `digits` of `digits-c:mixed:3`; another's own name."""
    base = dataset.partition(":")[0]
    return base.removesuffix("-c") if base in SHIFTED else dataset


def load_shifted(name: str, root: Path) -> Splits:
    """`digits-c`, `textures-c` or `cifar10-c`, a corruption and a severity, with colons between.

    Digits and textures take `corruptions`: the three splits are the clean set's, image by image.
    cifar10-c takes the archive's corruptions; its 10,000 images, CIFAR-10's test set, are dealt to the
    splits alike for all of them: 4,000 to train on, 1,000 for validation and 5,000 to test.

    Raises `InputError` for a name of another form, an unknown corruption or severity, and files that are
    missing or not what they should be.
    """
    base, *rest = name.split(":")
    if len(rest) != 2:
        raise InputError(f"dataset {name!r} is not of the form {base}:{FORM}, such as '{base}:contrast:3'.")
    corruption, severity = rest
    check_name("corruption", corruption, CIFAR10_C if base == "cifar10-c" else [*CORRUPTIONS, MIXED])
    check_name("severity", severity, SEVERITIES)
    if base == "cifar10-c":
        return _cifar10_c(name, root / "CIFAR-10-C", corruption, int(severity))
    clean = digits() if base == "digits-c" else textures()
    parts = {}
    for split in ("train", "val", "test"):
        data = getattr(clean, split)
        images = enlarged(data.images) if base == "digits-c" else data.images
        parts[split] = (corrupt(images, corruption, int(severity), split), data.labels)
    return in_memory(name, parts, clean.classes, clean.policy)


def enlarged(images: np.ndarray) -> np.ndarray:
    """Grey images (N, 8, 8) at 32 px: of 8 px there is nothing to blur, to pixelate or for JPEG's blocks.

    Bilinear, as the demo backbones enlarge the clean ones: what differs from those is the corruption.
    """
    side = (ENLARGED_PIXELS, ENLARGED_PIXELS)
    pictures = (Image.fromarray(image).resize(side, Image.Resampling.BILINEAR) for image in images)
    return np.stack([np.asarray(picture) for picture in pictures])


def _cifar10_c(name: str, folder: Path, corruption: str, severity: int) -> Splits:
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
    return in_memory(name, parts, list(CIFAR10), POLICIES["cifar10"])


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
