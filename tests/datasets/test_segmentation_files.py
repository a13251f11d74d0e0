"""Pascal VOC and ADE20K: splits, masks that do not fit, missing files."""

import numpy as np
import pytest
import torch
from pictures import CONFIG, write_image
from PIL import Image

from toolkit.datasets import load_dataset, loader
from toolkit.datasets.tasks import IGNORED
from toolkit.errors import InputError


def write_mask(path, ids, size=(20, 10), mode="P"):
    """Stripes of `ids` from top to bottom."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.resize(np.array(ids, np.uint8), size[1])
    mask = Image.fromarray(np.repeat(rows[:, None], size[0], axis=1))
    if mode == "P":
        mask.putpalette([value for grey in range(256) for value in (grey, 0, 0)])
    mask.save(path)


@pytest.fixture
def voc(tmp_path):
    """20 training and 3 test images."""
    folder = tmp_path / "VOCdevkit" / "VOC2012"
    for part, count in (("train", 20), ("val", 3)):
        names = [f"{part}_{number:06}" for number in range(count)]
        for number, name in enumerate(names):
            write_image(folder / "JPEGImages" / f"{name}.jpg", (20, 10), number)
            write_mask(folder / "SegmentationClass" / f"{name}.png", [0, number % 20 + 1, 255])
        listed = folder / "ImageSets" / "Segmentation" / f"{part}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n")
    return folder


def test_voc_holds_out_a_tenth_and_tests_on_its_validation_images(voc, tmp_path):
    splits = load_dataset("voc2012", root=tmp_path)
    assert splits.task == "segmentation" and len(splits.classes) == 21
    names = {s: [image.stem for image, _ in getattr(splits, s).samples] for s in ("train", "val", "test")}
    assert [len(found) for found in names.values()] == [18, 2, 3]
    assert sorted(names["train"] + names["val"]) == [f"train_{n:06}" for n in range(20)]
    assert names["test"] == [f"val_{n:06}" for n in range(3)]
    image, mask = splits.test[1]
    assert image.shape == (3, 10, 20) and mask.dtype == torch.uint8
    assert mask[:, 0].tolist() == [0, 2, 255, 0, 2, 255, 0, 2, 255, 0], "ids, not the palette's colours"
    again = load_dataset("voc2012", root=tmp_path)
    assert again.hashes == splits.hashes and len(set(splits.hashes.values())) == 3
    images, masks = next(iter(loader(splits.train, CONFIG, splits.policy, batch_size=4, seed=0, workers=0)))
    assert images.shape == (4, 3, 32, 32) and masks.shape == (4, 32, 32)
    write_mask(voc / "SegmentationClass" / "val_000001.png", [0, 3, 255])
    changed = load_dataset("voc2012", root=tmp_path)
    assert (
        changed.hashes["test"] != splits.hashes["test"] and changed.hashes["train"] == splits.hashes["train"]
    )


def test_broken_images_and_masks_are_listed_and_left_out(voc, tmp_path):
    (voc / "JPEGImages" / "train_000000.jpg").write_text("no image")
    (voc / "SegmentationClass" / "train_000001.png").write_bytes(b"\x89PNG")
    (voc / "SegmentationClass" / "train_000002.png").unlink()
    write_image(voc / "SegmentationClass" / "train_000003.png", (20, 10))
    Image.new("L", (9000, 9000)).save(voc / "SegmentationClass" / "val_000000.png")
    splits = load_dataset("voc2012", root=tmp_path)
    names = sorted(line.split(":")[0].rpartition("/")[2] for line in splits.broken)
    assert names == [
        "train_000000.jpg",
        "train_000001.jpg",
        "train_000002.jpg",
        "train_000003.jpg",
        "val_000000.jpg",
    ]
    assert any("RGB pixels, not one class each" in line for line in splits.broken)
    assert any("9000 x 9000 pixels" in line for line in splits.broken)
    assert len(splits.train) + len(splits.val) == 16 and len(splits.test) == 2
    assert "5 broken images left out" in str(splits)


@pytest.mark.parametrize(
    ("ids", "size", "message"),
    [
        ([0, 21], (20, 10), r"val_000000\.png holds the class id 21; the ids of its 21 classes end at 20"),
        ([0, 1], (10, 20), r"val_000000\.png has 10 x 20 pixels, its image val_000000\.jpg 20 x 10"),
    ],
)
def test_masks_that_do_not_fit_are_refused(voc, tmp_path, ids, size, message):
    write_mask(voc / "SegmentationClass" / "val_000000.png", ids, size)
    for _ in range(2):  # the error is not forgotten
        with pytest.raises(InputError, match=message):
            load_dataset("voc2012", root=tmp_path)


def test_voc_without_files_or_readable_images_is_refused(voc, tmp_path):
    with pytest.raises(InputError, match=r"VOCtrainval_11-May-2012\.tar from http"):
        load_dataset("voc2012", root=tmp_path / "nowhere")
    for path in (voc / "JPEGImages").glob("val_*"):
        path.unlink()
    with pytest.raises(InputError, match=r"no image of the test split .* can be read.*val_000000"):
        load_dataset("voc2012", root=tmp_path)


@pytest.fixture
def ade(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    for part, count in (("training", 20), ("validation", 2)):
        for number in range(count):
            write_image(folder / "images" / part / f"ADE_{number:08}.jpg", (20, 10), number)
            write_mask(folder / "annotations" / part / f"ADE_{number:08}.png", [0, 1, 150, 255], mode="L")
    lines = [f"{n} \t0.1\t10\t1\tthing {n}, other name" for n in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines, ""]))
    return folder


def test_ade20k_ignores_pixels_without_a_class(ade, tmp_path):
    splits = load_dataset("ade20k", root=tmp_path)
    assert splits.classes[0] == "thing 1" and len(splits.classes) == 150
    assert [len(splits.train), len(splits.val), len(splits.test)] == [18, 2, 2]
    assert splits.test[0][1][:4, 0].tolist() == [IGNORED, 0, 149, IGNORED]
    write_mask(ade / "annotations" / "validation" / "ADE_00000001.png", [151], mode="L")
    with pytest.raises(
        InputError, match=r"ADE_00000001\.png holds the class id 151.* 150 classes end at 150"
    ):
        load_dataset("ade20k", root=tmp_path)
    (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n")
    with pytest.raises(InputError, match="names 1 classes, not 150"):
        load_dataset("ade20k", root=tmp_path)
    with pytest.raises(
        InputError, match=r"lacks objectInfo150\.txt, images/training.*ADEChallengeData2016\.zip"
    ):
        load_dataset("ade20k", root=tmp_path / "nowhere")
