"""Published segmentation data: Pascal VOC 2012 and ADE20K.

A tenth of the training images is held out for validation; the test images are the official validation
images, as the labels of the official test sets are not public.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import Sample, from_files, held_out
from toolkit.datasets.pictures import check_size
from toolkit.datasets.public import fetched
from toolkit.datasets.splits import Policy, Splits
from toolkit.datasets.tasks import IGNORED
from toolkit.errors import InputError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip
ADE_CLASSES = 150
ADE_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"


def voc2012(root: Path) -> Splits:
    """Pascal VOC 2012's segmentation (Everingham et al. 2015): 20 classes of objects, and background.

    1,464 training and 1,449 validation images.  The borders of objects are ignored.
    """
    samples = {}
    for part in ("train", "val"):
        data = fetched(
            "voc2012", torchvision.datasets.VOCSegmentation, root, "VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/", year="2012", image_set=part,
        )  # fmt: skip
        samples[part] = [(Path(image), Path(mask)) for image, mask in zip(data.images, data.masks)]
    return _with_masks("voc2012", root, samples["train"], samples["val"], list(VOC_CLASSES), first=0)


def ade20k(root: Path) -> Splits:
    """ADE20K as in the scene parsing challenge 2016 (Zhou et al. 2017): 150 classes.

    20,210 training and 2,000 validation images.  Pixels of other classes are ignored.

    Raises `InputError` for missing files, with their source.
    """
    folder = root / "ADEChallengeData2016"
    names, parts = folder / "objectInfo150.txt", ("training", "validation")
    needed = [names, *(folder / kind / part for kind in ("images", "annotations") for part in parts)]
    missing = [str(path.relative_to(folder)) for path in needed if not path.exists()]
    if missing:
        raise InputError(
            f"dataset 'ade20k' lacks {', '.join(missing)} in {folder}: unpack {Path(ADE_URL).name} from "
            f"{ADE_URL} into {root}."
        )
    train, test = (
        [
            (image, folder / "annotations" / part / f"{image.stem}.png")
            for image in sorted((folder / "images" / part).glob("*.jpg"))
        ]
        for part in parts
    )
    return _with_masks("ade20k", folder, train, test, _ade_names(names), first=1)


def _ade_names(path: Path) -> list[str]:
    """The first name of each class, from the last column of a table with a heading."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
    names = [row[-1].split(",")[0].strip() for row in rows]
    if len(names) != ADE_CLASSES:
        raise InputError(
            f"dataset 'ade20k': {path} names {len(names)} classes, not {ADE_CLASSES}; unpack it again."
        )
    return names


def _with_masks(
    name: str, root: Path, train: list[Sample], test: list[Sample], classes: list[str], first: int
) -> Splits:
    """Splits of images with masks that hold `first` for the first class."""
    return from_files(
        name, root, held_out(name, train) | {"test": test}, classes,
        read=functools.partial(_mask, first), check=functools.partial(_check, name, len(classes), first),
        stamp=first,
    )  # fmt: skip


def _mask(first: int, path: Path) -> torch.Tensor:
    """A mask's classes, uint8 (H, W); ids below `first` become `IGNORED`."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_size(image)
            if image.mode not in ("P", "L"):
                raise ValueError(f"{image.mode} pixels, not one class each")
            stored = np.array(image)
    except Exception as error:  # damaged content leads decoders to errors of any type
        raise ValueError(f"mask {path.name}: {error}") from error
    classes = stored.astype(np.int16) - first
    classes[(classes < 0) | (stored == IGNORED)] = IGNORED
    return torch.from_numpy(classes.astype(np.uint8))


def _check(
    name: str,
    num_classes: int,
    first: int,
    path: Path,
    mask: Path,
    image: torch.Tensor,
    classes: torch.Tensor,
) -> None:
    if image.shape[1:] != classes.shape:
        (h, w), (height, width) = classes.shape, image.shape[1:]
        raise InputError(
            f"dataset {name!r}: {mask} has {w} x {h} pixels, its image {path.name} {width} x {height}: "
            "unpack both again."
        )
    unknown = classes[(classes >= num_classes) & (classes != IGNORED)]
    if len(unknown):
        raise InputError(
            f"dataset {name!r}: {mask} holds the class id {int(unknown[0]) + first}; the ids of its "
            f"{num_classes} classes end at {num_classes - 1 + first}.  Unpack it again."
        )


register_dataset(
    Dataset("voc2012", voc2012, Policy(flip=True), "segmentation", classes=21, train_images=1_317)
)
register_dataset(
    Dataset("ade20k", ade20k, Policy(flip=True), "segmentation", classes=ADE_CLASSES, train_images=18_189)
)
