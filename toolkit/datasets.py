"""Image classification data sets: embedded, from torchvision, or your own folder.

`load_dataset(name)` gives `Splits` of raw images; `loader(split, config, ...)` turns them into batches
in the form that a backbone asks for (resolution and normalisation are the backbone's, cropping and
flipping the data set's).  The validation split is never the test split.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from toolkit.errors import InputError, check_name
from toolkit.files import write_atomically
from toolkit.paths import CACHE, DOWNLOADS

DATASETS = ("digits", "textures", "cifar100", "dtd")
MAX_PIXELS = 40_000_000  # a larger picture is refused before it is decoded: it may be a decompression bomb


@dataclass(frozen=True)
class Policy:
    """How a data set's images become a backbone's input; size and normalisation come from the backbone.

    `crop_scale`: training crops cover this share of the image (None: the whole image, squeezed).
    `flip`: mirror half of the training images.  Evaluation resizes and takes the centre.
    """

    crop_scale: tuple[float, float] | None = None
    flip: bool = False


POLICIES = {
    "digits": Policy(),  # a mirrored 2 is no digit
    "textures": Policy(flip=True),
    "cifar100": Policy(crop_scale=(0.8, 1.0), flip=True),
    "dtd": Policy(crop_scale=(0.35, 1.0), flip=True),
    "folder": Policy(crop_scale=(0.35, 1.0), flip=True),
}


@dataclass
class Splits:
    """A data set.  Each split yields `(image, label)`: uint8 (3, H, W) and int.

    `hashes` holds a sha256 of each split's content; `broken` lists the images that were left out and why.
    """

    name: str
    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    hashes: dict[str, str]
    policy: Policy
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split)):,} {split}" for split in ("train", "val", "test"))
        broken = f"; {len(self.broken)} broken images left out" if self.broken else ""
        return f"{self.name}: {len(self.classes)} classes, {sizes}{broken}"


def load_dataset(name: str, root: Path | None = None) -> Splits:
    """Load `digits`, `textures`, `cifar100`, `dtd` or `folder:PATH`.

    `root`: where cifar100 and dtd lie or are downloaded to (default `data/downloads`).  A folder holds
    one subfolder of images per class, or `train/`, `val/` and `test/` with such subfolders.

    Raises `InputError` for an unknown name, an unusable folder, or a download that is not possible.
    """
    root = root or DOWNLOADS
    if name.startswith("folder:"):
        return _folder(Path(name.removeprefix("folder:")).expanduser())
    check_name("dataset", name, [*DATASETS, "folder:PATH"])
    return {"digits": _digits, "textures": _textures, "cifar100": _cifar100, "dtd": _dtd}[name](root)


# ---------------------------------------------------------------------------------------------------
# Batches


def loader(
    split: Dataset,
    config: dict,
    policy: Policy,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    first_batch: int = 0,
    workers: int | None = None,
) -> DataLoader:
    """Batches `(images, labels)`: float (B, 3, H, W) as `config` asks, and int64 (B,).

    `config` has timm's keys (`backbones.data_config(model)`).  With a `seed` the images are shuffled
    and augmented, without they come in order and unchanged.  The shuffle is drawn from (seed, epoch)
    and each image's augmentation from (seed, epoch, index): whichever worker loads it, and whether or
    not the epoch is entered at `first_batch` after an interruption, an image comes out the same.
    `workers`: processes that load; None takes one per core, up to four, where images are decoded or cropped.
    """
    if workers is None:
        workers = 0 if policy.crop_scale is None else min(4, os.cpu_count() or 1)
    if seed is None:
        order = list(range(len(split)))
    else:
        order = torch.randperm(len(split), generator=_generator(seed, epoch)).tolist()
    rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return DataLoader(
        _Batches(split, config, policy, seed, epoch),
        sampler=rows[first_batch:],
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that making an iterator does not draw from the global one
    )


class _Batches(Dataset):
    """Indexed by the rows of a batch.  What is alike for all its images is done once, on the stack."""

    def __init__(self, split: Dataset, config: dict, policy: Policy, seed: int | None, epoch: int):
        self.split, self.policy, self.seed, self.epoch = split, policy, seed, epoch
        size = tuple(config["input_size"][1:])
        interpolation = v2.InterpolationMode(config["interpolation"])
        resize = functools.partial(v2.Resize, interpolation=interpolation, antialias=True)
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        if policy.crop_scale is None:  # images of one size, taken whole
            self.frame, finish = None, [resize(size), *finish]
        elif seed is not None:
            self.frame = v2.RandomResizedCrop(size, scale=policy.crop_scale, interpolation=interpolation)
        else:
            self.frame = v2.Compose([resize(round(max(size) / config["crop_pct"])), v2.CenterCrop(size)])
        self.finish = v2.Compose(finish)
        if policy.flip and seed is not None:
            self.flipped = torch.rand(len(split), generator=_generator(seed, epoch, "flip")) < 0.5
        else:
            self.flipped = torch.zeros(len(split), dtype=torch.bool)

    def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*(self.split[row] for row in rows))
        if self.frame is not None:
            images = [self._framed(image, row) for image, row in zip(images, rows)]
        batch = self.finish(torch.stack(images))  # (B, 3, H, W)
        flipped = self.flipped[rows]
        batch[flipped] = batch[flipped].flip(-1)
        return batch, torch.tensor(labels)

    def _framed(self, image: torch.Tensor, row: int) -> torch.Tensor:
        if self.seed is None:
            return self.frame(image)
        # Not torch.manual_seed: that would reseed the GPU's generator, and with it dropout, too.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mix(self.seed, self.epoch, row))
        framed = self.frame(image)
        torch.default_generator.set_state(before)
        return framed


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*key))


def _mix(*key: object) -> int:
    """One 63-bit seed from several values."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---------------------------------------------------------------------------------------------------
# Embedded


class _InMemory(Dataset):
    """Images as one uint8 array (N, 3, H, W), or (N, H, W) for grey ones."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = np.ascontiguousarray(images), np.ascontiguousarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[index])
        return (image.expand(3, -1, -1) if image.ndim == 2 else image), int(self.labels[index])

    def sha256(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        digest.update(self.images)
        digest.update(self.labels)
        return digest.hexdigest()


def in_memory(
    name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], classes: list[str], policy: Policy
) -> Splits:
    """Splits from arrays: `parts` maps train, val and test to images and labels.

    Images are uint8, all of one size: (N, 3, H, W), or (N, H, W) for grey ones; labels int (N,).
    """
    splits = {split: _InMemory(*arrays) for split, arrays in parts.items()}
    hashes = {split: data.sha256() for split, data in splits.items()}
    return Splits(name=name, **splits, classes=classes, hashes=hashes, policy=policy)


def _three_way(labels: Sequence[int], val: float, test: float) -> dict[str, np.ndarray]:
    """Stratified indices of a fixed shuffle; `val` and `test` are shares of the whole."""
    everything = np.arange(len(labels))
    labels = np.asarray(labels)
    rest, test_rows = train_test_split(everything, test_size=test, stratify=labels, random_state=0)
    train_rows, val_rows = train_test_split(
        rest, test_size=val / (1 - test), stratify=labels[rest], random_state=0
    )
    return {"train": np.sort(train_rows), "val": np.sort(val_rows), "test": np.sort(test_rows)}


def _digits(root: Path) -> Splits:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,077 train, 270 val, 450 test."""
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rows = _three_way(bunch.target, val=0.15, test=0.25)
    parts = {split: (images[r], bunch.target[r]) for split, r in rows.items()}
    return in_memory("digits", parts, [str(digit) for digit in range(10)], POLICIES["digits"])


# Photographs that scikit-image ships inside its package: no download.
TEXTURE_PHOTOGRAPHS = (
    "astronaut", "brick", "cat", "cell", "coffee", "coins", "grass", "gravel",
    "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
TEXTURE_TILE, TEXTURE_CROP = 64, 48  # pixels
TEXTURE_CROPS = {"train": 72, "val": 18, "test": 30}  # per class


def _textures(root: Path) -> Splits:
    """Grey crops of 48 px from photographs: which photograph is it from?

    Each photograph is cut into tiles of 64 px; a tile belongs to one split, and every crop lies inside
    one tile, so that no pixel of a test crop was ever trained on.  Grey, so that colour does not tell.
    """
    rng = np.random.default_rng(0)
    parts: dict[str, tuple[list, list]] = {split: ([], []) for split in TEXTURE_CROPS}
    for label, name in enumerate(TEXTURE_PHOTOGRAPHS):
        photograph = getattr(skimage.data, name)()
        grey = np.asarray(Image.fromarray(photograph).convert("L"))
        for split, tiles in _assign_tiles(rng, grey.shape).items():
            room = TEXTURE_TILE - TEXTURE_CROP + 1  # positions of a crop in a tile, per axis
            for place in rng.choice(len(tiles) * room**2, TEXTURE_CROPS[split], replace=False):
                tile, offset = divmod(place, room**2)
                y, x = tiles[tile] + divmod(offset, room)
                parts[split][0].append(grey[y : y + TEXTURE_CROP, x : x + TEXTURE_CROP])
                parts[split][1].append(label)
    arrays = {split: (np.stack(crops), np.array(labels)) for split, (crops, labels) in parts.items()}
    return in_memory("textures", arrays, list(TEXTURE_PHOTOGRAPHS), POLICIES["textures"])


def _assign_tiles(rng: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Top left corners (n, 2) of the tiles of each split: a quarter test, an eighth val, the rest train."""
    rows, columns = shape[0] // TEXTURE_TILE, shape[1] // TEXTURE_TILE
    corners = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
    corners = rng.permutation(corners * TEXTURE_TILE)
    test, val = max(1, len(corners) // 4), max(1, len(corners) // 8)
    return {"test": corners[:test], "val": corners[test : test + val], "train": corners[test + val :]}


# ---------------------------------------------------------------------------------------------------
# Through torchvision


def _fetch(dataset: str, archive: str, url: str, folder: Path, build: Callable[[bool], object]) -> object:
    """`build(download=False)`, else `build(download=True)`, else one error that says what to put where."""
    try:
        return build(False)
    except (RuntimeError, OSError):  # torchvision: "Dataset not found or corrupted"; half unpacked
        pass
    try:
        return build(True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        raise InputError(
            f"dataset {dataset!r} is not in {folder} and could not be downloaded ({error}). "
            f"Put {archive} from {url} into {folder}; it is unpacked there."
        ) from error


def _cifar100(root: Path) -> Splits:
    """CIFAR-100: 45,000 train and 5,000 val out of the training set, the 10,000 test images."""

    def build(train: bool):
        return _fetch(
            "cifar100", "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/", root,
            lambda download: torchvision.datasets.CIFAR100(root, train=train, download=download),
        )  # fmt: skip

    root.mkdir(parents=True, exist_ok=True)
    train, test = build(True), build(False)
    train_rows, val_rows = train_test_split(
        np.arange(len(train)), test_size=0.1, stratify=train.targets, random_state=0
    )
    images, labels = train.data.transpose(0, 3, 1, 2), np.array(train.targets)
    parts = {
        "train": (images[np.sort(train_rows)], labels[np.sort(train_rows)]),
        "val": (images[np.sort(val_rows)], labels[np.sort(val_rows)]),
        "test": (test.data.transpose(0, 3, 1, 2), np.array(test.targets)),
    }
    return in_memory("cifar100", parts, train.classes, POLICIES["cifar100"])


def _dtd(root: Path) -> Splits:
    """Describable Textures (Cimpoi et al. 2014), partition 1: its own train, val and test, 1,880 each."""
    root.mkdir(parents=True, exist_ok=True)
    listed = {
        split: _fetch(
            "dtd", "dtd-r1.0.1.tar.gz", "https://www.robots.ox.ac.uk/~vgg/data/dtd/", root / "dtd",
            lambda download, split=split: torchvision.datasets.DTD(
                root, split=split, partition=1, download=download
            ),
        )
        for split in ("train", "val", "test")
    }  # fmt: skip
    files = {split: list(zip(data._image_files, data._labels)) for split, data in listed.items()}
    return _from_files("dtd", root / "dtd", files, listed["train"].classes, POLICIES["dtd"])


# ---------------------------------------------------------------------------------------------------
# Folders of images


class _ImageFiles(Dataset):
    """Images that are decoded when they are asked for."""

    def __init__(self, samples: list[tuple[Path, int]]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.samples[index]
        return v2.functional.pil_to_tensor(_decode(path)), label


def _decode(path: Path) -> Image.Image:
    # Pillow goes by content, not by name: only formats whose decoders are its own.
    with Image.open(path, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        return image.convert("RGB")


def _folder(path: Path) -> Splits:
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
            rows = _three_way([label for _, label in everything], val=0.15, test=0.15)
        except ValueError as error:  # scikit-learn says which class is too small to be split
            raise InputError(f"folder:{path} cannot be split into train, val and test: {error}") from error
        files = {split: [everything[row] for row in r] for split, r in rows.items()}
    return _from_files(f"folder:{path}", path, files, classes, POLICIES["folder"])


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
        found = [
            file
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS
        ]
        if not found:
            raise InputError(f"folder:{path}: class {name!r} has no images.")
        yield from ((file, label) for file in found)


def _from_files(
    name: str, root: Path, files: dict[str, list[tuple[Path, int]]], classes: list[str], policy: Policy
) -> Splits:
    """Leave out what cannot be decoded, and hash the rest; both remembered per unchanged file list."""
    listing = [
        (split, str(file.relative_to(root)), label, *_size_and_time(file))
        for split, samples in files.items()
        for file, label in samples
    ]
    key = hashlib.sha256(json.dumps([str(root.resolve()), listing]).encode()).hexdigest()[:24]
    remembered = CACHE / f"scan-{key}.json"
    if remembered.exists():
        scan = json.loads(remembered.read_text())
    else:
        scan = _scan(root, files)
        write_atomically(remembered, json.dumps(scan).encode())
    broken = set(scan["broken"])
    splits = {}
    for split, samples in files.items():
        good = [(file, label) for file, label in samples if str(file.relative_to(root)) not in broken]
        if len({label for _, label in good}) < 2:
            raise InputError(f"{name}: the {split} split has readable images of fewer than two classes.")
        splits[split] = _ImageFiles(good)
    reasons = [f"{file}: {reason}" for file, reason in scan["broken"].items()]
    return Splits(name=name, **splits, classes=classes, hashes=scan["hashes"], policy=policy, broken=reasons)


def _size_and_time(file: Path) -> tuple[int, int]:
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
        for file, label in samples:
            relative = str(file.relative_to(root))
            try:
                _decode(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                broken[relative] = str(error) or type(error).__name__
                continue
            digest.update(json.dumps([relative, label]).encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        hashes[split] = digest.hexdigest()
    return {"hashes": hashes, "broken": broken}
