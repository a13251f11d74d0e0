"""What a data set is here: three splits of raw images, their hashes, and how they are cropped and flipped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Policy:
    """How a data set's images become a backbone's input; size and normalisation come from the backbone.

    `crop_scale`: training crops cover this share of the image (None: the whole image, squeezed).
    `flip`: mirror half of the training images.  Evaluation resizes and takes the centre.
    """

    crop_scale: tuple[float, float] | None = None
    flip: bool = False


# Shifted sets have their clean set's.
POLICIES = {
    "digits": Policy(),  # a mirrored 2 is no digit
    "textures": Policy(flip=True),
    "cifar10": Policy(crop_scale=(0.8, 1.0), flip=True),
    "cifar100": Policy(crop_scale=(0.8, 1.0), flip=True),
    "dtd": Policy(crop_scale=(0.35, 1.0), flip=True),
    "vww": Policy(crop_scale=(0.5, 1.0), flip=True),  # a smaller crop may lose the person
    "folder": Policy(crop_scale=(0.35, 1.0), flip=True),
}


@dataclass
class Splits:
    """A data set.  Each split yields `(image, label)`: uint8 (3, H, W) and int.

    `hashes` holds a sha256 of each split's content; `broken` lists the images that were left out and why.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    hashes: dict[str, str]
    policy: Policy
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in ("train", "val", "test"))
        broken = f"; {len(self.broken)} broken images left out" if self.broken else ""
        return f"{self.name}: {len(self.classes)} classes, {sizes}{broken}"


class InMemory(Dataset):
    """Images as one uint8 array (N, 3, H, W), or (N, H, W) for grey ones."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[index])
        return (image.expand(3, -1, -1) if image.ndim == 2 else image), int(self.labels[index])

    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(self.images)
        digest.update(self.labels)
        return digest.hexdigest()


def in_memory(
    name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], classes: list[str], policy: Policy
) -> Splits:
    """Splits from arrays: `parts` maps train, val and test to images and labels.

    Images are uint8, all of one size: (N, 3, H, W), or (N, H, W) for grey ones; labels int (N,).
    """
    splits = {split: InMemory(*arrays) for split, arrays in parts.items()}
    hashes = {split: data.sha256() for split, data in splits.items()}
    return Splits(name=name, **splits, classes=classes, hashes=hashes, policy=policy)


def two_way(labels: Sequence[int], test: float) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows of a fixed, stratified shuffle: the rest, and `test`, a share of the whole.

    Raises `ValueError` where a class is too small to be split.
    """
    rest, held_out = _hold_out(np.arange(len(labels)), labels, test)
    return np.sort(rest), np.sort(held_out)


def three_way(labels: Sequence[int], val: float, test: float) -> dict[str, np.ndarray]:
    """Sorted rows of each split, of fixed, stratified shuffles; `val` and `test` are shares of the whole.

    Raises `ValueError` where a class is too small to be split.
    """
    rest, test_rows = _hold_out(np.arange(len(labels)), labels, test)
    train_rows, val_rows = _hold_out(rest, labels, val / (1 - test))
    return {"train": np.sort(train_rows), "val": np.sort(val_rows), "test": np.sort(test_rows)}


def _hold_out(rows: np.ndarray, labels: Sequence[int], share: float) -> list[np.ndarray]:
    return train_test_split(rows, test_size=share, stratify=np.asarray(labels)[rows], random_state=0)
