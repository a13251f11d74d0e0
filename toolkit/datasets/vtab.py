"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): tasks of 1,000 images each, from data that torchvision reads.

A task has 800 images for training, 200 for validation, and the whole official test split.  The splits that
these are drawn from follow the benchmark's code (github.com/google-research/task_adaptation): validation
images come from the official validation split if there is one.  The benchmark's own rows depend on the
file order of TensorFlow Datasets; ours are drawn by a seed.  Where TensorFlow Datasets itself made up a
test split, ours is drawn in the same proportions by a fixed seed.  Images are resized whole, without
augmentation.  (Published scores are of a final training on all 1,000 images; `fit` trains on the 800.)

Seven of the 19 tasks are missing, as torchvision does not read their data: resisc45, diabetic_retinopathy,
dmlab, two of dsprites and two of smallnorb.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision
from torchvision.datasets.utils import download_and_extract_archive

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import Sample, from_files, remembered, size_and_time
from toolkit.datasets.public import fetched, official_cifar, official_dtd, official_lists
from toolkit.datasets.splits import Splits, in_memory
from toolkit.errors import InputError

TRAIN, VAL = 800, 200  # images
CALTECH_TRAIN = 30  # images per class in Caltech101's usual training split
CLEVR_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)  # class limits in CLEVR's units, from the camera
KITTI_DISTANCES = (8.0, 20.0, 999.0)  # class limits in metres; no vehicle counts as 1,000
KITTI_VEHICLES = ("Car", "Van", "Truck")
SOURCES = {  # files to get by hand where downloading fails, and where from
    "caltech101": ("caltech101/caltech-101.zip", "https://data.caltech.edu/records/mzrjq-6wc02"),
    "flowers102": (
        "102flowers.tgz, imagelabels.mat and setid.mat (into flowers-102/)",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "pets": (
        "images.tar.gz and annotations.tar.gz (into oxford-iiit-pet/)",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
    ),
    "svhn": ("train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
    "sun397": ("SUN397.tar.gz", "https://vision.princeton.edu/projects/2010/SUN/"),
    "camelyon": ("the .h5 files (into pcam/)", "https://github.com/basveeling/pcam"),
    "eurosat": ("eurosat/EuroSAT.zip", "https://github.com/phelber/EuroSAT"),
    "clevr": ("clevr/CLEVR_v1.0.zip", "https://cs.stanford.edu/people/jcjohns/clevr/"),
    "kitti_distance": (
        "data_object_image_2.zip, data_object_label_2.zip and devkit_object.zip (into Kitti/raw/)",
        "https://www.cvlibs.net/datasets/kitti/eval_object.php",
    ),
}


class Pool(NamedTuple):
    """Images, as files or as one uint8 array (N, H, W, 3) that may lie in a file, and their labels."""

    images: Sequence[Path] | np.ndarray
    labels: Sequence[int]


class Pools(NamedTuple):
    """The official splits of a data set; without `val`, validation images are drawn from `train`."""

    classes: list[str]
    train: Pool
    val: Pool | None
    test: Pool
    root: Path | None = None  # folder of the files; None for arrays


def load_vtab(name: str, root: Path, seed: int = 0) -> Splits:
    """Load a task of `VTAB` below `root`: 800 train, 200 val, the official test split.

    `seed`: of the draw of the 1,000.  The first time every image that is used is decoded once.

    Raises `InputError` for data that is missing and cannot be downloaded, or damaged.
    """
    _, read = VTAB[name]
    pools = read(root)
    rng = np.random.default_rng(seed)
    if pools.val is None:
        train, val = np.split(_draw(rng, name, pools.train, TRAIN + VAL), [TRAIN])
    else:
        train, val = _draw(rng, name, pools.train, TRAIN), _draw(rng, name, pools.val, VAL)
    chosen = {
        "train": (pools.train, np.sort(train)),
        "val": (pools.val or pools.train, np.sort(val)),
        "test": (pools.test, slice(None)),
    }
    if pools.root is None:
        arrays = {
            split: (np.asarray(pool.images[rows]).transpose(0, 3, 1, 2), np.asarray(pool.labels)[rows])
            for split, (pool, rows) in chosen.items()
        }
        return in_memory(f"vtab:{name}", arrays, pools.classes)
    samples = {
        split: [(pool.images[row], pool.labels[row]) for row in np.arange(len(pool.labels))[rows]]
        for split, (pool, rows) in chosen.items()
    }
    return from_files(f"vtab:{name}", pools.root, samples, pools.classes)


def _draw(rng: np.random.Generator, name: str, pool: Pool, count: int) -> np.ndarray:
    if len(pool.labels) < count:
        raise InputError(
            f"vtab:{name} draws {count} images from a split that has {len(pool.labels)}: its data is "
            "incomplete; remove it, so that it is downloaded again."
        )
    return rng.permutation(len(pool.labels))[:count]


def _official(name: str, kind: Callable[..., Any], root: Path, **options: object) -> Any:
    return fetched(f"vtab:{name}", kind, root, *SOURCES[name], **options)


def _pool(samples: Sequence[Sample]) -> Pool:
    return Pool([Path(file) for file, _ in samples], [label for _, label in samples])


def _dealt(samples: Sequence[Sample], *percents: int) -> list[Pool]:
    """Deal samples to splits of these sizes by a fixed seed; the last split is the rest."""
    order = np.random.default_rng(0).permutation(len(samples))
    ends = np.cumsum([len(samples) * percent // 100 for percent in percents])
    return [_pool([samples[row] for row in np.sort(part)]) for part in np.split(order, ends)]


# --- natural --------------------------------------------------------------------------------------


def cifar100(root: Path) -> Pools:
    train, test = official_cifar("cifar100", root)
    return Pools(train.classes, Pool(train.data, train.targets), None, Pool(test.data, test.targets))


def svhn(root: Path) -> Pools:
    """Without the extra images."""

    def read(split: str) -> Pool:
        data = _official("svhn", torchvision.datasets.SVHN, root / "svhn", split=split)
        return Pool(data.data.transpose(0, 2, 3, 1), data.labels)

    return Pools([str(digit) for digit in range(10)], read("train"), None, read("test"))


def caltech101(root: Path) -> Pools:
    """30 images per class to train on, drawn here; test: all others.

    With the background class, which the benchmark has and torchvision leaves out.
    """
    data = _official("caltech101", torchvision.datasets.Caltech101, root)
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
    classes, samples = official_dtd(root)
    return Pools(classes, *map(_pool, samples.values()), root / "dtd")


def flowers102(root: Path) -> Pools:
    kind = torchvision.datasets.Flowers102
    classes, samples = official_lists("vtab:flowers102", kind, root, *SOURCES["flowers102"])
    return Pools(classes, *map(_pool, samples.values()), root / "flowers-102")


def pets(root: Path) -> Pools:
    kind = torchvision.datasets.OxfordIIITPet
    train, test = (_official("pets", kind, root, split=split) for split in ("trainval", "test"))
    pools = [Pool(data._images, data._labels) for data in (train, test)]
    return Pools(train.classes, pools[0], None, pools[1], root / "oxford-iiit-pet")


def sun397(root: Path) -> Pools:
    """70, 10 and 20 %, drawn here."""
    data = _official("sun397", torchvision.datasets.SUN397, root)
    samples = sorted(zip(data._image_files, data._labels))  # torchvision's order is the disk's
    return Pools(data.classes, *_dealt(samples, 70, 10), root / "SUN397")


# --- specialised ----------------------------------------------------------------------------------


def camelyon(root: Path) -> Pools:
    """All test images are held in memory: 0.9 GB."""
    try:
        import h5py  # optional: no other data set needs it
    except ImportError as error:
        raise InputError("vtab:camelyon is stored in HDF5 files; install h5py to read them.") from error

    def read(split: str) -> Pool:
        names = _official("camelyon", torchvision.datasets.PCAM, root, split=split)._FILES[split]
        images, labels = (h5py.File(root / "pcam" / names[part][0]) for part in ("images", "targets"))
        return Pool(images["x"], np.asarray(labels["y"]).reshape(-1))  # labels (N, 1, 1, 1)

    return Pools(["no tumour", "tumour"], read("train"), read("val"), read("test"))


def eurosat(root: Path) -> Pools:
    """60, 20 and 20 %, drawn here."""
    data = _official("eurosat", torchvision.datasets.EuroSAT, root)
    return Pools(data.classes, *_dealt(data.samples, 60, 20), root / "eurosat")


# --- structured -----------------------------------------------------------------------------------


def clevr_count(root: Path) -> Pools:
    """The number of objects, three to ten."""
    classes = [f"{count} objects" for count in range(3, 11)]
    return _clevr(root, "clevr_count", classes, lambda objects: len(objects) - 3)


def clevr_distance(root: Path) -> Pools:
    """The distance of the nearest object."""

    def label(objects: list[dict]) -> int:
        return bisect_left(CLEVR_DISTANCES, min(one["pixel_coords"][2] for one in objects))

    return _clevr(root, "clevr_distance", _between(CLEVR_DISTANCES, ""), label)


def _clevr(root: Path, name: str, classes: list[str], label: Callable[[list[dict]], int]) -> Pools:
    """CLEVR's test images have no labels; the benchmark tests on its validation images."""
    kind = torchvision.datasets.CLEVRClassification
    data = fetched(f"vtab:{name}", kind, root, *SOURCES["clevr"], split="test")
    folder, pools = data._data_folder, []
    for split in ("train", "val"):
        scenes = folder / "scenes" / f"CLEVR_{split}_scenes.json"
        key = [str(scenes.resolve()), *size_and_time(scenes)]
        labels = remembered(name, key, functools.partial(_clevr_labels, scenes, label))
        pools.append(_pool([(folder / "images" / split / file, one) for file, one in labels]))
    return Pools(classes, pools[0], None, pools[1], folder)


def _clevr_labels(path: Path, label: Callable[[list[dict]], int]) -> list[tuple[str, int]]:
    try:
        scenes = json.loads(path.read_bytes())["scenes"]
        return sorted((os.path.basename(one["image_filename"]), label(one["objects"])) for one in scenes)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(path, "CLEVR's list of scenes", error) from error


def kitti_distance(root: Path) -> Pools:
    """The distance of the nearest vehicle.

    KITTI's test images have no labels: its training images are dealt by video, as the benchmark does.
    """
    _official("kitti_distance", torchvision.datasets.Kitti, root, train=True)
    dealt = _official("kitti_distance", _kitti_images, root)
    folder = root / "Kitti" / "raw" / "training"
    pools = []
    for numbers in dealt:
        labels = [_kitti_label(folder, number) for number in numbers]
        pools.append(Pool([folder / "image_2" / f"{number:06}.png" for number in numbers], labels))
    return Pools([*_between(KITTI_DISTANCES[:-1], " m"), "no vehicle"], *pools, folder)


def _kitti_images(root: Path, download: bool) -> list[list[int]]:
    """Numbers of the images of train, val and test.

    The last two have a tenth of the videos each, the same as TensorFlow Datasets draws: by numpy's legacy
    generator, whose numbers never change.
    """
    raw = root / "Kitti" / "raw"
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
    """The class of the nearest vehicle, by its z in the camera's coordinates."""
    path = folder / "label_2" / f"{image:06}.txt"
    try:
        objects = [line.split() for line in path.read_text().splitlines()]
        distances = [float(values[13]) for values in objects if values[0] in KITTI_VEHICLES]
    except (OSError, ValueError, IndexError) as error:
        raise _unreadable(path, "KITTI's list of objects", error) from error
    return bisect_left(KITTI_DISTANCES, min(distances, default=1000.0))


def _between(limits: Sequence[float], unit: str) -> list[str]:
    """Names of the classes between limits, and beyond them."""
    inner = [f"{low:g} to {high:g}{unit}" for low, high in itertools.pairwise(limits)]
    return [f"up to {limits[0]:g}{unit}", *inner, f"beyond {limits[-1]:g}{unit}"]


def _unreadable(path: Path, expected: str, error: Exception) -> InputError:
    return InputError(
        f"{path} is not {expected} ({type(error).__name__}: {error}); unpack the archive again."
    )


VTAB = {  # number of classes, reader
    "caltech101": (102, caltech101),
    "cifar100": (100, cifar100),
    "dtd": (47, dtd),
    "flowers102": (102, flowers102),
    "pets": (37, pets),
    "svhn": (10, svhn),
    "sun397": (397, sun397),
    "camelyon": (2, camelyon),
    "eurosat": (10, eurosat),
    "clevr_count": (8, clevr_count),
    "clevr_distance": (6, clevr_distance),
    "kitti_distance": (4, kitti_distance),
}
for _name, (_classes, _) in VTAB.items():
    register_dataset(
        Dataset(f"vtab:{_name}", functools.partial(load_vtab, _name), classes=_classes, train_images=TRAIN)
    )
