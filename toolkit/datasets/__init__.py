"""Image data sets: embedded, shifted, published ones, or your own folder; with classes, masks or boxes.

`load_dataset(name)` gives `Splits` of raw images; `loader(split, config, ...)` turns them into batches
in the form that a backbone asks for (resolution and normalisation are the backbone's, cropping and
flipping the data set's).  The validation split is never the test split.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.datasets.batches import batch_rows, loader
from toolkit.datasets.coco import visual_wake_words
from toolkit.datasets.coco_boxes import coco_detection
from toolkit.datasets.embedded import digits, textures
from toolkit.datasets.image_files import folder
from toolkit.datasets.mosaics import texture_mosaics
from toolkit.datasets.public import cifar, describable_textures
from toolkit.datasets.scenes import digit_scenes
from toolkit.datasets.segmentation_files import ade20k, voc2012
from toolkit.datasets.shifted import FORM, SHIFTED, clean_name, load_shifted
from toolkit.datasets.splits import POLICIES, Policy, Splits, in_memory
from toolkit.datasets.vtab import VTAB, load_vtab
from toolkit.errors import check_name
from toolkit.files import DOWNLOADS

__all__ = [
    "DATASETS", "POLICIES", "SHIFTED", "VTAB", "Policy", "Splits", "batch_rows", "clean_name", "in_memory",
    "load_dataset", "loader",
]  # fmt: skip

DATASETS = (  # and SHIFTED, vtab:NAME for VTAB, and folder:PATH
    "digits", "textures", "cifar10", "cifar100", "dtd", "vww",
    "mosaics", "voc2012", "ade20k", "digit_scenes", "coco",
)  # fmt: skip


def load_dataset(name: str, root: Path | None = None) -> Splits:
    """Load one of `DATASETS`, a shifted one such as `digits-c:mixed:3`, `vtab:NAME`, or `folder:PATH`.

    `root`: where those that are not embedded lie or are downloaded to (default `data/downloads`); vww, coco,
    ade20k and cifar10-c are put there by hand.  A shifted set is `digits-c`, `textures-c` or `cifar10-c`, a
    corruption and a severity from 1 to 5: see `load_shifted`.  A task of `VTAB`: see `load_vtab`.  mosaics,
    voc2012 and ade20k are for segmentation, digit_scenes and coco for detection.  A folder holds one
    subfolder of images per class, or `train/`, `val/` and `test/` with such subfolders.

    Raises `InputError` for an unknown name, an unusable folder, missing files, or a download that is not
    possible.
    """
    root = root or DOWNLOADS
    base, _, rest = name.partition(":")
    if base == "folder" and rest:
        return folder(Path(rest).expanduser())
    if base == "vtab" and rest:
        return load_vtab(rest, root)
    if base in SHIFTED:
        return load_shifted(name, root)
    check_name(
        "dataset", name, [*DATASETS, *(f"{s}:{rest or FORM}" for s in SHIFTED), "vtab:NAME", "folder:PATH"]
    )
    match name:
        case "digits":
            return digits()
        case "textures":
            return textures()
        case "dtd":
            return describable_textures(root)
        case "mosaics":
            return texture_mosaics()
        case "digit_scenes":
            return digit_scenes()
        case "voc2012":
            return voc2012(root)
        case "ade20k":
            return ade20k(root)
        case "coco":
            return coco_detection(root / "coco")
        case "vww":
            return visual_wake_words(root / "coco")
        case _:
            return cifar(name, root)
