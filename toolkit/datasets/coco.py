"""COCO 2017 (Lin et al. 2014, arXiv 1405.0312), from its files, for two tasks.

* vww: Visual Wake Words (Chowdhery et al. 2019, arXiv 1906.05721): is there a person?
* coco: detection of its 80 classes.

A tenth of train2017 is held out for validation; the test images are val2017, as the labels of the official
test set are not public.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import Sample, from_files, held_out, remembered, size_and_time
from toolkit.datasets.splits import Policy, Splits
from toolkit.errors import InputError

CLASSES = ["no person", "person"]
LEAST_SHARE = 0.005  # of the image's area that a person's box covers (Chowdhery et al., sec. 3)
CLIPPED_PIXELS = 1.0  # a box may stick out of its image by less: rounding
Boxes = tuple[int, int, np.ndarray]  # width and height of the image; float32 rows x1, y1, x2, y2, class


def _annotation_files(dataset: str, root: Path) -> dict[str, Path]:
    """The lists of instances of train2017 and val2017; raises `InputError` if any file is missing."""
    annotations = {part: root / "annotations" / f"instances_{part}.json" for part in ("train2017", "val2017")}
    missing = [str(path.relative_to(root)) for path in annotations.values() if not path.is_file()]
    missing += [f"{part}/" for part in annotations if not (root / part).is_dir()]
    if missing:
        raise InputError(
            f"dataset {dataset!r} lacks {', '.join(missing)} in {root}: unpack annotations_trainval2017.zip, "
            "train2017.zip and val2017.zip from https://cocodataset.org/#download there."
        )
    return annotations


def _read_instances(dataset: str, path: Path, make: Callable[[dict], dict | list]) -> dict | list:
    """Apply `make` to a list of instances: half a gigabyte of JSON is read once per unchanged file."""
    key = [str(path.resolve()), *size_and_time(path), LEAST_SHARE, CLIPPED_PIXELS]
    return remembered(dataset, key, lambda: _made(dataset, path, make))


def _made(dataset: str, path: Path, make: Callable[[dict], dict | list]) -> dict | list:
    try:
        return make(json.loads(path.read_bytes()))
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"dataset {dataset!r}: {path} is not COCO's list of instances "
            f"({type(error).__name__}: {error}); unpack it again."
        ) from error


# --- Visual Wake Words ----------------------------------------------------------------------------


def visual_wake_words(root: Path) -> Splits:
    """Is there a person?  Yes if a person's box covers more than 0.5 % of the image's area.

    The first time every image is decoded, to find broken ones: minutes.
    Raises `InputError` for missing or malformed files.
    """
    train, test = (
        [(root / part / name, label) for name, label in _read_instances("vww", path, _labels)]
        for part, path in _annotation_files("vww", root).items()
    )
    return from_files("vww", root, held_out("vww", train) | {"test": test}, CLASSES)


def _labels(content: dict) -> list[tuple[str, int]]:
    """File names with 1 for a person, else 0."""
    [person] = [c["id"] for c in content["categories"] if c["name"] == "person"]
    least = {image["id"]: LEAST_SHARE * image["width"] * image["height"] for image in content["images"]}
    shown = {
        box["image_id"]
        for box in content["annotations"]
        if box["category_id"] == person
        and box["bbox"][2] * box["bbox"][3] > least[box["image_id"]]  # x, y, width, height in pixels
    }
    return sorted((Path(image["file_name"]).name, int(image["id"] in shown)) for image in content["images"])


# --- detection ------------------------------------------------------------------------------------


def coco_detection(root: Path) -> Splits:
    """The boxes of COCO's 80 classes, numbered by their order in its list of categories.

    Images without a box are kept.  Crowds, which COCO's score forgives and a detector is not trained on, and
    boxes without area are left out and counted in `Splits.left_out`: scores are lower than official ones by
    the detections inside crowds.  There are no instance masks: overlapping polygons do not fit in one map.

    Raises `InputError` for missing or malformed files, for boxes outside their image, and for an image whose
    size differs from its annotations.
    """
    files = _annotation_files("coco", root)
    content = {
        part: _read_instances("coco", path, functools.partial(_boxes, path)) for part, path in files.items()
    }
    names = content["train2017"]["classes"]
    if content["val2017"]["classes"] != names:
        paths = " and ".join(map(str, files.values()))
        raise InputError(f"dataset 'coco': {paths} differ in their categories.")
    train, test = ([_sample(root / part, *image) for image in content[part]["images"]] for part in files)
    splits = from_files(
        "coco", root, held_out("coco", train) | {"test": test}, names, read=_target, check=_check,
        stamp=[size_and_time(path) for path in files.values()],
    )  # fmt: skip
    for kind in ("crowd annotations", "boxes without area"):
        count = sum(part["left_out"][kind] for part in content.values())
        if count:
            splits.left_out[kind] = count
    return splits


def _sample(folder: Path, file: str, width: int, height: int, boxes: list) -> Sample:
    return folder / file, (width, height, np.array(boxes, np.float32).reshape(-1, 5))


def _boxes(path: Path, content: dict) -> dict:
    """Classes, images with their boxes, and how many annotations were left out, of a file's content."""
    categories = sorted(content["categories"], key=lambda category: category["id"])
    numbers = {category["id"]: number for number, category in enumerate(categories)}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    left_out = {"crowd annotations": 0, "boxes without area": 0}
    boxes = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation.get("iscrowd"):
            left_out["crowd annotations"] += 1
            continue
        image, category = annotation["image_id"], annotation["category_id"]
        where = f"dataset 'coco': in {path} annotation {annotation['id']} of image {image}"
        corners = _clipped(annotation["bbox"], *sizes[image], where)
        if category not in numbers:
            raise InputError(f"{where} has the unknown category {category}.")
        if corners is None:
            left_out["boxes without area"] += 1
        else:
            boxes[image].append([*corners, numbers[category]])
    images = [
        (Path(image["file_name"]).name, image["width"], image["height"], boxes[image["id"]])
        for image in content["images"]
    ]
    return {
        "classes": [category["name"] for category in categories],
        "images": sorted(images),
        "left_out": left_out,
    }


def _clipped(box: list[float], width: int, height: int, where: str) -> list[float] | None:
    """x1, y1, x2, y2 of `box` (x, y, width, height) within its image; None if it has no area."""
    x, y, w, h = box
    excess = max(-x, -y, x + w - width, y + h - height)
    if not (excess < CLIPPED_PIXELS and min(w, h) >= 0):  # refuses NaN, too
        raise InputError(
            f"{where} has a box outside its image of {width} x {height} pixels: {box}.  Correct it or remove "
            "it from the file."
        )
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return [x1, y1, x2, y2] if x2 > x1 and y2 > y1 else None


def _target(source: Boxes) -> dict[str, torch.Tensor]:
    return {"boxes": torch.from_numpy(source[2])}


def _check(path: Path, source: Boxes, image: torch.Tensor, target: dict[str, torch.Tensor]) -> None:
    width, height, _ = source
    if image.shape[1:] != (height, width):
        raise InputError(
            f"dataset 'coco': {path} has {image.shape[2]} x {image.shape[1]} pixels, its annotations are for "
            f"{width} x {height}: unpack it again."
        )


register_dataset(
    Dataset(
        "vww", lambda root: visual_wake_words(root / "coco"),
        Policy(crop_scale=(0.5, 1.0), flip=True),  # a smaller crop may lose the person
    )
)  # fmt: skip
register_dataset(
    Dataset(
        "coco", lambda root: coco_detection(root / "coco"), Policy(flip=True), "detection",
        classes=80, train_images=106_458,
    )
)  # fmt: skip
