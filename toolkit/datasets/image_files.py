"""Images in files: checked and hashed once, decoded on demand if they are still the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import PIL
import torch.utils.data
from torchvision.transforms import v2
from tqdm import tqdm

from toolkit import cache
from toolkit.datasets import pictures
from toolkit.datasets.splits import Splits, Target, hash_target, two_way
from toolkit.errors import FileError, InputError, one_line, printable
from toolkit.files import CACHE, digest

Sample = tuple[Path, object]  # an image's file, and its label or the source of its dense target


class ImageFiles(torch.utils.data.Dataset):
    """Images decoded on demand; `read` makes the target from the second part of a sample.

    `digests`: of each sample, as `_digest_of` returns it.  A sample that is another one by now raises
    `FileError`: nothing trains on other data under the hash of these.
    """

    decodes = True

    def __init__(self, samples: list[Sample], digests: list[str], read: Callable[[object], Target] = int):
        self.samples, self.digests, self.read = samples, digests, read

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def labels(self) -> list[object]:
        """The second parts of the samples: labels, or the sources of dense targets."""
        return [source for _, source in self.samples]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        path, source = self.samples[index]
        try:
            content, target = pictures.read(path), self.read(source)
            if _digest_of(content, target) != self.digests[index]:
                raise ValueError("its content is another one")
            return v2.functional.pil_to_tensor(pictures.decode(path, content)), target
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise FileError(
                f"{path} has changed since the data set was checked ({reason}); bring it back, or load the "
                "data set again and start another run."
            ) from error


def from_files(
    name: str,
    root: Path,
    samples: dict[str, list[Sample]],
    classes: list[str],
    read: Callable[[object], Target] = int,
    check: Callable[[Path, object, torch.Tensor, Target], None] | None = None,
    stamp: object = None,
) -> Splits:
    """Leave out unreadable images and hash the rest, once per unchanged list of files.

    `samples`: those of each split, with files below `root`.  `check(path, source, image, target)` raises
    `InputError` for a target that does not fit its image or its classes.  `stamp`: whatever else targets
    depend on.  Raises `InputError` for a split without images or, with labels, with only one class.
    """
    return checked(
        name, root, samples, classes, scanned(root, samples, read, check, [name, classes, stamp]), read
    )


def scanned(
    root: Path,
    samples: dict[str, list[Sample]],
    read: Callable[[object], Target] = int,
    check: Callable[[Path, object, torch.Tensor, Target], None] | None = None,
    stamp: object = None,
) -> dict:
    """Decode, check and hash every sample, once per unchanged list of files: see `_scan`."""
    listing = [(split, *_stamp(root, sample)) for split, pairs in samples.items() for sample in pairs]
    key = [str(root.resolve()), stamp, listing, PIL.__version__, pictures.formats()]
    return remembered("pictures", key, lambda: _scan(root, samples, read, check))


def checked(
    name: str,
    root: Path,
    samples: dict[str, list[Sample]],
    classes: list[str],
    scan: dict,
    read: Callable[[object], Target] = int,
) -> Splits:
    """Splits of the samples that `scan`, made by `scanned`, could read."""
    broken, splits, hashes = scan["broken"], {}, {}
    for split, pairs in samples.items():
        good = [(file, source) for file, source in pairs if str(file.relative_to(root)) not in broken]
        if not good:
            first = f": {next(iter(broken.items()))}" if broken else ""
            raise InputError(f"dataset {name!r}: no image of the {split} split in {root} can be read{first}.")
        if read is int and len({label for _, label in good}) < 2:
            raise InputError(f"{name}: the {split} split has readable images of fewer than two classes.")
        digests = [scan["contents"][str(file.relative_to(root))] for file, _ in good]
        splits[split] = ImageFiles(good, digests, read)
        hashes[split] = _hash_of(root, good, digests, labelled=read is int)
    reasons = [printable(f"{file}: {reason}", breaks=False) for file, reason in broken.items()]
    notes = []
    if scan["scaled"]:
        count = f"{scan['scaled']:,} grey image" + "s" * (scan["scaled"] > 1)
        notes = [f"{count} of more than 8 bits scaled by the range of the values"]
    return Splits(name=name, **splits, classes=classes, hashes=hashes, broken=reasons, notes=notes)


def held_out(name: str, samples: list[Sample]) -> dict[str, list[Sample]]:
    """Split off a tenth for validation, by a fixed shuffle that is stratified by labels if there are any."""
    labels = [source if isinstance(source, int) else 0 for _, source in samples]
    try:
        train, val = two_way(labels, 0.1)
    except ValueError as error:
        raise InputError(f"dataset {name!r}: the training images cannot be split: {error}") from error
    return {"train": [samples[row] for row in train], "val": [samples[row] for row in val]}


def remembered(kind: str, key: object, make: Callable[[], dict | list]) -> dict | list:
    """Return what `make` returns, which is JSON, from the cache if the question is the same."""
    return cache.kept(CACHE / "datasets", {"kind": kind, "key": digest(key)}, make)


def size_and_time(file: Path) -> tuple[int, ...]:
    """What changes when a file does: its size, and the times of its content and of its entry."""
    if not os.access(file, os.R_OK):  # a dangling link, or not permitted: decoding reports it
        return (0,)
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _stamp(root: Path, sample: Sample) -> list:
    """What tells whether a sample has changed: its label, or name, size and time of its files."""
    stamp = []
    for part in sample:
        if isinstance(part, Path):
            stamp += [str(part.relative_to(root)), *size_and_time(part)]
        elif isinstance(part, int):
            stamp.append(part)
    return stamp


def _scan(root: Path, samples: dict[str, list[Sample]], read: Callable, check: Callable | None) -> dict:
    """Decode, check and hash every sample.

    `{"broken": {file: reason}, "scaled": number of greys of more than 8 bits, "contents": {file: digest}}`.
    """
    contents, broken, scaled = {}, {}, 0
    for split, pairs in samples.items():
        for path, source in tqdm(pairs, desc=f"checking {split} images", leave=False, disable=None):
            name = str(path.relative_to(root))
            try:
                content = pictures.read(path)
                image, target = pictures.decode(path, content), read(source)
            except InputError:
                raise
            except Exception as error:  # damaged content leads decoders to errors of any type
                broken[name] = getattr(error, "strerror", None) or one_line(error)
                continue
            scaled += "scaled" in image.info
            if check is not None:
                check(path, source, v2.functional.pil_to_tensor(image), target)
            contents[name] = _digest_of(content, target)
    return {"broken": broken, "scaled": scaled, "contents": contents}


def _digest_of(content: bytes, target: Target) -> str:
    """The sha256 of a file and its dense target, if there is one; labels are not part of it."""
    found = hashlib.sha256(content)
    if not isinstance(target, int):
        hash_target(found, target)
    return found.hexdigest()


def _hash_of(root: Path, samples: list[Sample], digests: list[str], labelled: bool) -> str:
    """The sha256 of a split: names, labels and contents."""
    found = hashlib.sha256()
    for (path, source), sample in zip(samples, digests):
        label = [int(source)] if labelled else []
        found.update(json.dumps([str(path.relative_to(root)), *label]).encode())
        found.update(bytes.fromhex(sample))
    return found.hexdigest()
