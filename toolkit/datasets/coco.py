"""Visual Wake Words (Chowdhery et al. 2019, arXiv 1906.05721) from the files of COCO 2017."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import from_files, remembered, size_and_time
from toolkit.datasets.splits import Policy, Splits, two_way
from toolkit.errors import InputError

LEAST_SHARE = 0.005  # of the image's area that a person's box covers (sec. 3)
CLASSES = ["no person", "person"]


def visual_wake_words(root: Path) -> Splits:
    """Is there a person?  Yes if a person's box covers more than 0.5 % of the image's area.

    The test images are COCO's val2017; a tenth of train2017 is held out for validation.  `root` holds
    `annotations/instances_train2017.json`, `annotations/instances_val2017.json`, `train2017/` and
    `val2017/`.  The first time every image is decoded, to find what is broken: minutes.

    Raises `InputError` for files that are missing or of another form.
    """
    annotations = annotation_files("vww", root)
    train, test = (_labelled(root / part, path) for part, path in annotations.items())
    try:
        rest, held_out = two_way([label for _, label in train], 0.1)
    except ValueError as error:
        raise InputError(f"dataset 'vww': train2017 cannot be split: {error}") from error
    files = {"train": [train[row] for row in rest], "val": [train[row] for row in held_out], "test": test}
    return from_files("vww", root, files, CLASSES)


def annotation_files(dataset: str, root: Path) -> dict[str, Path]:
    """The lists of instances of train2017 and val2017 below `root`.

    Raises `InputError` where they, or the images' folders, are missing.
    """
    annotations = {part: root / "annotations" / f"instances_{part}.json" for part in ("train2017", "val2017")}
    missing = [str(path.relative_to(root)) for path in annotations.values() if not path.is_file()]
    missing += [f"{part}/" for part in annotations if not (root / part).is_dir()]
    if missing:
        raise InputError(
            f"dataset {dataset!r} lacks {', '.join(missing)} in {root}: unpack annotations_trainval2017.zip, "
            "train2017.zip and val2017.zip from https://cocodataset.org/#download there."
        )
    return annotations


def read_instances(
    dataset: str, annotations: Path, version: object, make: Callable[[dict], dict | list]
) -> dict | list:
    """What `make` makes of a list of instances: half a gigabyte of JSON is read once per unchanged file.

    `version`: changes with what `make` does.  Raises `InputError` for a file of another form.
    """
    key = [str(annotations.resolve()), *size_and_time(annotations), version]
    return remembered(dataset, key, lambda: _made(dataset, annotations, make))


def _made(dataset: str, annotations: Path, make: Callable[[dict], dict | list]) -> dict | list:
    try:
        return make(json.loads(annotations.read_bytes()))
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"dataset {dataset!r}: {annotations} is not COCO's list of instances "
            f"({type(error).__name__}: {error}); unpack it again."
        ) from error


def _labelled(folder: Path, annotations: Path) -> list[tuple[Path, int]]:
    """Images and labels by name."""
    labels = read_instances("vww", annotations, LEAST_SHARE, _labels)
    return [(folder / name, label) for name, label in labels]


def _labels(content: dict) -> list[tuple[str, int]]:
    [person] = [c["id"] for c in content["categories"] if c["name"] == "person"]
    least = {image["id"]: LEAST_SHARE * image["width"] * image["height"] for image in content["images"]}
    shown = {
        box["image_id"]
        for box in content["annotations"]
        if box["category_id"] == person
        and box["bbox"][2] * box["bbox"][3] > least[box["image_id"]]  # x, y, width, height in pixels
    }
    return sorted((Path(image["file_name"]).name, int(image["id"] in shown)) for image in content["images"])


register_dataset(
    Dataset(
        "vww", lambda root: visual_wake_words(root / "coco"),
        Policy(crop_scale=(0.5, 1.0), flip=True),  # a smaller crop may lose the person
    )
)  # fmt: skip
