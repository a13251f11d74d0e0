"""Visual Wake Words (Chowdhery et al. 2019, arXiv 1906.05721) from the files of COCO 2017."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.datasets.image_files import from_files, remembered, size_and_time
from toolkit.datasets.splits import POLICIES, Splits, two_way
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
    annotations = {part: root / "annotations" / f"instances_{part}.json" for part in ("train2017", "val2017")}
    missing = [str(path.relative_to(root)) for path in annotations.values() if not path.is_file()]
    missing += [f"{part}/" for part in annotations if not (root / part).is_dir()]
    if missing:
        raise InputError(
            f"dataset 'vww' lacks {', '.join(missing)} in {root}: unpack annotations_trainval2017.zip, "
            "train2017.zip and val2017.zip from https://cocodataset.org/#download there."
        )
    train, test = (_labelled(root / part, path) for part, path in annotations.items())
    try:
        rest, held_out = two_way([label for _, label in train], 0.1)
    except ValueError as error:
        raise InputError(f"dataset 'vww': train2017 cannot be split: {error}") from error
    files = {"train": [train[row] for row in rest], "val": [train[row] for row in held_out], "test": test}
    return from_files("vww", root, files, CLASSES, POLICIES["vww"])


def _labelled(folder: Path, annotations: Path) -> list[tuple[Path, int]]:
    """Images and labels by name; half a gigabyte of JSON is read once per unchanged file."""
    key = [str(annotations.resolve()), *size_and_time(annotations), LEAST_SHARE]
    labels = remembered("vww", key, lambda: _labels(annotations))
    return [(folder / name, label) for name, label in labels]


def _labels(annotations: Path) -> list[tuple[str, int]]:
    try:
        content = json.loads(annotations.read_bytes())
        [person] = [c["id"] for c in content["categories"] if c["name"] == "person"]
        least = {image["id"]: LEAST_SHARE * image["width"] * image["height"] for image in content["images"]}
        shown = {
            box["image_id"]
            for box in content["annotations"]
            if box["category_id"] == person
            and box["bbox"][2] * box["bbox"][3] > least[box["image_id"]]  # x, y, width, height in pixels
        }
        return sorted(
            (Path(image["file_name"]).name, int(image["id"] in shown)) for image in content["images"]
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"dataset 'vww': {annotations} is not COCO's list of instances "
            f"({type(error).__name__}: {error}); unpack it again."
        ) from error
