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

    `crop_scale`: training crops cover this share of the image, and evaluation takes the centre (None: the
    whole image, squeezed to the input's size, in both; dense targets have nothing else).
    `flip`: mirror half of the training images, and their masks and boxes.
    """

    crop_scale: tuple[float, float] | None = None
    flip: bool = False


WHOLE = Policy()


@dataclass
class Splits:
    """A data set.  Each split yields `(image, target)`: uint8 (3, H, W), and what `task` asks for.

    classification: an int.  segmentation: a mask, uint8 (H, W), of classes and `tasks.IGNORED`.  detection:
    `{"boxes": float32 (M, 5)}`, x1, y1, x2, y2 in pixels of the image, right and lower edge exclusive, and
    the class; also `"instances"`: uint8 (H, W), 1 + the row of a pixel's box or 0, where they are known.

    `hashes` holds a sha256 of each split's content; `broken` lists the images that were left out and why;
    `left_out` counts what was left out of the targets, by what it is.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    hashes: dict[str, str]
    policy: Policy = WHOLE
    broken: list[str] = field(default_factory=list)
    task: str = "classification"  # | "segmentation" | "detection"
    left_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in ("train", "val", "test"))
        left_out = {"broken images": len(self.broken)} if self.broken else {}
        left_out |= self.left_out
        told = "".join(f"; {count:,} {what} left out" for what, count in left_out.items())
        return f"{self.name}: {len(self.classes)} classes, {sizes}{told}"


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
    name: str,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: list[str],
    policy: Policy = WHOLE,
) -> Splits:
    """Splits from arrays: `parts` maps train, val and test to images and labels.

    Images are uint8, all of one size: (N, 3, H, W), or (N, H, W) for grey ones; labels int (N,).
    """
    splits = {split: InMemory(*arrays) for split, arrays in parts.items()}
    hashes = {split: data.sha256() for split, data in splits.items()}
    return Splits(name=name, **splits, classes=classes, hashes=hashes, policy=policy)


class InMemoryDense(Dataset):
    """Images (N, 3, H, W) as one uint8 array, each with its dense target in the form that `Splits` says."""

    def __init__(self, images: np.ndarray, targets: Sequence[torch.Tensor | dict[str, torch.Tensor]]):
        self.images, self.targets = np.ascontiguousarray(images), targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor]]:
        return torch.from_numpy(self.images[index]), self.targets[index]

    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(self.images)
        for target in self.targets:
            hash_target(digest, target)
        return digest.hexdigest()


def hash_target(digest: hashlib._Hash, target: torch.Tensor | dict[str, torch.Tensor]) -> None:
    """Add a dense target to a running hash."""
    named = target if isinstance(target, dict) else {"mask": target}
    for name, values in named.items():
        digest.update(repr((name, tuple(values.shape))).encode())
        digest.update(values.contiguous().numpy())


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
