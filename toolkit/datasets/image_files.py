"""Images in files: decoded when they are asked for, checked and hashed once.  Your own folder is one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.utils.data
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.splits import Policy, Splits, three_way
from toolkit.errors import InputError
from toolkit.files import CACHE, write_atomically

MAX_PIXELS = 40_000_000  # a larger picture is refused before it is decoded: it may be a decompression bomb


class _ImageFiles(torch.utils.data.Dataset):
    """Images that are decoded when they are asked for."""

    decodes = True

    def __init__(self, samples: list[tuple[Path, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return v2.functional.pil_to_tensor(decode(path)), label


def decode(path: Path) -> Image.Image:
    """An RGB image.  Raises `OSError` or `ValueError` for what is none, or larger than `MAX_PIXELS`."""
    # Pillow goes by content, not by name: only formats whose decoders are its own.
    with Image.open(path, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        return image.convert("RGB")


def folder(path: Path) -> Splits:
    """One subfolder of images per class, or `train/`, `val/` and `test/` with such subfolders.

    Without split folders 70 % of each class are to train on and 15 % each for validation and test.
    Raises `InputError` for a folder of another form.
    """
    if not path.is_dir():
        raise InputError(f"folder:{path}: there is no such folder.")
    if (path / "train").is_dir():
        missing = [split for split in ("val", "test") if not (path / split).is_dir()]
        if missing:
            raise InputError(
                f"folder:{path} has train/ but lacks {', '.join(f'{m}/' for m in missing)}: give all three, "
                "or one subfolder per class and no split folders."
            )
        classes = _classes_in(path / "train")
        files = {split: list(_images_in(path / split, classes)) for split in ("train", "val", "test")}
    else:
        classes = _classes_in(path)
        everything = list(_images_in(path, classes))
        try:
            rows = three_way([label for _, label in everything], val=0.15, test=0.15)
        except ValueError as error:  # scikit-learn says which class is too small to be split
            raise InputError(f"folder:{path} cannot be split into train, val and test: {error}") from error
        files = {split: [everything[row] for row in r] for split, r in rows.items()}
    return from_files(f"folder:{path}", path, files, classes)


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


def _images_in(path: Path, classes: list[str]) -> Iterator[tuple[Path, int]]:
    for label, name in enumerate(classes):
        found = [file for file in sorted((path / name).rglob("*")) if file.suffix.lower() in IMG_EXTENSIONS]
        if not found:
            raise InputError(f"folder:{path}: class {name!r} has no images.")
        yield from ((file, label) for file in found)


def from_files(name: str, root: Path, files: dict[str, list[tuple[Path, int]]], classes: list[str]) -> Splits:
    """Leave out what cannot be decoded, and hash the rest; both remembered per unchanged file list.

    `files`: the images and labels of each split, below `root`.  Raises `InputError` where a split is left
    with fewer than two classes.
    """
    listing = [
        (split, str(file.relative_to(root)), label, *size_and_time(file))
        for split, samples in files.items()
        for file, label in samples
    ]
    scan = remembered("scan", [str(root.resolve()), listing], lambda: _scan(root, files))
    broken = set(scan["broken"])
    splits = {}
    for split, samples in files.items():
        good = [(file, label) for file, label in samples if str(file.relative_to(root)) not in broken]
        if len({label for _, label in good}) < 2:
            raise InputError(f"{name}: the {split} split has readable images of fewer than two classes.")
        splits[split] = _ImageFiles(good)
    reasons = [f"{file}: {reason}" for file, reason in scan["broken"].items()]
    return Splits(name=name, **splits, classes=classes, hashes=scan["hashes"], broken=reasons)


def remembered(what: str, key: list, make: Callable[[], dict | list]) -> dict | list:
    """The JSON that `make` gives, kept in the cache under the hash of `key`."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = CACHE / f"{what}-{digest}.json"
    if path.exists():
        return json.loads(path.read_text())
    made = make()
    write_atomically(path, json.dumps(made).encode())
    return made


def size_and_time(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:  # a dangling link; decoding will say so
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _scan(root: Path, files: dict[str, list[tuple[Path, int]]]) -> dict:
    """Decode and hash every image once: `{"hashes": {split: sha256}, "broken": {file: reason}}`."""
    hashes, broken = {}, {}
    for split, samples in files.items():
        digest = hashlib.sha256()
        for file, label in tqdm(samples, desc=f"checking {split} images", leave=False, disable=None):
            relative = str(file.relative_to(root))
            try:
                decode(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken[relative] = str(error) or type(error).__name__
                continue
            digest.update(json.dumps([relative, label]).encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        hashes[split] = digest.hexdigest()
    return {"hashes": hashes, "broken": broken}


register_dataset(
    Dataset(
        "folder", lambda root, path: folder(Path(path).expanduser()),
        Policy(crop_scale=(0.35, 1.0), flip=True), members="PATH",
    )
)  # fmt: skip
