"""Classification data sets that torchvision downloads: CIFAR, Fashion-MNIST and Describable Textures."""

from __future__ import annotations

import functools
import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

from toolkit.datasets.catalog import Dataset, Prompt, register_dataset
from toolkit.datasets.embedded import TEXTURE_PROMPT
from toolkit.datasets.image_files import Sample, from_files
from toolkit.datasets.splits import Policy, Splits, in_memory, two_way
from toolkit.errors import InputError
from toolkit.files import answers

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
# Of the unpacked files: Debian packs them again.
FASHION_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fetched(
    dataset: str, kind: Callable[..., Any], root: Path, archive: str, url: str, **options: object
) -> Any:
    """Build one of torchvision's data sets below `root`, downloaded if it is not there.

    Raises `InputError` with the file to get by hand if the download fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        return kind(root, **options, download=False)
    except (RuntimeError, OSError):  # torchvision: "Dataset not found or corrupted"; half unpacked
        pass
    try:
        if not answers(url):
            raise OSError("its server cannot be reached")
        return kind(root, **options, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise InputError(
            f"dataset {dataset!r} is not in {root} and could not be downloaded ({error}). "
            f"Put {archive} from {url} into {root}; it is unpacked there."
        ) from error


def official_cifar(name: str, root: Path) -> list[Any]:
    """The training and the test set of `cifar10` or `cifar100` in torchvision's form."""
    kind = getattr(torchvision.datasets, name.upper())
    archive = f"cifar-{name.removeprefix('cifar')}-python.tar.gz"
    url = "https://www.cs.toronto.edu/~kriz/"
    return [fetched(name, kind, root, archive, url, train=train) for train in (True, False)]


def official_lists(
    dataset: str, kind: Callable[..., Any], root: Path, archive: str, url: str, **options: object
) -> tuple[list[str], dict[str, list[Sample]]]:
    """Classes, and the files and labels of train, val and test, of a data set that torchvision lists."""
    samples = {}
    for split in ("train", "val", "test"):
        data = fetched(dataset, kind, root, archive, url, split=split, **options)
        samples[split] = list(zip(data._image_files, data._labels))
    return list(data.classes), samples


def official_dtd(root: Path) -> tuple[list[str], dict[str, list[Sample]]]:
    """Describable Textures (Cimpoi et al. 2014), partition 1: its own train, val and test, 1,880 each."""
    return official_lists(
        "dtd", torchvision.datasets.DTD, root, "dtd/dtd-r1.0.1.tar.gz",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/", partition=1,
    )  # fmt: skip


def cifar(name: str, root: Path) -> Splits:
    """`cifar10` or `cifar100`: 45,000 train and 5,000 val from the training set, the 10,000 test images."""
    train, test = official_cifar(name, root)
    images, labels = train.data.transpose(0, 3, 1, 2), np.array(train.targets)
    train_rows, val_rows = two_way(labels, 0.1)
    parts = {
        "train": (images[train_rows], labels[train_rows]),
        "val": (images[val_rows], labels[val_rows]),
        "test": (test.data.transpose(0, 3, 1, 2), test.targets),
    }
    return in_memory(name, parts, train.classes)


def fashion_mnist(root: Path, small: bool = False) -> Splits:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747; MIT): grey images of 28 x 28 pixels.

    54,000 train and 6,000 val from the training set, the 10,000 test images; if `small` 1,000 of each, by
    fixed stratified shuffles.  Read from Debian's package if it is installed, otherwise from torchvision's
    download.  Raises `InputError` for other content than was published.
    """
    folder, ending = DEBIAN, ".gz"
    if not folder.is_dir():
        kind, url = torchvision.datasets.FashionMNIST, "https://github.com/zalandoresearch/fashion-mnist"
        fetched("fashion_mnist", kind, root, "FashionMNIST/raw/*-ubyte", url)
        folder, ending = root / "FashionMNIST" / "raw", ""
    found = []
    for name, sha256 in FASHION_SHA256.items():
        path = folder / f"{name}{ending}"
        content = path.read_bytes()
        content = gzip.decompress(content) if ending else content
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(f"{path} is not the file that was published; remove it and retry.")
        images = "images" in name
        values = np.frombuffer(content, np.uint8, offset=16 if images else 8)  # after the header
        found.append(values.reshape(-1, 28, 28) if images else values)
    train_x, train_y, test_x, test_y = found
    rows = dict(zip(("train", "val"), two_way(train_y, 0.1))) | {"test": np.arange(len(test_y))}
    parts = {}
    for split, chosen in rows.items():
        x, y = (test_x, test_y) if split == "test" else (train_x, train_y)
        if small and len(chosen) > 1_000:
            _, some = two_way(y[chosen], 1_000 / len(chosen))
            chosen = chosen[some]
        parts[split] = x[chosen], y[chosen]
    return in_memory("fashion_mnist", parts, torchvision.datasets.FashionMNIST.classes)


def describable_textures(root: Path) -> Splits:
    classes, samples = official_dtd(root)
    return from_files("dtd", root / "dtd", samples, classes)


def _photo_prompt() -> Prompt:
    """The 18 templates that CLIP's authors publish for CIFAR (openai/CLIP, data/prompts.md)."""
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
            classes=_classes, train_images=45_000, prompt=_photo_prompt(),
        )
    )  # fmt: skip
register_dataset(
    Dataset(
        "dtd", describable_textures, Policy(crop_scale=(0.35, 1.0), flip=True),
        classes=47, train_images=1_880, prompt=TEXTURE_PROMPT,
    )
)  # fmt: skip
for _name, _small in (("fashion_mnist", False), ("fashion_mnist_1000", True)):
    register_dataset(
        Dataset(
            _name, functools.partial(fashion_mnist, small=_small), Policy(flip=True), classes=10,
            train_images=1_000 if _small else 54_000, prompt=Prompt(("a photo of a {}.",), "clothing"),
        )
    )  # fmt: skip
