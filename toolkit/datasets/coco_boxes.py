"""Detection on COCO 2017 (Lin et al. 2014, arXiv 1405.0312), from its files."""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.coco import annotation_files, read_instances
from toolkit.datasets.dense_files import dense_splits, held_out
from toolkit.datasets.image_files import size_and_time
from toolkit.datasets.splits import Policy, Splits
from toolkit.errors import InputError

CLIPPED_PIXELS = 1.0  # a box may stick out of its image by less: rounding
Boxes = tuple[int, int, np.ndarray]  # the image's width and height, and float32 rows x1, y1, x2, y2, class


def coco_detection(root: Path) -> Splits:
    """The boxes of COCO's 80 classes, numbered by their order in its list of categories.

    A tenth of train2017 is held out for validation; the test images are val2017, as the labels of its own
    test set are not public.  `root` is that of `visual_wake_words`.  Images without a box are kept.

    Crowds, which COCO's score forgives and a detector is not trained on, and boxes without area are left
    out and counted in `Splits.left_out`: so scores are lower than official ones by the finds in crowds.
    There are no instance masks: those of its polygons overlap, and are of no single map.

    Raises `InputError` for files that are missing or of another form, for boxes outside their image, and
    for an image that is not of the size that the annotations say.
    """
    files = annotation_files("coco", root)
    content = {
        part: read_instances("coco", path, 1, functools.partial(_boxes, path)) for part, path in files.items()
    }
    names = content["train2017"]["classes"]
    if content["val2017"]["classes"] != names:
        raise InputError(
            f"dataset 'coco': {' and '.join(map(str, files.values()))} differ in their categories."
        )
    train, test = (
        [
            (root / part / file, (width, height, np.array(boxes, np.float32).reshape(-1, 5)))
            for file, width, height, boxes in content[part]["images"]
        ]
        for part in files
    )
    splits = dense_splits(
        "coco", root, held_out("coco", train) | {"test": test}, _target, _check, classes=names,
        stamp=[size_and_time(path) for path in files.values()],
    )  # fmt: skip
    for what in ("crowd annotations", "boxes without area"):
        count = sum(part["left_out"][what] for part in content.values())
        if count:
            splits.left_out[what] = count
    return splits


def _boxes(annotations: Path, content: dict) -> dict:
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
        where = (annotations, annotation["image_id"], annotation["id"])
        corners = _clipped(annotation["bbox"], *sizes[annotation["image_id"]], where)
        if annotation["category_id"] not in numbers:
            raise InputError(f"{_named(where)} has the unknown category {annotation['category_id']}.")
        if corners is None:
            left_out["boxes without area"] += 1
        else:
            boxes[annotation["image_id"]].append([*corners, numbers[annotation["category_id"]]])
    return {
        "classes": [category["name"] for category in categories],
        "images": sorted(
            (Path(image["file_name"]).name, *sizes[image["id"]], boxes[image["id"]])
            for image in content["images"]
        ),
        "left_out": left_out,
    }


def _clipped(box: list[float], width: int, height: int, where: tuple) -> list[float] | None:
    """x1, y1, x2, y2 of `box` (x, y, width, height) within its image; None if it has no area."""
    x, y, w, h = box
    excess = max(-x, -y, x + w - width, y + h - height)
    if not (excess < CLIPPED_PIXELS and min(w, h) >= 0):  # NaN is not, either
        raise InputError(
            f"{_named(where)} has a box outside its image of {width} x {height} pixels: {box}.  Correct it "
            "or take it out of the file."
        )
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return [x1, y1, x2, y2] if x2 > x1 and y2 > y1 else None


def _named(where: tuple) -> str:
    annotations, image, number = where
    return f"dataset 'coco': in {annotations} annotation {number} of image {image}"


def _target(source: Boxes) -> dict[str, torch.Tensor]:
    return {"boxes": torch.from_numpy(source[2])}


def _check(path: Path, source: Boxes, image: torch.Tensor, target: dict[str, torch.Tensor]) -> None:
    width, height = source[:2]
    if image.shape[1:] != (height, width):
        raise InputError(
            f"dataset 'coco': {path} has {image.shape[2]} x {image.shape[1]} pixels, its annotations are for "
            f"{width} x {height}: unpack it again."
        )


register_dataset(
    Dataset(
        "coco", lambda root: coco_detection(root / "coco"), Policy(flip=True), "detection",
        classes=80, train_images=106_458,
    )
)  # fmt: skip
