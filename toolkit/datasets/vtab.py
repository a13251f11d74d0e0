"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): tasks of 1,000 images each, from data that torchvision reads.

A task has 800 images to train on, 200 to choose by, and the whole official test split.  Which official
splits these are drawn from follows the benchmark's code (github.com/google-research/task_adaptation): the
validation images are from the official validation split where there is one.  Its very rows cannot be had
without TensorFlow Datasets, whose order of files they are the first of: ours are drawn by a seed.  Where
TensorFlow Datasets itself has made up a test split, ours is drawn too, in the same proportions and by a seed
that is always the same: see `VtabTask.splits`.  Images are squeezed whole to the input, without augmentation.
(The published scores are of a last training on all 1,000 images; `fit` trains on the 800.)

Of the 19 tasks seven are missing here, as torchvision does not read their data: `MISSING`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.datasets import vtab_sources as sources
from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import from_files
from toolkit.datasets.splits import Splits, in_memory
from toolkit.datasets.vtab_sources import Pool, Pools
from toolkit.errors import InputError, check_name

TRAIN, VAL = 800, 200  # images
MISSING = (
    "resisc45", "diabetic_retinopathy", "dmlab", "dsprites_location", "dsprites_orientation",
    "smallnorb_azimuth", "smallnorb_elevation",
)  # fmt: skip
_OFFICIAL = "the official splits"


@dataclass(frozen=True)
class VtabTask:
    """`group` of the paper's: natural, specialised or structured.  `splits`: where they come from."""

    group: str
    classes: int
    splits: str
    read: Callable[[Path], Pools]


def load_vtab(name: str, root: Path, seed: int = 0) -> Splits:
    """A task of `VTAB`, downloaded to `root` or read there: 800 train, 200 val, the official test split.

    `seed`: of the draw of the 1,000.  The first time every image that is used is decoded once.

    Raises `InputError` for a task that is unknown or not read here, and for data that is missing and cannot
    be downloaded.
    """
    if name in MISSING:
        raise InputError(
            f"vtab:{name} is not read here, as torchvision does not read its data; take another task, or lay "
            "its images out as folder:PATH."
        )
    task = VTAB[check_name("task of vtab", name, VTAB)]
    root.mkdir(parents=True, exist_ok=True)
    pools = task.read(root)
    rng = np.random.default_rng(seed)
    if pools.val is None:
        train, val = np.split(_draw(rng, name, pools.train, TRAIN + VAL), [TRAIN])
    else:
        train, val = _draw(rng, name, pools.train, TRAIN), _draw(rng, name, pools.val, VAL)
    parts = {
        "train": (pools.train, np.sort(train)),
        "val": (pools.val or pools.train, np.sort(val)),
        "test": (pools.test, ...),
    }
    make = _from_arrays if pools.root is None else _from_files
    return make(f"vtab:{name}", pools, parts)


def _draw(rng: np.random.Generator, name: str, pool: Pool, count: int) -> np.ndarray:
    if len(pool.labels) < count:
        raise InputError(
            f"vtab:{name} draws {count} images from a split that has {len(pool.labels)}: its data is not "
            "whole; remove it, so that it is downloaded anew."
        )
    return rng.permutation(len(pool.labels))[:count]


def _from_arrays(name: str, pools: Pools, parts: dict) -> Splits:
    arrays = {
        split: (np.asarray(pool.images[rows]).transpose(0, 3, 1, 2), np.asarray(pool.labels)[rows])
        for split, (pool, rows) in parts.items()
    }
    return in_memory(name, arrays, pools.classes)


def _from_files(name: str, pools: Pools, parts: dict) -> Splits:
    files = {
        split: [(pool.images[row], pool.labels[row]) for row in np.arange(len(pool.labels))[rows]]
        for split, (pool, rows) in parts.items()
    }
    return from_files(name, pools.root, files, pools.classes)


VTAB = {
    "caltech101": VtabTask(
        "natural", 102, "30 images per class to train on, drawn here; test: all others", sources.caltech101
    ),
    "cifar100": VtabTask("natural", 100, _OFFICIAL, sources.cifar100),
    "dtd": VtabTask("natural", 47, f"{_OFFICIAL} of partition 1", sources.dtd),
    "flowers102": VtabTask("natural", 102, _OFFICIAL, sources.flowers102),
    "pets": VtabTask("natural", 37, _OFFICIAL, sources.pets),
    "svhn": VtabTask("natural", 10, f"{_OFFICIAL}, without the extra images", sources.svhn),
    "sun397": VtabTask("natural", 397, "70, 10 and 20 %, drawn here", sources.sun397),
    "camelyon": VtabTask("specialised", 2, _OFFICIAL, sources.camelyon),
    "eurosat": VtabTask("specialised", 10, "60, 20 and 20 %, drawn here", sources.eurosat),
    "clevr_count": VtabTask("structured", 8, "official train; test: official val", sources.clevr_count),
    "clevr_distance": VtabTask("structured", 6, "official train; test: official val", sources.clevr_distance),
    "kitti_distance": VtabTask(
        "structured", 4, "official train, dealt by video as the benchmark does", sources.kitti_distance
    ),
}

for _name, _task in VTAB.items():
    register_dataset(
        Dataset(
            f"vtab:{_name}", functools.partial(load_vtab, _name), classes=_task.classes, train_images=TRAIN
        )
    )
