"""ELPV: 2,624 photographs of solar cells in electroluminescence, functional or defective.

Buerhop-Lutz et al. 2018, github.com/zae-bayern/elpv-dataset; the images are licensed CC-BY-NC-SA-4.0, for
non-commercial use only.  They are read from the package of the Python Package Index, which is not imported.

The data have no official split, and near-twins: 302 images have a partner whose high-passed picture has a
correlation above 0.9 with theirs (sister wafers, repeated exposures), not always of the same label.  Images
with a correlation above 0.7 are connected, and whole groups of connected images belong to one split:
`elpv_split.txt` has its number, 0 train, 1 val or 2 test, for each line of the list.  Two thirds are
functional, so read the balanced accuracy.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from toolkit.datasets.catalog import Dataset, Prompt, register_dataset
from toolkit.datasets.image_files import from_files
from toolkit.datasets.splits import SPLITS, Policy, Splits
from toolkit.errors import InputError
from toolkit.files import sha256_of

PIP = "pip install --no-deps elpv-dataset==1.0.0.post1"
LICENCE = "images CC-BY-NC-SA-4.0, for non-commercial use only"
LIST_SHA256 = "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d"
CLASSES = ["functional", "defective"]  # probability of a defect 0 or 1/3, and 2/3 or 1


def elpv(root: Path) -> Splits:
    """1,575 train, 394 val and 655 test images of 300 x 300 pixels, no twins on two sides."""
    try:
        folder = Path(importlib.metadata.distribution("elpv-dataset").locate_file("elpv_dataset/data"))
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"dataset 'elpv' is in a package of 91 MB ({LICENCE}): `{PIP}`.") from None
    listing = folder / "labels.csv"
    if not listing.exists() or sha256_of(listing) != LIST_SHA256:
        raise InputError(f"{listing} is not the list that was published; get it by `{PIP}`.")
    numbers = (Path(__file__).parent / "elpv_split.txt").read_text().replace("\n", "")
    samples = {split: [] for split in SPLITS}
    for number, line in zip(numbers, listing.read_text().splitlines(), strict=True):
        file, probability, _ = line.split()
        samples[SPLITS[int(number)]].append((folder / file, int(float(probability) > 0.5)))
    splits = from_files("elpv", folder, samples, CLASSES)
    splits.notes.append(LICENCE)
    return splits


register_dataset(
    Dataset(
        "elpv", elpv, Policy(flip=True), classes=2, train_images=1_575,
        prompt=Prompt(("an electroluminescence photo of a {} solar cell.",), "solar cell"),
    )
)  # fmt: skip
