"""Image data sets: embedded, shifted or published ones, or your own folder; with classes, masks or boxes.

`load_dataset(name)` returns `Splits` of raw images; `loader(split, config, ...)` turns them into batches in
the form that a backbone needs (resolution and normalisation are the backbone's, cropping and flipping the
data set's).  The validation split is never the test split.

Every data set is one entry of `DATASETS`; `register_dataset` adds another.
"""

from toolkit.datasets import (  # noqa: F401  (each of them registers its data sets)
    coco,
    composed,
    corruptions,
    elpv,
    embedded,
    folder,
    public,
    segmentation_files,
    vtab,
)
from toolkit.datasets.batches import batch_rows, loader
from toolkit.datasets.catalog import (
    DATASETS,
    Dataset,
    Prompt,
    find_dataset,
    load_dataset,
    register_dataset,
    task_of,
)  # fmt: skip
from toolkit.datasets.splits import Policy, Splits, in_memory

__all__ = [
    "DATASETS", "Dataset", "Policy", "Prompt", "Splits", "batch_rows", "find_dataset", "in_memory",
    "load_dataset", "loader", "register_dataset", "task_of",
]  # fmt: skip
