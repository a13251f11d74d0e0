"""Images in files: your own folder, broken images, hashes."""

import os

import numpy as np
import pytest
import torch
from pictures import CONFIG, write_image
from PIL import Image
from torch.utils.data import Subset

import toolkit
from toolkit.datasets import Policy, load_dataset, loader
from toolkit.errors import FileError


@pytest.fixture
def photos(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        for number in range(10):
            write_image(tmp_path / name / f"{number}.png", seed=100 * label + number)
    return tmp_path


def test_folder_of_classes_is_split(photos):
    splits = load_dataset(f"folder:{photos}")
    assert splits.classes == ["cat", "dog"]
    files = {s: {path for path, _ in getattr(splits, s).samples} for s in ("train", "val", "test")}
    assert [len(f) for f in files.values()] == [14, 3, 3]
    assert len(set.union(*files.values())) == 20, "no image is in two splits"
    image, label = splits.train[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and label in (0, 1)
    batch, _ = next(iter(loader(splits.train, CONFIG, splits.policy, batch_size=4, seed=0)))
    assert batch.shape == (4, 3, 32, 32)
    batch, _ = next(iter(loader(splits.test, CONFIG, splits.policy, batch_size=3)))
    assert batch.shape == (3, 3, 32, 32)


def test_images_of_several_sizes_are_resized_one_by_one_without_crops(photos):
    write_image(photos / "cat" / "0.png", size=(64, 16))
    splits = load_dataset(f"folder:{photos}")
    sizes = {image.shape for split in (splits.train, splits.val, splits.test) for image, _ in split}
    assert sizes == {(3, 30, 40), (3, 16, 64)}
    for split in (splits.train, splits.val, splits.test):
        images, _ = next(iter(loader(split, CONFIG, Policy(), batch_size=20)))
        alone = [
            next(iter(loader(Subset(split, [row]), CONFIG, Policy(), batch_size=1)))[0]
            for row in range(len(split))
        ]
        assert images.shape[1:] == (3, 32, 32) and torch.equal(images, torch.cat(alone))


def test_folder_with_its_own_splits(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("a", "b"):
            write_image(tmp_path / split / name / "1.jpg")
    splits = load_dataset(f"folder:{tmp_path}")
    assert [len(splits.train), len(splits.val), len(splits.test)] == [2, 2, 2]


def test_broken_images_are_listed_and_left_out(photos):
    (photos / "cat" / "text.png").write_text("no image")
    (photos / "cat" / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (photos / "dog" / "link.png").symlink_to(photos / "nowhere.png")
    whole = (photos / "dog" / "0.png").read_bytes()
    (photos / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    splits = load_dataset(f"folder:{photos}")
    assert sorted(line.split(":")[0] for line in splits.broken) == [
        "cat/postscript.png", "cat/text.png", "dog/cut.png", "dog/link.png",
    ]  # fmt: skip
    assert sum(len(getattr(splits, s)) for s in ("train", "val", "test")) == 20
    assert "4 broken" in str(splits)
    again = load_dataset(f"folder:{photos}")
    assert again.broken == splits.broken and again.hashes == splits.hashes


def test_decompression_bomb_is_refused_before_it_is_decoded(photos):
    Image.new("1", (9000, 9000)).save(photos / "cat" / "bomb.png")
    splits = load_dataset(f"folder:{photos}")
    assert len(splits.broken) == 1 and "9000 x 9000 pixels" in splits.broken[0]


def replaced(path, seed):
    """Another picture of the same size and time."""
    status = path.stat()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path.with_suffix(".bmp"))
    path.write_bytes(path.with_suffix(".bmp").read_bytes())
    path.with_suffix(".bmp").unlink()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", ["replaced", "truncated", "deleted", "unreadable", "a pipe"])
def test_images_that_change_after_the_check_are_named(tmp_path, change):
    for label, name in enumerate(("cat", "dog")):
        for number in range(10):
            write_image(tmp_path / name / f"{number}.bmp", seed=100 * label + number)
    splits = load_dataset(f"folder:{tmp_path}")
    path = splits.train.samples[0][0]
    if change == "replaced":
        replaced(path.rename(path.with_suffix(".b")), 9)
        path.with_suffix(".b").rename(path)
    elif change == "truncated":
        os.truncate(path, 100)
    else:
        path.unlink()
        if change == "unreadable":
            path.mkdir()
        elif change == "a pipe":
            os.mkfifo(path)
    with pytest.raises(FileError, match=f"{path} has changed"):
        splits.train[0]
    batches = loader(splits.train, CONFIG, Policy(), batch_size=20, workers=0, skip_changed=True)
    with pytest.warns(UserWarning, match=f"left out of a batch: {path}"):
        ((images, labels),) = batches
    assert len(images) == len(labels) == len(splits.train) - 1


def test_a_run_stops_with_its_state_saved_where_an_image_has_changed(photos, tmp_path_factory, monkeypatch):
    """And goes on when it is brought back, or without it."""
    splits = load_dataset(f"folder:{photos}")
    e = toolkit.Experiment(
        dataset=f"folder:{photos}", method="linear", epochs=2, batch_size=5, budget="1GB", device="cpu",
        checkpointing="none",
    )  # fmt: skip

    def fit(folder, **options):
        toolkit.seed_everything(0)
        model = toolkit.adapt(toolkit.build_backbone("demo_cnn", 2, False), "linear")
        return toolkit.fit(model, splits, e, folder=folder, workers=0, **options)

    expected, folder = fit(None), tmp_path_factory.mktemp("run")
    path = splits.val.samples[0][0]
    content = path.read_bytes()
    path.write_bytes(b"gone")
    result = fit(folder)
    assert (result.status, result.steps) == ("interrupted", 3) and f"{path} has changed" in result.error
    with pytest.warns(UserWarning, match="left out"):
        assert fit(None, skip_changed=True).status == "ok"
    path.write_bytes(content)
    assert fit(folder).history == expected.history


def test_changed_content_changes_the_hash(photos):
    before = load_dataset(f"folder:{photos}").hashes
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(photos / name / f"{number}.png", seed=1000 + number)
    after = load_dataset(f"folder:{photos}").hashes
    assert all(before[split] != after[split] for split in before)
