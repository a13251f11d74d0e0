"""Folders as people have them."""

import io
import os
import shutil

import pytest
import torch
from pictures import CONFIG, write_image
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from toolkit.budget import TensorMemory
from toolkit.datasets import Policy, load_dataset, loader
from toolkit.errors import InputError


def write_class(folder, count=10, suffix="png"):
    for number in range(count):
        write_image(folder / f"{number}.{suffix}", seed=number)


def files_of(splits) -> list[str]:
    return [str(path) for split in (splits.train, splits.val, splits.test) for path, _ in split.samples]


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "my photos"
    for name in ("cat", "dog"):
        write_class(root / name)
    return root


def test_one_folder_with_everything_that_people_have(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    write_class(elsewhere, 2)
    (elsewhere / "back").symlink_to(photos)
    write_class(photos / "dog" / "puppies" / "brown", 2)
    write_class(photos / "Größe 图", 3)
    write_class(photos / "rare", 2)
    old = photos / os.fsdecode(b"caf\xe9\n")  # from an archive without Unicode
    write_class(old, 3)
    (old / os.fsdecode(b"\xe9\n.jpg")).write_bytes(b"")
    write_class(photos / "linked")
    shutil.move(photos / "linked", tmp_path / "real")
    (photos / "linked").symlink_to(tmp_path / "real")
    for place in ("cat", "dog"):
        (photos / place / "more").symlink_to(elsewhere)
    (photos / "cat" / "up").symlink_to(photos)
    (photos / "cat" / "other").symlink_to(photos / "dog")
    (photos / "again").symlink_to(photos / "cat")
    for junk in (
        "__MACOSX",
        "cat/__MACOSX/cat",
        ".ipynb_checkpoints",
        "dog/.ipynb_checkpoints",
        "dog/@eaDir",
    ):
        write_class(photos / junk, 1)
    for junk in ("._0.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (photos / "cat" / junk).write_bytes(b"junk")
    (photos / "empty").mkdir()
    (photos / "void").mkdir()
    (photos / "void" / "text.JPG").write_text("no picture")
    (photos / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    write_image(photos / "stray.png")
    Image.new("I;16", (8, 8), 9).save(photos / "cat" / "deep.png")
    Image.new("RGB", (1, 1)).save(photos / "cat" / "pixel.GIF")

    splits = load_dataset(f"folder:{photos}")
    counts = splits.counts()
    expected = ["Größe 图", r"caf\udce9\n", "cat", "dog", "linked", "rare"]
    assert splits.classes == list(counts.index) == expected
    assert counts.sum(axis=1).tolist() == [3, 3, 14, 12, 10, 2]
    assert counts.loc["rare"].tolist() == [2, 0, 0] and (counts.drop("rare") > 0).all(axis=None)
    real = [os.path.realpath(file) for file in files_of(splits)]
    assert len(set(real)) == len(real) == 44
    assert sorted(line.split(":")[0] for line in splits.broken) == [
        r"caf\udce9\n/\udce9\n.jpg",
        "cat/phone.HEIC",
        "stray.png",
        "void/text.JPG",
    ]
    text = splits.summary()
    assert text.encode() and len(text.splitlines()) == 1 + 8 + 4
    assert str(splits) in text and all(line in text for line in splits.broken)
    assert "without a readable image of their own: 'again', 'empty', 'void'" in str(splits)
    assert "fewer than 3 images, all kept in training: 'rare'" in str(splits)
    assert "1 grey image of more than 8 bits" in str(splits)
    assert load_dataset(f"folder:{photos}").hashes == splits.hashes


@pytest.mark.parametrize(
    "names", [("Train", "Val", "TEST"), ("training", "Validation", "testing"), ("train", "valid", "test")]
)
def test_split_folders_are_understood_in_any_case(tmp_path, names):
    for count, name in zip((4, 3, 2), names):
        for kind in ("a", "b"):
            write_class(tmp_path / name / kind, count)
    write_class(tmp_path / "__MACOSX" / "a", 1)
    (tmp_path / "notes").mkdir()
    splits = load_dataset(f"folder:{tmp_path}")
    assert splits.classes == ["a", "b"] and splits.counts().values.tolist() == [[4, 3, 2]] * 2


def test_classes_that_are_not_in_every_split_are_named(tmp_path):
    for split in ("train", "val", "test"):
        for kind in ("a", "b"):
            write_class(tmp_path / split / kind, 1)
    write_class(tmp_path / "train" / "extra", 1)
    write_class(tmp_path / "test" / "other", 1)
    with pytest.raises(InputError, match="'extra' only in train/, 'other' only in test/"):
        load_dataset(f"folder:{tmp_path}")


def test_a_class_may_be_called_train(tmp_path):
    write_class(tmp_path / "bus")
    write_class(tmp_path / "train" / "steam")
    assert load_dataset(f"folder:{tmp_path}").classes == ["bus", "train"]


def test_small_classes_are_in_every_split(tmp_path):
    for kind in range(10):
        write_class(tmp_path / str(kind), 3 + kind % 2)
    counts = load_dataset(f"folder:{tmp_path}").counts()
    assert counts.values.tolist() == [[1, 1, 1], [2, 1, 1]] * 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_is_not_permitted_is_left_out_until_it_is(photos):
    closed = [photos / "cat" / "0.png", photos / "dog" / "sub"]
    write_class(closed[1], 2)
    for path in closed:
        path.chmod(0)
    splits = load_dataset(f"folder:{photos}")
    assert splits.broken == ["cat/0.png: Permission denied", "dog/sub: Permission denied"]
    for path in closed:
        path.chmod(0o755)
    assert load_dataset(f"folder:{photos}").counts().sum(axis=1).tolist() == [10, 12]


def test_a_plugin_that_is_installed_later_reads_what_was_left_out(photos, monkeypatch):
    stored = (photos / "cat" / "0.png").read_bytes()
    (photos / "cat" / "phone.HEIC").write_bytes(b"HEIF" + stored)
    assert load_dataset(f"folder:{photos}").broken[0].startswith("cat/phone.HEIC: not a picture")

    def accepts(start: bytes) -> bool:
        return start.startswith(b"HEIF")

    def opened(file, name) -> Image.Image:
        return PngImageFile(io.BytesIO(file.read()[4:]))

    monkeypatch.setitem(Image.OPEN, "HEIF", (opened, accepts))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    splits = load_dataset(f"folder:{photos}")
    assert not splits.broken and splits.counts().loc["cat"].sum() == 11


@pytest.mark.parametrize("crop_scale", [None, (0.35, 1.0)])
@pytest.mark.parametrize("seed", [None, 0])
def test_thin_and_single_pixels_take_little_memory(photos, seed, crop_scale):
    for size in ((20_000, 2), (2, 20_000), (20_000, 1), (1, 1)):
        write_image(photos / "cat" / f"{size}.png", size=size)
    splits = load_dataset(f"folder:{photos}")
    config = CONFIG | {"input_size": (3, 224, 224)}
    memory = TensorMemory(torch.device("cpu"))
    for split in (splits.train, splits.val, splits.test):
        with memory:
            for images, _ in loader(split, config, Policy(crop_scale), batch_size=8, seed=seed, workers=0):
                assert images.shape[1:] == (3, 224, 224)
    assert memory.peak_bytes < 40 * 2**20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "at least two; found none"),
        (lambda root: write_class(root / "cat"), "found only 'cat'"),
        (
            lambda root: [write_class(root / "cat"), (root / "dog").mkdir()],
            "found only 'cat'; no image can be read in 'dog'",
        ),
        (lambda root: [write_class(root / c, 1) for c in ("cat", "dog")], "'cat', 'dog' have fewer than 3"),
        (lambda root: [write_class(root / "train" / c) for c in ("cat", "dog")], "lacks val/, test/"),
        (lambda root: [write_class(root / s) for s in ("train", "val", "test")], "found none"),
        (
            lambda root: [write_class(root / s / "a") for s in ("train", "val", "valid", "test")],
            "one folder each for train, val and test",
        ),
    ],
)
def test_unusable_folders_are_refused(tmp_path, make, message):
    make(tmp_path / "photos")
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(f"folder:{tmp_path / 'photos'}")
    assert str(tmp_path / "photos") in str(caught.value)
