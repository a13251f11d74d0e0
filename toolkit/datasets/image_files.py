"""Images in files: decoded on demand, checked and hashed once.  Your own folder is such a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch.utils.data
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from toolkit import cache
from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.splits import Policy, Splits, Target, hash_target, three_way, two_way
from toolkit.errors import InputError
from toolkit.files import CACHE, sha256_of

MAX_PIXELS = 40_000_000  # larger pictures are refused before decoding: they may be decompression bombs
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises

Sample = tuple[Path, object]  # an image's file, and its label or the source of its dense target


class ImageFiles(torch.utils.data.Dataset):
    """Images decoded on demand; `read` makes the target from the second part of a sample."""

    decodes = True

    def __init__(self, samples: list[Sample], read: Callable[[object], Target] = int):
        self.samples, self.read = samples, read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Target]:
        path, source = self.samples[index]
        return v2.functional.pil_to_tensor(decode(path)), self.read(source)


def decode(path: Path) -> Image.Image:
    """Return an RGB image.  Raises one of `UNREADABLE` for anything else, or more than `MAX_PIXELS`."""
    # Pillow goes by content, not by name: only formats whose decoders are its own.
    with Image.open(path, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")) as image:
        check_size(image)
        return image.convert("RGB")


def check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


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
    listing = [(split, *_stamp(root, sample)) for split, pairs in samples.items() for sample in pairs]
    key = [name, str(root.resolve()), classes, stamp, listing]
    scan = remembered("scan", key, lambda: _scan(root, samples, read, check))
    broken, splits = scan["broken"], {}
    for split, pairs in samples.items():
        good = [(file, source) for file, source in pairs if str(file.relative_to(root)) not in broken]
        if not good:
            first = f": {next(iter(broken.items()))}" if broken else ""
            raise InputError(f"dataset {name!r}: no image of the {split} split in {root} can be read{first}.")
        if read is int and len({label for _, label in good}) < 2:
            raise InputError(f"{name}: the {split} split has readable images of fewer than two classes.")
        splits[split] = ImageFiles(good, read)
    reasons = [f"{file}: {reason}" for file, reason in broken.items()]
    return Splits(name=name, **splits, classes=classes, hashes=scan["hashes"], broken=reasons)


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
    return cache.kept(CACHE / "datasets", {"kind": kind, "key": cache.digest({"key": key})}, make)


def size_and_time(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:  # a dangling link: decoding reports it
        return 0, 0
    return status.st_size, status.st_mtime_ns


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
    """Decode, check and hash every sample: `{"hashes": {split: sha256}, "broken": {file: reason}}`."""
    hashes, broken = {}, {}
    for split, pairs in samples.items():
        digest, data = hashlib.sha256(), ImageFiles(pairs, read)
        for row in tqdm(range(len(data)), desc=f"checking {split} images", leave=False, disable=None):
            path, source = pairs[row]
            name = str(path.relative_to(root))
            try:
                image, target = data[row]
            except InputError:
                raise
            except UNREADABLE as error:
                broken[name] = str(error) or type(error).__name__
                continue
            if check is not None:
                check(path, source, image, target)
            content = sha256_of(path)
            if isinstance(target, int):
                digest.update(json.dumps([name, target]).encode())
                digest.update(bytes.fromhex(content))
            else:
                digest.update(json.dumps([name, content]).encode())
                hash_target(digest, target)
        hashes[split] = digest.hexdigest()
    return {"hashes": hashes, "broken": broken}


# --- your own folder ------------------------------------------------------------------------------


def folder(path: Path) -> Splits:
    """Read one subfolder of images per class, or `train/`, `val/` and `test/` with such subfolders.

    Without split folders 70 % of each class are for training and 15 % each for validation and test.
    Raises `InputError` for a folder of another form.
    """
    if not path.is_dir():
        raise InputError(f"folder:{path}: there is no such folder.")
    if (path / "train").is_dir():
        missing = [f"{split}/" for split in ("val", "test") if not (path / split).is_dir()]
        if missing:
            raise InputError(
                f"folder:{path} has train/ but lacks {', '.join(missing)}: add them, or use one subfolder "
                "per class and no split folders."
            )
        classes = _classes_in(path / "train")
        samples = {split: _images_in(path / split, classes) for split in ("train", "val", "test")}
    else:
        classes = _classes_in(path)
        everything = _images_in(path, classes)
        try:
            rows = three_way([label for _, label in everything], val=0.15, test=0.15)
        except ValueError as error:  # scikit-learn names the class that is too small
            raise InputError(f"folder:{path} cannot be split into train, val and test: {error}") from error
        samples = {split: [everything[row] for row in r] for split, r in rows.items()}
    return from_files(f"folder:{path}", path, samples, classes)


def _classes_in(path: Path) -> list[str]:
    classes = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise InputError(
            f"folder:{path} must hold one subfolder of images per class, at least two; found {found}."
        )
    return classes


def _images_in(path: Path, classes: list[str]) -> list[Sample]:
    samples = []
    for label, name in enumerate(classes):
        files = [file for file in sorted((path / name).rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS]
        if not files:
            raise InputError(f"folder:{path}: class {name!r} has no images.")
        samples += [(file, label) for file in files]
    return samples


register_dataset(
    Dataset(
        "folder", lambda root, path: folder(Path(path).expanduser()),
        Policy(crop_scale=(0.35, 1.0), flip=True), members="PATH",
    )
)  # fmt: skip
