"""Images in files with dense targets: decoded when they are asked for, checked and hashed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from toolkit.datasets.image_files import decode, remembered, size_and_time
from toolkit.datasets.splits import Splits, hash_target, two_way
from toolkit.errors import InputError
from toolkit.files import sha256_of

Target = torch.Tensor | dict[str, torch.Tensor]


class DenseFiles(Dataset):
    """`samples`: an image's file and what `read` makes its target of: a mask's file, or boxes."""

    decodes = True

    def __init__(self, samples: list[tuple[Path, object]], read: Callable[[object], Target]):
        self.samples, self.read = samples, read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        path, source = self.samples[index]
        return v2.functional.pil_to_tensor(decode(path)), self.read(source)


def held_out(name: str, samples: list) -> dict[str, list]:
    """Nine tenths to train on and a tenth for validation, of a fixed shuffle."""
    try:
        rest, tenth = two_way([0] * len(samples), 0.1)
    except ValueError as error:
        raise InputError(
            f"dataset {name!r}: {len(samples)} images to train on are too few to be split."
        ) from error
    return {"train": [samples[row] for row in rest], "val": [samples[row] for row in tenth]}


def dense_splits(
    name: str,
    root: Path,
    samples: dict[str, list[tuple[Path, object]]],
    read: Callable[[object], Target],
    check: Callable[[Path, object, torch.Tensor, Target], None],
    *,
    classes: list[str],
    stamp: list,
) -> Splits:
    """Leave out images that cannot be decoded, and hash the rest; both remembered per unchanged file list.

    `samples`: of each split, below `root`; see `DenseFiles`.  `check(path, source, image, target)` raises
    `InputError` for a target that does not fit its image or its classes.  `stamp`: what else the targets
    depend on.  Raises `InputError` where a split is left without images.
    """
    listing = [
        (split, *(entry for file in sample if isinstance(file, Path) for entry in _stamped(root, file)))
        for split, pairs in samples.items()
        for sample in pairs
    ]
    key = [name, str(root.resolve()), classes, stamp, listing]
    scan = remembered("dense-scan", key, lambda: _scan(root, samples, read, check))
    broken, splits = scan["broken"], {}
    for split, pairs in samples.items():
        good = [sample for sample in pairs if _below(root, sample[0]) not in broken]
        if not good:
            first = f": {next(iter(broken.items()))}" if broken else ""
            raise InputError(f"dataset {name!r}: no image of the {split} split in {root} can be read{first}.")
        splits[split] = DenseFiles(good, read)
    return Splits(
        name=name, **splits, classes=classes, hashes=scan["hashes"], 
        broken=[f"{file}: {reason}" for file, reason in broken.items()],
    )  # fmt: skip


def _below(root: Path, file: Path) -> str:
    return str(file.relative_to(root))


def _stamped(root: Path, file: Path) -> tuple[str, int, int]:
    return _below(root, file), *size_and_time(file)


def _scan(
    root: Path,
    samples: dict[str, list[tuple[Path, object]]],
    read: Callable[[object], Target],
    check: Callable[[Path, object, torch.Tensor, Target], None],
) -> dict:
    """Decode, check and hash all once: `{"hashes": {split: sha256}, "broken": {file: reason}}`."""
    hashes, broken = {}, {}
    for split, pairs in samples.items():
        digest, data = hashlib.sha256(), DenseFiles(pairs, read)
        for row in tqdm(range(len(data)), desc=f"checking {split} images", leave=False, disable=None):
            path, source = pairs[row]
            try:
                image, target = data[row]
            except InputError:
                raise
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken[_below(root, path)] = str(error) or type(error).__name__
                continue
            check(path, source, image, target)
            digest.update(json.dumps([_below(root, path), sha256_of(path)]).encode())
            hash_target(digest, target)
        hashes[split] = digest.hexdigest()
    return {"hashes": hashes, "broken": broken}
