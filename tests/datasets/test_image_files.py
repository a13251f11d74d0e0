"""Images in files: your own folder, broken images, hashes."""

import pytest
import torch
from pictures import CONFIG, write_image
from PIL import Image
from torch.utils.data import Subset

from toolkit.datasets import Policy, load_dataset, loader


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


def test_changed_content_changes_the_hash(photos):
    before = load_dataset(f"folder:{photos}").hashes
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(photos / name / f"{number}.png", seed=1000 + number)
    after = load_dataset(f"folder:{photos}").hashes
    assert all(before[split] != after[split] for split in before)
