"""A loaded data set: three splits of raw images with their targets, and the hash of each split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

from toolkit.errors import InputError, printable

Target = int | torch.Tensor | dict[str, torch.Tensor]  # see `Splits`


@dataclass(frozen=True)
class Policy:
    """How a data set's images become a backbone's input; size and normalisation come from the backbone.

    `crop_scale`: training crops cover this share of the image, and evaluation uses the centre.  None: the
    whole image, resized to the input's size, in both; masks and boxes allow nothing else.
    `flip`: mirror half of the training images, and their masks and boxes.
    """

    crop_scale: tuple[float, float] | None = None
    flip: bool = False


SPLITS = ("train", "val", "test")
WHOLE = Policy()
LEAST_IMAGES = 3  # of a class, so that it can be in every split


@dataclass
class Splits:
    """A data set.  Each split yields `(image, target)`: uint8 (3, H, W), and a target that depends on `task`.

    classification: an int.  segmentation: a mask of classes and `tasks.IGNORED`, uint8 (H, W).  detection:
    `{"boxes": float32 (M, 5)}`, x1, y1, x2, y2 in pixels of the image, right and lower edge exclusive, and
    the class; also `"instances"`, if known: uint8 (H, W), 1 + the row of the pixel's box, or 0.

    `hashes` holds a sha256 of each split's content; `broken` lists unreadable images with the reason;
    `left_out` counts the targets left out, by kind; `notes` says what else was decided.  `load_dataset`
    fills in name, policy and task.
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
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in SPLITS)
        left_out = {"broken images": len(self.broken)} if self.broken else {}
        left_out |= self.left_out
        notes = [f"{count:,} {kind} left out" for kind, count in left_out.items()] + self.notes
        return printable("; ".join([f"{self.name}: {len(self.classes)} classes, {sizes}", *notes]))

    def counts(self) -> pd.DataFrame:
        """The number of images of each class in each split, of a classification data set."""
        if self.task != "classification":
            raise InputError(
                f"{self.name}: an image has many classes; images are counted per class otherwise."
            )
        columns = {
            split: np.bincount(labels_of(getattr(self, split)), minlength=len(self.classes))
            for split in SPLITS
        }
        return pd.DataFrame(columns, index=pd.Index(self.classes, name="class"))

    def summary(self) -> str:
        """All there is to know before training: the counts, the notes, and each image left out."""
        table = [self.counts().to_string()] if self.task == "classification" else []
        return printable("\n".join([str(self), *table, *(f"left out: {line}" for line in self.broken)]))


def labels_of(split: Dataset) -> np.ndarray:
    """The classes of all images of a split, without decoding them where they are known."""
    labels = split.labels if hasattr(split, "labels") else [label for _, label in split]
    return np.asarray(labels, np.int64)


class InMemory(Dataset):
    """Images in one uint8 array (N, 3, H, W), or (N, H, W) for grey ones, with labels or dense targets."""

    def __init__(self, images: np.ndarray, labels: Sequence[Target]):
        self.images = np.ascontiguousarray(images)
        dense = isinstance(labels[0], (torch.Tensor, dict))
        self.labels = labels if dense else np.ascontiguousarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        image, label = torch.from_numpy(self.images[index]), self.labels[index]
        if image.ndim == 2:
            image = image.expand(3, -1, -1)
        return image, int(label) if isinstance(label, np.integer) else label

    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(self.images)
        for label in self.labels:
            hash_target(digest, label)
        return digest.hexdigest()


def in_memory(
    name: str,
    parts: dict[str, tuple[np.ndarray, Sequence[Target]]],
    classes: list[str],
    policy: Policy = WHOLE,
) -> Splits:
    """Make splits from arrays: `parts` maps train, val and test to images and labels, see `InMemory`."""
    splits = {split: InMemory(*arrays) for split, arrays in parts.items()}
    hashes = {split: data.sha256() for split, data in splits.items()}
    return Splits(name=name, **splits, classes=classes, hashes=hashes, policy=policy)


def hash_target(digest: hashlib._Hash, target: np.int64 | torch.Tensor | dict[str, torch.Tensor]) -> None:
    """Add the target of one image to a running hash."""
    if isinstance(target, np.int64):
        digest.update(target)
        return
    named = target if isinstance(target, dict) else {"mask": target}
    for name, values in named.items():
        digest.update(repr((name, tuple(values.shape))).encode())
        digest.update(values.contiguous().numpy())


def two_way(labels: Sequence[int], test: float) -> tuple[np.ndarray, np.ndarray]:
    """Split rows by a fixed, stratified shuffle, sorted: the rest, and the share `test` of the whole.

    Raises `ValueError` if a class is too small to be split.
    """
    rest, held_out = _hold_out(np.arange(len(labels)), labels, test)
    return np.sort(rest), np.sort(held_out)


def three_way(labels: Sequence[int], val: float, test: float) -> dict[str, np.ndarray]:
    """Split rows by fixed, stratified shuffles, sorted; `val` and `test` are shares of the whole.

    Raises `ValueError` if a class is too small to be split.
    """
    rest, test_rows = _hold_out(np.arange(len(labels)), labels, test)
    train_rows, val_rows = _hold_out(rest, labels, val / (1 - test))
    return {"train": np.sort(train_rows), "val": np.sort(val_rows), "test": np.sort(test_rows)}


def deal(labels: Sequence[int], val: float, test: float) -> dict[str, np.ndarray]:
    """Split rows as `three_way` does, so that classes of at least `LEAST_IMAGES` are in every split.

    Smaller classes stay in training.  Where classes are too small for the shares, each is dealt alone.
    """
    labels = np.asarray(labels)
    large = np.bincount(labels)[labels] >= LEAST_IMAGES
    rows, few = np.flatnonzero(large), np.flatnonzero(~large)
    try:
        dealt = three_way(labels[rows], val, test)
    except ValueError:
        dealt = None
    classes = np.unique(labels[rows])
    if dealt is None or any(len(np.unique(labels[rows[part]])) < len(classes) for part in dealt.values()):
        dealt = _dealt_by_class(labels[rows], val, test)
    parts = {split: rows[part] for split, part in dealt.items()}
    return parts | {"train": np.sort(np.concatenate([parts["train"], few]))}


def _dealt_by_class(labels: np.ndarray, val: float, test: float) -> dict[str, np.ndarray]:
    rng, parts = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        counts = [max(1, round(share * len(rows))) for share in (val, test)]
        for split, part in zip(("val", "test", "train"), np.split(rows, np.cumsum(counts))):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(found)) for split, found in parts.items()}


def _hold_out(rows: np.ndarray, labels: Sequence[int], share: float) -> list[np.ndarray]:
    return train_test_split(rows, test_size=share, stratify=np.asarray(labels)[rows], random_state=0)
