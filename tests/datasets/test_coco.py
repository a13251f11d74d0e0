"""COCO's files: Visual Wake Words and boxes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIG, write_image

from toolkit.datasets import Policy, coco, load_dataset, loader
from toolkit.errors import InputError

# --- Visual Wake Words ----------------------------------------------------------------------------


PERSON, DOG = 1, 18


@pytest.fixture
def coco_root(tmp_path):
    """20 training and 4 test images; every second one shows a person."""
    root = tmp_path / "coco"
    for part, count in (("train2017", 20), ("val2017", 4)):
        images, boxes = [], []
        for number in range(count):
            write_image(root / part / f"{number:012}.jpg", size=(100, 50), seed=number)
            images.append({"id": 7 * number, "file_name": f"{number:012}.jpg", "width": 100, "height": 50})
            box = [0, 0, 6, 5] if number % 2 else [0, 0, 5, 5]  # 30 and 25 of 5,000 pixels: 0.6 and 0.5 %
            boxes.append({"image_id": 7 * number, "category_id": PERSON, "bbox": box})
            boxes.append({"image_id": 7 * number, "category_id": DOG, "bbox": [0, 0, 90, 45]})
        categories = [{"id": PERSON, "name": "person"}, {"id": DOG, "name": "dog"}]
        path = root / "annotations" / f"instances_{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return root


def test_vww_needs_a_person_in_more_than_half_a_per_cent_of_the_image(coco_root):
    splits = load_dataset("vww", root=coco_root.parent)
    assert splits.classes == ["no person", "person"]
    files = {s: getattr(splits, s).samples for s in ("train", "val", "test")}
    assert [len(samples) for samples in files.values()] == [18, 2, 4]
    for split, samples in files.items():
        part = "val2017" if split == "test" else "train2017"
        assert all(path.parent == coco_root / part and label == int(path.stem) % 2 for path, label in samples)
    assert not {path for path, _ in files["train"]} & {path for path, _ in files["val"]}
    assert sorted(label for _, label in files["val"]) == [0, 1]
    assert splits.train[0][0].shape == (3, 50, 100)
    (coco_root / "val2017" / f"{0:012}.jpg").unlink()
    (coco_root / "val2017" / f"{2:012}.jpg").write_text("no image")
    with pytest.raises(InputError, match="vww: the test split has readable images of fewer than two classes"):
        load_dataset("vww", root=coco_root.parent)


def test_vww_reads_annotations_once_and_again_when_they_change(coco_root, monkeypatch):
    read = []
    made = coco._made
    monkeypatch.setattr(
        coco, "_made", lambda name, path, make: read.append(path.stem) or made(name, path, make)
    )
    first = load_dataset("vww", root=coco_root.parent)
    assert load_dataset("vww", root=coco_root.parent).hashes == first.hashes
    assert read == ["instances_train2017", "instances_val2017"]
    path = coco_root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("[0, 0, 6, 5]", "[0, 0, 1, 1]", 1))
    changed = load_dataset("vww", root=coco_root.parent)
    assert read[2:] == ["instances_val2017"]
    assert changed.hashes["test"] != first.hashes["test"] and changed.hashes["train"] == first.hashes["train"]


def test_vww_says_what_to_put_where(tmp_path, coco_root):
    with pytest.raises(
        InputError, match=r"lacks annotations/instances_train2017\.json.*val2017/ in .*cocodata"
    ):
        load_dataset("vww", root=tmp_path / "nowhere")
    path = coco_root / "annotations" / "instances_val2017.json"
    whole = path.read_text()
    for content in ("{", "[]", '{"images": []}', whole.replace("file_name", "name")):
        path.write_text(content)
        with pytest.raises(InputError, match=r"instances_val2017\.json is not COCO's list.*unpack it again"):
            load_dataset("vww", root=coco_root.parent)


# --- boxes ----------------------------------------------------------------------------------------


CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


@pytest.fixture
def coco_files(tmp_path):
    """20 training and 3 test images of 100 x 50 px, a dog in each; calling the fixture changes the latter."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train2017", 20), ("val2017", 3)):
        images = [
            {"id": 7 * n, "file_name": f"{n:012}.jpg", "width": 100, "height": 50} for n in range(count)
        ]
        boxes = [
            {"id": n, "image_id": 7 * n, "category_id": 18, "bbox": [10, 20, 30, 10.5], "iscrowd": 0}
            for n in range(count)
        ]
        for image in images:
            write_image(root / part / image["file_name"], (100, 50), image["id"])
        content = {"images": images, "annotations": boxes, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))

    def change(annotations: list[dict]) -> None:
        defaults = {"id": 9, "image_id": 7, "category_id": 1, "iscrowd": 0}
        content["annotations"] = [defaults | annotation for annotation in annotations]
        (root / "annotations" / "instances_val2017.json").write_text(json.dumps(content))

    return change


def test_coco_boxes_become_corners_and_classes_from_zero(coco_files, tmp_path):
    splits = load_dataset("coco", root=tmp_path)
    assert splits.task == "detection" and splits.classes == ["person", "dog"], "by id"
    assert [len(splits.train), len(splits.val), len(splits.test)] == [18, 2, 3]
    image, target = splits.test[0]
    assert image.shape == (3, 50, 100) and target.keys() == {"boxes"}
    assert target["boxes"].tolist() == [[10, 20, 40, 30.5, 1]]
    _, targets = next(iter(loader(splits.test, CONFIG, Policy(), batch_size=3, workers=0)))
    assert torch.allclose(targets["boxes"][0, 0], torch.tensor([3.2, 12.8, 12.8, 19.52, 1]))
    assert load_dataset("coco", root=tmp_path).hashes == splits.hashes


def test_coco_crowds_and_boxes_without_area_are_left_out_and_counted(coco_files, tmp_path):
    before = load_dataset("coco", root=tmp_path)
    coco_files([
        {"bbox": [0, 0, 100, 50], "iscrowd": 1}, {"bbox": [5, 5, 1.03, 0.0]},
        {"bbox": [-0.4, 0, 100.9, 50.2]}, {"bbox": [1, 2, 3, 4], "category_id": 18, "image_id": 14},
    ])  # fmt: skip
    splits = load_dataset("coco", root=tmp_path)
    assert splits.left_out == {"crowd annotations": 1, "boxes without area": 1}
    assert "1 crowd annotations left out" in str(splits)
    boxes = [target["boxes"].tolist() for _, target in splits.test]
    assert boxes == [[], [[0, 0, 100, 50, 0]], [[1, 2, 4, 6, 1]]]
    assert splits.test[0][1]["boxes"].shape == (0, 5)
    assert splits.hashes["test"] != before.hashes["test"] and splits.hashes["train"] == before.hashes["train"]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [90, 0, 11.5, 10]}, r"instances_val2017\.json annotation 9 of image 7 has a box outside"),
        ({"bbox": [-1, 0, 5, 5]}, "outside its image of 100 x 50 pixels"),
        ({"bbox": [5, 5, -3, 5]}, "outside its image"),
        ({"bbox": [float("nan"), 0, 5, 5]}, "outside its image"),
        ({"bbox": [0, 0, 5, 5], "category_id": 3}, "annotation 9 of image 7 has the unknown category 3"),
        ({"bbox": [0, 0, 5]}, "is not COCO's list of instances"),
        ({"bbox": [0, 0, 5, "5"]}, "is not COCO's list of instances"),
        ({"bbox": [0, 0, 5, 5], "image_id": 1}, "is not COCO's list of instances"),
    ],
)
def test_unusable_boxes_are_refused(coco_files, tmp_path, annotation, message):
    coco_files([annotation])
    with pytest.raises(InputError, match=message):
        load_dataset("coco", root=tmp_path)


def test_coco_images_of_another_size_and_missing_files_are_refused(coco_files, tmp_path):
    write_image(tmp_path / "coco" / "val2017" / f"{0:012}.jpg", (50, 50))
    with pytest.raises(InputError, match="has 50 x 50 pixels, its annotations are for 100 x 50"):
        load_dataset("coco", root=tmp_path)
    with pytest.raises(InputError, match=r"dataset 'coco' lacks annotations/instances_train2017\.json"):
        load_dataset("coco", root=tmp_path / "nowhere")


@given(
    box=st.tuples(*[st.floats(-0.99, 60)] * 2, *[st.floats(0, 60)] * 2),
    width=st.integers(1, 80), height=st.integers(1, 80),
)  # fmt: skip
def test_a_box_is_within_its_image_or_refused(box, width, height):
    try:
        found = coco._clipped(list(box), width, height, "a file")
    except InputError:
        x, y, w, h = box
        assert x + w >= width + 0.99 or y + h >= height + 0.99
        return
    if found:
        x1, y1, x2, y2 = found
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
