"""Your own pictures: a folder with one subfolder per class, or split folders of such subfolders."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

from toolkit.datasets.catalog import Dataset, register_dataset
from toolkit.datasets.image_files import checked, scanned
from toolkit.datasets.pictures import is_picture
from toolkit.datasets.splits import LEAST_IMAGES, Policy, Splits, deal
from toolkit.errors import InputError, printable

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
IGNORED = ("__macosx", "thumbs.db", "@eadir", "$recycle.bin")  # and whatever is hidden


def folder(path: Path) -> Splits:
    """Read one subfolder of images per class, or folders of such subfolders for train, val and test.

    Without split folders 70 % of each class are for training and 15 % each for validation and test; a class
    of fewer than `LEAST_IMAGES` stays in training.  Linked folders are followed once.
    Raises `InputError` for a folder of another form.
    """
    if not os.path.isdir(path):  # False also where it is not permitted to look
        raise InputError(f"folder:{path}: there is no such folder.")
    name = f"folder:{path}"
    parts = _split_folders(path) or {"all": path}
    folders = {part: _subfolders(top) for part, top in parts.items()}
    walk = _Walk([entry for entries in folders.values() for entry in entries])
    files = {
        part: [
            (file, printable(entry.name, breaks=False)) for entry in entries for file in walk.pictures(entry)
        ]
        for part, entries in folders.items()
    }
    for top in parts.values():
        walk.note_strays(top)
    scan = scanned(path, {part: [(file, 0) for file, _ in pairs] for part, pairs in files.items()})
    scan["broken"] |= {str(Path(place).relative_to(path)): reason for place, reason in walk.left_out.items()}

    readable = {
        part: [(file, kind) for file, kind in pairs if str(file.relative_to(path)) not in scan["broken"]]
        for part, pairs in files.items()
    }
    holders = defaultdict(list)  # the parts that have readable images of a class
    for part, pairs in readable.items():
        for kind in {kind for _, kind in pairs}:
            holders[kind].append(part)
    classes = sorted(holders)
    every = {printable(entry.name, breaks=False) for entries in folders.values() for entry in entries}
    empty = _quoted(sorted(every - set(classes)))
    if len(classes) < 2:
        found = "only " + _quoted(classes) if classes else "none"
        without = f"; no image can be read in {empty}" if empty else ""
        broken = "".join(f"\n  {file}: {reason}" for file, reason in list(scan["broken"].items())[:5])
        raise InputError(
            f"{name} must hold one subfolder of images per class, at least two; found {found}{without}.  Add "
            f"classes, or name the folder that holds their folders.{broken}"
        )
    notes = [f"left out as classes, without a readable image of their own: {empty}"] if empty else []
    labels = {kind: label for label, kind in enumerate(classes)}
    samples = {part: [(file, labels[kind]) for file, kind in pairs] for part, pairs in readable.items()}
    if "all" in parts:
        samples, few = _dealt(name, samples["all"], classes)
        if few:
            notes.append(f"fewer than {LEAST_IMAGES} images, all kept in training: {_quoted(few)}")
    else:
        _check_classes(name, holders)
    splits = checked(name, path, samples, classes, scan)
    splits.notes += notes
    return splits


def _split_folders(path: Path) -> dict[str, Path] | None:
    """The folders of train, val and test; None if the subfolders are classes.

    A class may be called "train": its folder holds images, or no other has the name of a split.
    """
    entries = _subfolders(path)
    named = {
        split: [entry for entry in entries if entry.name.lower() in names]
        for split, names in SPLIT_NAMES.items()
    }
    count = sum(map(len, named.values()))
    nested = any(_subfolders(entry) for entry in named["train"])
    if not named["train"] or not (count == len(entries) or (nested and (named["val"] or named["test"]))):
        return None
    missing = [f"{split}/" for split, found in named.items() if not found]
    if missing:
        raise InputError(
            f"folder:{path} has train/ but lacks {', '.join(missing)}: add them, or use one subfolder per "
            "class and no split folders."
        )
    places = {entry.resolve() for found in named.values() for entry in found}
    if count > len(named) or len(places) < count:
        found = ", ".join(f"{entry.name}/" for entries in named.values() for entry in entries)
        raise InputError(
            f"folder:{path} must have one folder each for train, val and test, and no links between them; it "
            f"has {found}."
        )
    return {split: found[0] for split, found in named.items()}


def _check_classes(name: str, holders: dict[str, list[str]]) -> None:
    """Raise `InputError` for classes that are not in every split."""
    lines = [
        f"{kind!r} only in {' and '.join(f'{part}/' for part in parts)}"
        for kind, parts in sorted(holders.items())
        if len(parts) < len(SPLIT_NAMES)
    ]
    if lines:
        raise InputError(
            f"{name}: every class needs readable images in train/, val/ and test/.  Add, rename or remove: "
            f"{', '.join(lines)}."
        )


def _dealt(
    name: str, samples: list[tuple[Path, int]], classes: list[str]
) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    """Samples of train, val and test, and the classes of which all images stay in training."""
    labels = [label for _, label in samples]
    counts = Counter(labels)
    few = [kind for label, kind in enumerate(classes) if counts[label] < LEAST_IMAGES]
    if len(classes) - len(few) < 2:
        raise InputError(
            f"{name} cannot be split into train, val and test: {_quoted(few)} "
            f"have fewer than {LEAST_IMAGES} images; at least two classes need as many."
        )
    rows = deal(labels, val=0.15, test=0.15)
    return {split: [samples[row] for row in found] for split, found in rows.items()}, few


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED


def _subfolders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir() and not _ignored(entry.name))
    except OSError as error:
        raise InputError(f"folder:{path} cannot be read: {error.strerror or error}.") from error


class _Walk:
    """Finds pictures below folders; no image is found twice through links to folders."""

    def __init__(self, folders: list[Path]):
        self.entered, self.above = set(), set()  # real folders, and all folders around them
        self.left_out: dict[str, str] = {}  # places, with the reason
        self.folders = {folder for folder in sorted(folders, key=os.path.islink) if self._enter(folder)}

    def _enter(self, folder: Path) -> bool:
        """Note a folder; False if it is, lies in, or contains one that has been noted."""
        place = folder.resolve()
        if place in self.above or not self.entered.isdisjoint([place, *place.parents]):
            return False
        self.entered.add(place)
        self.above.update(place.parents)
        return True

    def pictures(self, folder: Path) -> list[Path]:
        if folder not in self.folders:
            return []
        found = []
        for place, folders, files in os.walk(folder, onerror=self._note, followlinks=True):
            here = Path(place)
            folders[:] = [
                name
                for name in sorted(folders)
                if not _ignored(name) and (not (here / name).is_symlink() or self._enter(here / name))
            ]
            found += [here / name for name in files if not _ignored(name) and is_picture(here / name)]
        return sorted(found)

    def note_strays(self, top: Path) -> None:
        """Note the pictures next to the folders of classes."""
        for file in sorted(top.iterdir()):
            if not file.is_dir() and not _ignored(file.name) and is_picture(file):
                self.left_out[str(file)] = "in no class folder"

    def _note(self, error: OSError) -> None:
        self.left_out[error.filename] = error.strerror


register_dataset(
    Dataset(
        "folder", lambda root, path: folder(Path(path).expanduser()),
        Policy(crop_scale=(0.35, 1.0), flip=True), members="PATH",
    )
)  # fmt: skip
