import json

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils._pytree import tree_leaves

from toolkit.datasets import Policy, coco, composed, image_files, load_dataset, loader
from toolkit.datasets.embedded import digits
from toolkit.datasets.splits import InMemory
from toolkit.datasets.tasks import IGNORED
from toolkit.errors import InputError

CONFIG = {
    "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
    "interpolation": "bilinear", "crop_pct": 0.875,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(image_files, "CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def embedded():
    return {name: load_dataset(name) for name in ("mosaics", "digit_scenes")}


def config(side: int) -> dict:
    return CONFIG | {"input_size": (3, side, side)}


# --- embedded -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mosaics", "digit_scenes"])
def test_an_embedded_set_is_the_same_every_time(name, embedded):
    first = embedded[name]
    assert load_dataset(name).hashes == first.hashes and len(set(first.hashes.values())) == 3
    assert first.train[0][0].shape == (3, 64, 64) and first.train[0][0].dtype == torch.uint8


def test_mosaics_are_of_two_to_five_regions_of_a_size(embedded):
    splits = embedded["mosaics"]
    assert splits.task == "segmentation" and len(splits.classes) == 7
    for split, count in composed.MOSAICS.items():
        masks = torch.stack([mask for _, mask in getattr(splits, split)])
        assert masks.shape == (count, 64, 64) and masks.dtype == torch.uint8
        pixels = torch.stack([torch.bincount(mask.flatten(), minlength=7) for mask in masks])
        regions = (pixels > 0).sum(1)
        assert regions.min() == 2 and regions.max() == 5
        assert pixels[pixels > 0].min() >= 0.06 * 64**2
        assert (pixels.sum(0) > 0).all(), "every class is in every split"


def test_a_mosaic_shows_tiles_of_its_split_where_its_mask_says(monkeypatch):
    """With tiles that hold their class's number, and no variation, image and mask are equal."""
    monkeypatch.setattr(composed, "varied", lambda rng, tile: tile)
    tiles = [np.full((2, 64, 64), label, np.uint8) for label in range(7)]
    image, mask = composed._mosaic(np.random.default_rng(0), tiles)
    assert np.array_equal(image, mask) and len(np.unique(mask)) >= 2


def test_tiles_of_two_splits_share_no_pixel(monkeypatch):
    """Of a photograph whose pixels number its tiles of 64 px."""
    numbers = np.kron(np.arange(20).reshape(4, 5), np.ones((64, 64))).astype(np.uint8)
    monkeypatch.setattr(skimage.data, "brick", lambda: numbers)
    composed.tiles_of.cache_clear()
    seen = [set(np.unique(tiles)) for tiles in composed.tiles_of("brick").values()]
    composed.tiles_of.cache_clear()
    assert all(seen) and sum(map(len, seen)) == len(set.union(*seen)) == 20


def test_boxes_of_scenes_are_tight_around_the_ink_and_apart(embedded):
    splits = embedded["digit_scenes"]
    assert splits.task == "detection" and splits.classes == list("0123456789")
    for split, count in composed.SCENES.items():
        data = getattr(splits, split)
        assert len(data) == count
        for image, target in data:
            boxes, instances = target["boxes"], target["instances"]
            assert boxes.dtype == torch.float32 and 1 <= len(boxes) <= 4
            assert instances.shape == image.shape[1:] and instances.max() == len(boxes)
            covered = torch.zeros(64, 64)
            for number, (x1, y1, x2, y2, label) in enumerate(boxes.int().tolist(), start=1):
                ys, xs = torch.nonzero(instances == number, as_tuple=True)
                assert (x1, y1, x2, y2) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
                assert max(x2 - x1, y2 - y1) <= 28 and 0 <= label < 10
                covered[y1:y2, x1:x2] += 1
            assert covered.max() == 1


def test_scenes_are_their_background_where_no_instance_is(monkeypatch):
    rng = np.random.default_rng(3)
    tile = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    monkeypatch.setattr(composed, "varied", lambda rng, tile: tile)
    for row in range(20):
        image, target = composed._scene(np.random.default_rng(row), [tile[None]], digits().train)
        outside = target["instances"].numpy() == 0
        assert (image[:, outside] == tile[outside]).all()
        assert (image[:, ~outside] != tile[~outside]).any(0).mean() > 0.9


# --- batches --------------------------------------------------------------------------------------


def test_masks_come_at_the_input_size_as_long_integers(embedded):
    split = embedded["mosaics"].test
    images, masks = next(iter(loader(split, config(64), Policy(), batch_size=4)))
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    assert masks.dtype == torch.int64 and torch.equal(
        masks, torch.stack([split[i][1].long() for i in range(4)])
    )
    larger = next(iter(loader(split, config(128), Policy(), batch_size=4)))[1]
    assert torch.equal(larger, masks.repeat_interleave(2, 1).repeat_interleave(2, 2))


@given(sizes=st.lists(st.tuples(*[st.integers(8, 40)] * 2), min_size=1, max_size=4), side=st.integers(8, 48))
def test_a_batch_of_images_of_several_sizes_keeps_boxes_and_instances_together(sizes, side):
    """A box of each image's left half: scaled, it is the left half of the input, as is its instance."""
    images, targets = [], []
    for h, w in sizes:
        instances = torch.zeros(h, 2 * w, dtype=torch.uint8)
        instances[:, :w] = 1
        images.append(torch.zeros(3, h, 2 * w, dtype=torch.uint8))
        targets.append({"boxes": torch.tensor([[0.0, 0, w, h, 3]]), "instances": instances})
    split = InMemory.__new__(InMemory)
    split.images, split.labels = [image.numpy() for image in images], targets
    batch, found = next(iter(loader(split, config(2 * side), Policy(), batch_size=len(sizes))))
    assert batch.shape == (len(sizes), 3, 2 * side, 2 * side)
    half = torch.tensor([0.0, 0, side, 2 * side, 3])
    assert torch.allclose(found["boxes"], half.expand(len(sizes), 1, 5), atol=1e-4)
    assert (found["instances"][..., :side] == 1).all() and (found["instances"][..., side:] == 0).all()


def test_boxes_are_padded_to_the_most_of_the_batch_and_to_one(embedded):
    split = embedded["digit_scenes"].test
    _, targets = next(iter(loader(split, config(64), Policy(), batch_size=16)))
    counts = [len(split[row][1]["boxes"]) for row in range(16)]
    assert targets["boxes"].shape == (16, max(counts), 5)
    assert (targets["boxes"][..., 4] >= 0).sum(1).tolist() == counts
    assert all(torch.equal(targets["boxes"][row, :n], split[row][1]["boxes"]) for row, n in enumerate(counts))
    empty = InMemory(np.zeros((2, 3, 8, 8), np.uint8), [{"boxes": torch.zeros(0, 5)}] * 2)
    _, targets = next(iter(loader(empty, config(8), Policy(), batch_size=2)))
    assert targets["boxes"].tolist() == [[[0, 0, 0, 0, -1]]] * 2 and "instances" not in targets


@pytest.mark.parametrize("name", ["mosaics", "digit_scenes"])
def test_flips_mirror_targets_with_their_images(name, embedded):
    """The same batches with and without flips: each image is the same or mirrored, and so its target."""
    split = embedded[name].val
    plain, flipped = (
        list(loader(split, config(64), Policy(flip=flip), batch_size=20, seed=1)) for flip in (False, True)
    )
    mirrored = 0
    for (images, targets), (images2, targets2) in zip(plain, flipped):
        for row in range(len(images)):
            flip = not torch.equal(images[row], images2[row])
            mirrored += flip
            turned = images[row].flip(-1) if flip else images[row]
            assert torch.equal(turned, images2[row])
            if name == "mosaics":
                assert torch.equal(targets[row].flip(-1) if flip else targets[row], targets2[row])
                continue
            for number, (x1, y1, x2, y2, _) in enumerate(targets2["boxes"][row].int().tolist(), start=1):
                ys, xs = torch.nonzero(targets2["instances"][row] == number, as_tuple=True)
                if len(xs):
                    assert (x1, y1, x2, y2) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert torch.equal(targets["boxes"][row, :, 4], targets2["boxes"][row, :, 4])
    assert 15 < mirrored < 45


def test_dense_batches_do_not_depend_on_workers_or_touch_the_global_generator(embedded):
    before = torch.get_rng_state()
    for splits in embedded.values():
        here, there = (
            list(loader(splits.val, config(64), Policy(flip=True), batch_size=30, seed=0, workers=workers))
            for workers in (0, 1)
        )
        leaves = [tree_leaves(batches) for batches in (here, there)]
        assert len(leaves[0]) == len(leaves[1]) >= 4
        assert all(torch.equal(a, b) for a, b in zip(*leaves))
    assert torch.equal(torch.get_rng_state(), before)


def test_crops_of_dense_targets_are_refused(embedded):
    with pytest.raises(InputError, match="crop_scale is for classification"):
        batches = loader(embedded["mosaics"].val, CONFIG, Policy((0.5, 1.0)), batch_size=2, workers=0)
        next(iter(batches))


# --- files: segmentation --------------------------------------------------------------------------


def write_image(path, size, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


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
    """20 images to train on, 3 to test."""
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
def test_masks_that_do_not_fit(voc, tmp_path, ids, size, message):
    write_mask(voc / "SegmentationClass" / "val_000000.png", ids, size)
    for _ in range(2):  # the error is not forgotten
        with pytest.raises(InputError, match=message):
            load_dataset("voc2012", root=tmp_path)


def test_voc_without_files_or_readable_images(voc, tmp_path):
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


def test_ade20k_ignores_what_is_of_no_class(ade, tmp_path):
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


# --- files: COCO ----------------------------------------------------------------------------------

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]


@pytest.fixture
def coco_files(tmp_path):
    """20 images of 100 x 50 px to train on and 3 to test, a dog in each; called, it changes the latter."""
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
def test_unusable_boxes(coco_files, tmp_path, annotation, message):
    coco_files([annotation])
    with pytest.raises(InputError, match=message):
        load_dataset("coco", root=tmp_path)


def test_coco_images_of_another_size_and_missing_files(coco_files, tmp_path):
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
