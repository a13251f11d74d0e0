"""Published data sets that torchvision downloads and reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torchvision

from toolkit.datasets.catalog import Dataset, Prompt, register_dataset
from toolkit.datasets.embedded import TEXTURE_PROMPT
from toolkit.datasets.image_files import from_files
from toolkit.datasets.splits import Policy, Splits, in_memory, two_way
from toolkit.errors import InputError


def fetched(dataset: str, archive: str, url: str, folder: Path, build: Callable[[bool], object]) -> object:
    """`build(download=False)`, else `build(download=True)`, else one error that says what to put where."""
    try:
        return build(False)
    except (RuntimeError, OSError):  # torchvision: "Dataset not found or corrupted"; half unpacked
        pass
    try:
        return build(True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise InputError(
            f"dataset {dataset!r} is not in {folder} and could not be downloaded ({error}). "
            f"Put {archive} from {url} into {folder}; it is unpacked there."
        ) from error


def cifar(name: str, root: Path) -> Splits:
    """`cifar10` or `cifar100`: 45,000 train and 5,000 val out of the training set, the 10,000 test images."""
    kind, archive = {
        "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-python.tar.gz"),
        "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python.tar.gz"),
    }[name]

    def read(train: bool):
        return fetched(
            name, archive, "https://www.cs.toronto.edu/~kriz/", root,
            lambda download: kind(root, train=train, download=download),
        )  # fmt: skip

    root.mkdir(parents=True, exist_ok=True)
    train, test = read(True), read(False)
    images, labels = train.data.transpose(0, 3, 1, 2), np.array(train.targets)
    parts = {
        split: (images[rows], labels[rows]) for split, rows in zip(("train", "val"), two_way(labels, 0.1))
    }
    parts["test"] = (test.data.transpose(0, 3, 1, 2), np.array(test.targets))
    return in_memory(name, parts, train.classes)


def describable_textures(root: Path) -> Splits:
    """Describable Textures (Cimpoi et al. 2014), partition 1: its own train, val and test, 1,880 each."""
    root.mkdir(parents=True, exist_ok=True)
    listed = {
        split: fetched(
            "dtd", "dtd-r1.0.1.tar.gz", "https://www.robots.ox.ac.uk/~vgg/data/dtd/", root / "dtd",
            lambda download, split=split: torchvision.datasets.DTD(
                root, split=split, partition=1, download=download
            ),
        )
        for split in ("train", "val", "test")
    }  # fmt: skip
    files = {split: list(zip(data._image_files, data._labels)) for split, data in listed.items()}
    return from_files("dtd", root / "dtd", files, listed["train"].classes)


def _photos() -> Prompt:
    """The 18 prompts that CLIP's authors publish for CIFAR (openai/CLIP, data/prompts.md)."""
    qualities = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
    templates = []
    for article in ("a", "the"):
        templates += [f"a {quality}photo of {article} {{}}." for quality in qualities]
        templates += [f"a photo of {article} {size} {{}}." for size in ("small", "big")]
    return Prompt(tuple(templates))


for _name, _classes in (("cifar10", 10), ("cifar100", 100)):
    register_dataset(
        Dataset(
            _name, functools.partial(cifar, _name), Policy(crop_scale=(0.8, 1.0), flip=True),
            classes=_classes, train_images=45_000, prompt=_photos(),
        )
    )  # fmt: skip
register_dataset(
    Dataset(
        "dtd", describable_textures, Policy(crop_scale=(0.35, 1.0), flip=True),
        classes=47, train_images=1_880, prompt=TEXTURE_PROMPT,
    )
)  # fmt: skip
