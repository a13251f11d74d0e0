"""The data of VTAB's tasks as torchvision lays it out: images and labels of the splits to draw from.

One reader per data set, used by `toolkit.datasets.vtab.VTAB`.  Each takes the folder of downloads and raises
`InputError` for data that is missing and cannot be downloaded, or is not what it should be.
"""

from __future__ import annotations

import itertools
import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
from torchvision.datasets.utils import download_and_extract_archive

from toolkit.datasets.image_files import remembered, size_and_time
from toolkit.datasets.public import fetched
from toolkit.errors import InputError

CALTECH_TRAIN = 30  # images per class of Caltech101's usual training split
CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)  # CLEVR's units, from the camera: limits of the classes
KITTI_DISTANCES = (8.0, 20.0, 999.0)  # metres; no vehicle counts as 1,000
KITTI_VEHICLES = ("Car", "Van", "Truck")


@dataclass(frozen=True)
class Pool:
    """Images, as files or as one uint8 array (N, H, W, 3) that may lie in a file, and their labels."""

    images: Sequence[Path] | np.ndarray
    labels: Sequence[int]


@dataclass(frozen=True)
class Pools:
    """The splits of a data set; `val`: None where validation images are drawn from those to train on.
    `root`: the folder of the files, None for arrays."""

    classes: list[str]
    train: Pool
    val: Pool | None
    test: Pool
    root: Path | None = None


def _pool(samples: Sequence[tuple[Path, int]]) -> Pool:
    return Pool([Path(file) for file, _ in samples], [label for _, label in samples])


def _dealt(samples: Sequence[tuple[Path, int]], *percents: int) -> list[Pool]:
    """Samples dealt to splits of such sizes, the last taking the rest, by a seed that is always the same."""
    order = np.random.default_rng(0).permutation(len(samples))
    ends = np.cumsum([len(samples) * percent // 100 for percent in percents])
    return [_pool([samples[row] for row in np.sort(part)]) for part in np.split(order, ends)]


# --- natural --------------------------------------------------------------------------------------


def cifar100(root: Path) -> Pools:
    def read(train: bool) -> torchvision.datasets.CIFAR100:
        return fetched(
            "vtab:cifar100", "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/", root,
            lambda download: torchvision.datasets.CIFAR100(root, train=train, download=download),
        )  # fmt: skip

    train, test = read(True), read(False)
    return Pools(train.classes, Pool(train.data, train.targets), None, Pool(test.data, test.targets))


def svhn(root: Path) -> Pools:
    def read(split: str) -> Pool:
        data = fetched(
            "vtab:svhn", f"{split}_32x32.mat", "http://ufldl.stanford.edu/housenumbers/", root / "svhn",
            lambda download: torchvision.datasets.SVHN(root / "svhn", split=split, download=download),
        )  # fmt: skip
        return Pool(data.data.transpose(0, 2, 3, 1), data.labels)

    return Pools([str(digit) for digit in range(10)], read("train"), None, read("test"))


def caltech101(root: Path) -> Pools:
    """With the background, which torchvision leaves out and the benchmark does not."""
    data = fetched(
        "vtab:caltech101", "caltech-101.zip", "https://data.caltech.edu/records/mzrjq-6wc02",
        root / "caltech101", lambda download: torchvision.datasets.Caltech101(root, download=download),
    )  # fmt: skip
    folder = Path(data.root) / "101_ObjectCategories"
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    rng, train, test = np.random.default_rng(0), [], []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("*.jpg"))
        order = rng.permutation(len(files))
        for part, rows in ((train, order[:CALTECH_TRAIN]), (test, order[CALTECH_TRAIN:])):
            part += [(files[row], label) for row in np.sort(rows)]
    return Pools(classes, _pool(train), None, _pool(test), folder)


def dtd(root: Path) -> Pools:
    classes, pools = _three_lists(
        "vtab:dtd", "dtd-r1.0.1.tar.gz", "https://www.robots.ox.ac.uk/~vgg/data/dtd/", root / "dtd",
        lambda split, download: torchvision.datasets.DTD(root, split=split, partition=1, download=download),
    )  # fmt: skip
    return Pools(classes, *pools, root / "dtd")


def flowers102(root: Path) -> Pools:
    classes, pools = _three_lists(
        "vtab:flowers102", "102flowers.tgz, imagelabels.mat and setid.mat",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/", root / "flowers-102",
        lambda split, download: torchvision.datasets.Flowers102(root, split=split, download=download),
    )  # fmt: skip
    return Pools(classes, *pools, root / "flowers-102")


def _three_lists(
    name: str, archive: str, url: str, folder: Path, build: Callable[[str, bool], object]
) -> tuple[list[str], list[Pool]]:
    """The classes, and train, val and test, of what torchvision keeps as lists of files and labels."""
    pools = []
    for split in ("train", "val", "test"):
        data = fetched(name, archive, url, folder, lambda download, split=split: build(split, download))
        pools.append(Pool(data._image_files, data._labels))
    return list(data.classes), pools


def pets(root: Path) -> Pools:
    folder = root / "oxford-iiit-pet"

    def read(split: str) -> torchvision.datasets.OxfordIIITPet:
        return fetched(
            "vtab:pets", "images.tar.gz and annotations.tar.gz",
            "https://www.robots.ox.ac.uk/~vgg/data/pets/", folder,
            lambda download: torchvision.datasets.OxfordIIITPet(root, split=split, download=download),
        )  # fmt: skip

    train, test = read("trainval"), read("test")
    parts = [Pool(data._images, data._labels) for data in (train, test)]
    return Pools(train.classes, parts[0], None, parts[1], folder)


def sun397(root: Path) -> Pools:
    data = fetched(
        "vtab:sun397", "SUN397.tar.gz", "https://vision.princeton.edu/projects/2010/SUN/", root,
        lambda download: torchvision.datasets.SUN397(root, download=download),
    )  # fmt: skip
    samples = sorted(zip(data._image_files, data._labels))  # torchvision's order is the disk's
    return Pools(data.classes, *_dealt(samples, 70, 10), root / "SUN397")


# --- specialised ----------------------------------------------------------------------------------


def camelyon(root: Path) -> Pools:
    """All test images are held in memory: 0.9 GB."""
    try:
        import h5py
    except ImportError as error:
        raise InputError("vtab:camelyon lies in HDF5 files; install h5py to read them.") from error

    def read(split: str) -> Pool:
        data = fetched(
            "vtab:camelyon", "the .h5 files", "https://github.com/basveeling/pcam", root / "pcam",
            lambda download: torchvision.datasets.PCAM(root, split=split, download=download),
        )  # fmt: skip
        names = data._FILES[split]
        images, labels = (h5py.File(root / "pcam" / names[what][0]) for what in ("images", "targets"))
        return Pool(images["x"], np.asarray(labels["y"]).reshape(-1))  # labels (N, 1, 1, 1)

    return Pools(["no tumour", "tumour"], read("train"), read("val"), read("test"))


def eurosat(root: Path) -> Pools:
    data = fetched(
        "vtab:eurosat", "EuroSAT.zip", "https://github.com/phelber/EuroSAT", root / "eurosat",
        lambda download: torchvision.datasets.EuroSAT(root, download=download),
    )  # fmt: skip
    return Pools(data.classes, *_dealt(data.samples, 60, 20), root / "eurosat")


# --- structured -----------------------------------------------------------------------------------


def clevr_count(root: Path) -> Pools:
    """How many objects?  All pictures have three to ten."""
    classes = [f"{count} objects" for count in range(3, 11)]
    return _clevr(root, "clevr_count", classes, lambda objects: len(objects) - 3)


def clevr_distance(root: Path) -> Pools:
    """How far is the nearest object?"""
    return _clevr(
        root, "clevr_distance", _between(CLEVR_DISTANCES, ""),
        lambda objects: bisect_left(CLEVR_DISTANCES, min(one["pixel_coords"][2] for one in objects)),
    )  # fmt: skip


def _clevr(root: Path, name: str, classes: list[str], label: Callable[[list[dict]], int]) -> Pools:
    """CLEVR's test images have no labels; the benchmark tests on its validation images."""
    data = fetched(
        f"vtab:{name}", "CLEVR_v1.0.zip", "https://cs.stanford.edu/people/jcjohns/clevr/", root / "clevr",
        lambda download: torchvision.datasets.CLEVRClassification(root, split="test", download=download),
    )  # fmt: skip
    folder, pools = data._data_folder, []
    for split in ("train", "val"):
        scenes = folder / "scenes" / f"CLEVR_{split}_scenes.json"
        key = [name, str(scenes.resolve()), *size_and_time(scenes)]
        found = remembered("clevr", key, lambda scenes=scenes: _clevr_labels(scenes, label))
        pools.append(_pool([(folder / "images" / split / file, one) for file, one in found]))
    return Pools(classes, pools[0], None, pools[1], folder)


def _clevr_labels(path: Path, label: Callable[[list[dict]], int]) -> list[tuple[str, int]]:
    try:
        scenes = json.loads(path.read_bytes())["scenes"]
        return sorted((os.path.basename(one["image_filename"]), label(one["objects"])) for one in scenes)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(path, "CLEVR's list of scenes", error) from error


def kitti_distance(root: Path) -> Pools:
    """How far is the nearest vehicle?  KITTI's test images have no labels: its training images are dealt."""
    raw = root / "Kitti" / "raw"
    source = (
        "data_object_image_2.zip, data_object_label_2.zip and devkit_object.zip",
        "https://www.cvlibs.net/datasets/kitti/eval_object.php",
        raw,
    )
    fetched(
        "vtab:kitti_distance", *source,
        lambda download: torchvision.datasets.Kitti(root, train=True, download=download),
    )  # fmt: skip
    dealt = fetched("vtab:kitti_distance", *source, lambda download: _kitti_images(raw, download))
    folder = raw / "training"
    pools = [
        _pool([(folder / "image_2" / f"{i:06}.png", _kitti_label(folder, i)) for i in images])
        for images in dealt
    ]
    return Pools([*_between(KITTI_DISTANCES[:-1], " m"), "no vehicle"], *pools, folder)


def _kitti_images(raw: Path, download: bool) -> list[list[int]]:
    """Numbers of the images of train, val and test.

    The last two have a tenth of the videos each, and those that TensorFlow Datasets draws: by numpy's
    legacy generator, whose numbers never change.
    """
    if download:
        url = f"{torchvision.datasets.Kitti.data_url}devkit_object.zip"
        download_and_extract_archive(url, download_root=str(raw), filename="devkit_object.zip")
    places, lines = raw / "mapping" / "train_rand.txt", raw / "mapping" / "train_mapping.txt"
    origins, videos = lines.read_text().splitlines(), defaultdict(list)
    try:
        for image, place in enumerate(places.read_text().split(",")):
            videos[origins[int(place) - 1].split()[1]].append(image)
    except (ValueError, IndexError) as error:
        raise _unreadable(places, "a list of lines of its neighbour", error) from error
    rng, count = np.random.RandomState(123), max(1, len(videos) // 10)
    test = set(rng.choice(sorted(videos), count, replace=False))
    val = set(rng.choice(sorted(videos.keys() - test), count, replace=False))
    parts = (videos.keys() - test - val, val, test)
    return [sorted(image for video in part for image in videos[video]) for part in parts]


def _kitti_label(folder: Path, image: int) -> int:
    """The class of the least z of a vehicle, in the camera's coordinates."""
    path = folder / "label_2" / f"{image:06}.txt"
    try:
        objects = [line.split() for line in path.read_text().splitlines()]
        distances = [float(values[13]) for values in objects if values[0] in KITTI_VEHICLES]
    except (OSError, ValueError, IndexError) as error:
        raise _unreadable(path, "KITTI's list of objects", error) from error
    return bisect_left(KITTI_DISTANCES, min(distances, default=1000.0))


def _between(limits: Sequence[float], unit: str) -> list[str]:
    """Names of the classes that lie between limits, and beyond them."""
    inner = [f"{low:g} to {high:g}{unit}" for low, high in itertools.pairwise(limits)]
    return [f"up to {limits[0]:g}{unit}", *inner, f"beyond {limits[-1]:g}{unit}"]


def _unreadable(path: Path, what: str, error: Exception) -> InputError:
    return InputError(f"{path} is not {what} ({type(error).__name__}: {error}); unpack the archive again.")
