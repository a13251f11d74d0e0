import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Subset

import toolkit
from toolkit.backbones import data_config
from toolkit.datasets import Policy, coco, corruptions, find_dataset, image_files, load_dataset, loader
from toolkit.datasets.corruptions import corrupt, enlarged
from toolkit.datasets.embedded import TEXTURE_CROPS, assign_tiles
from toolkit.errors import InputError

CONFIG = {
    "input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3,
    "interpolation": "bilinear", "crop_pct": 0.875,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(image_files, "CACHE", tmp_path_factory.mktemp("cache"))


# --- embedded -------------------------------------------------------------------------------------


def test_digits_is_split_three_ways(digits):
    assert [len(digits.train), len(digits.val), len(digits.test)] == [1077, 270, 450]
    assert len(digits.classes) == 10
    for split in (digits.train, digits.val, digits.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() <= 0.15 * counts.mean(), "classes are stratified"
    image, label = digits.train[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and isinstance(label, int)


def test_textures_crops_of_two_splits_share_no_pixel():
    """Tiles are 64 px, assigned to one split each, and every crop lies inside a tile."""
    rng = np.random.default_rng(0)
    tiles = assign_tiles(rng, (300, 451))
    corners = [tuple(corner) for split in tiles.values() for corner in split]
    assert len(corners) == len(set(corners)) == 4 * 7
    assert all(y % 64 == 0 and x % 64 == 0 for y, x in corners)
    splits = load_dataset("textures")
    assert len(splits.classes) >= 12
    crops = [crop.tobytes() for s in (splits.train, splits.val, splits.test) for crop in s.images]
    assert len(set(crops)) > 0.99 * len(crops), "black sky aside, no crop occurs twice"
    assert all(len(getattr(splits, s)) == n * len(splits.classes) for s, n in TEXTURE_CROPS.items())
    assert splits.train[0][0].shape == (3, 48, 48)


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_hashes_are_reproducible_and_differ_by_split(name):
    first, second = load_dataset(name), load_dataset(name)
    assert first.hashes == second.hashes
    assert len(set(first.hashes.values())) == 3


def test_unknown_dataset():
    with pytest.raises(InputError, match=r"unknown dataset 'digit'.*Did you mean 'digits'.*folder:PATH"):
        load_dataset("digit")


# --- shifted --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "corruption"), [("digits", "mixed"), ("textures", "gaussian_noise")])
def test_a_shifted_set_is_the_clean_one_image_by_image(name, corruption):
    clean = load_dataset(name)
    found = load_dataset(f"{name}-c:{corruption}:2")
    assert found.name == f"{name}-c:{corruption}:2"
    assert found.classes == clean.classes and found.policy == clean.policy
    for split in ("train", "val", "test"):
        before, after = getattr(clean, split), getattr(found, split)
        images = enlarged(before.images) if name == "digits" else before.images
        assert np.array_equal(after.labels, before.labels)
        assert np.array_equal(after.images, corrupt(images, corruption, 2, split))
        assert after[0][0].shape == ((3, 32, 32) if name == "digits" else (3, 48, 48))
    harder = load_dataset(f"{name}-c:{corruption}:3")
    hashes = [h for splits in (clean, found, harder) for h in splits.hashes.values()]
    assert len(set(hashes)) == 9


@pytest.mark.parametrize("name", ["digits-c:mixed:3", "textures-c:mixed:3", "cifar10-c:fog:1"])
def test_a_shifted_set_has_the_policy_and_the_prompt_of_the_clean_one(name):
    found, expected = find_dataset(name), find_dataset(name.split("-")[0])
    assert (found.policy, found.prompt) == (expected.policy, expected.prompt)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits-c", "unknown dataset 'digits-c'.*digits-c:CORRUPTION:SEVERITY"),
        (
            "textures-c:mixed",
            "not of the form textures-c:CORRUPTION:SEVERITY, such as 'textures-c:contrast:3'",
        ),
        ("digits-c:mixed:3:4", "unknown severity '3:4'"),
        ("digits-c:gausian_noise:3", "corruption 'gausian_noise'.*Did you mean 'gaussian_noise'.*mixed"),
        ("digits-c:mixed:6", "unknown severity '6'. Valid: 1, 2, 3, 4, 5"),
        ("digits-c:mixed:03", "unknown severity '03'"),
        ("digits:mixed:3", "unknown dataset 'digits:mixed:3'.*digits-c:CORRUPTION"),
        ("cifar10-c:mixed:3", "unknown corruption 'mixed'.*fog"),
    ],
)
def test_bad_names_of_shifted_sets(name, message):
    with pytest.raises(InputError, match=message):
        load_dataset(name)


def test_experiments_on_two_severities_have_two_names():
    names = {toolkit.Experiment(dataset=f"digits-c:gaussian_noise:{s}", device="cpu").name for s in (3, 4)}
    assert len(names) == 2 and all("noise" in name and ":" not in name for name in names)


# --- CIFAR-10-C -----------------------------------------------------------------------------------


@pytest.fixture
def cifar10_c(tmp_path, monkeypatch):
    """100 instead of 10,000 images per severity; an image's pixels all hold its severity and number."""
    monkeypatch.setattr(corruptions, "CIFAR10_C_IMAGES", 100)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    images = np.zeros((500, 32, 32, 3), np.uint8)
    images[..., 0] = np.repeat(np.arange(1, 6), 100)[:, None, None]
    images[..., 1] = np.tile(np.arange(100), 5)[:, None, None]
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.tile(np.arange(100) % 10, 5).astype(np.uint8))
    return folder


def test_cifar10_c_takes_the_severity_and_deals_its_images_to_the_splits(cifar10_c):
    second, fifth = (load_dataset(f"cifar10-c:fog:{s}", root=cifar10_c.parent) for s in (2, 5))
    assert fifth.classes[0] == "airplane" and len(fifth.classes) == 10
    seen = []
    for split, size in (("train", 40), ("val", 10), ("test", 50)):
        data, easier = getattr(fifth, split), getattr(second, split)
        assert len(data) == size and np.bincount(data.labels).tolist() == [size // 10] * 10
        assert (data.images[:, 0] == 5).all() and (easier.images[:, 0] == 2).all()
        number = data.images[:, 1, 0, 0]
        assert np.array_equal(number % 10, data.labels), "image and label belong together"
        assert np.array_equal(number, easier.images[:, 1, 0, 0]), (
            "an image is in one split, however corrupted"
        )
        seen += number.tolist()
    assert sorted(seen) == list(range(100))
    assert fifth.train[0][0].shape == (3, 32, 32)
    assert not set(second.hashes.values()) & set(fifth.hashes.values())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("fog", None, r"there is no .*fog\.npy.*CIFAR-10-C\.tar from https://zenodo.org/records/2535967"),
        ("labels", None, r"there is no .*labels\.npy"),
        ("fog", b"\x93NUMPY cut", r"fog\.npy cannot be read"),
        ("fog", np.zeros((500, 32, 32), np.uint8), r"fog\.npy holds uint8 \(500, 32, 32\), not"),
        ("fog", np.zeros((500, 32, 32, 3), np.float32), r"fog\.npy holds float32"),
        ("labels", np.zeros(500), r"labels\.npy holds float64"),
        ("labels", np.zeros(500, np.uint8), r"labels\.npy does not hold the labels 0 to 9"),
        ("labels", np.array([{"evil": 1}] * 500), r"labels\.npy cannot be read \(.*Python objects"),
    ],
)
def test_unusable_cifar10_c(cifar10_c, name, content, message):
    path = cifar10_c / f"{name}.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(InputError, match=message):
        load_dataset("cifar10-c:fog:1", root=cifar10_c.parent)


# --- Visual Wake Words ----------------------------------------------------------------------------


PERSON, DOG = 1, 18


@pytest.fixture
def coco_root(tmp_path):
    """20 images to train on, 4 to test; every second one shows a person."""
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


def test_vww_is_a_person_in_more_than_half_a_per_cent_of_the_image(coco_root):
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


# --- batches --------------------------------------------------------------------------------------


def all_of(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


def test_evaluation_batches_come_in_order_and_normalised(few_digits):
    images, labels = all_of(loader(few_digits.test, CONFIG, few_digits.policy, batch_size=16))
    assert images.shape == (40, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() == -1 and images.max() == 1, "0..255 becomes -1..1 with mean and std of a half"
    assert labels.tolist() == few_digits.test.labels.tolist()


@pytest.mark.parametrize("policy", [Policy(), Policy(flip=True), Policy(crop_scale=(0.5, 1.0), flip=True)])
def test_training_batches_do_not_depend_on_workers_or_on_the_global_generator(few_digits, policy):
    def make(workers, first_batch=0):
        return all_of(
            loader(
                few_digits.train,
                CONFIG,
                policy,
                batch_size=32,
                seed=5,
                epoch=2,
                workers=workers,
                first_batch=first_batch,
            )
        )

    torch.manual_seed(1)
    before = torch.get_rng_state()
    images, labels = make(workers=0)
    assert torch.equal(torch.get_rng_state(), before), "loading leaves the global generator alone"
    torch.manual_seed(2)
    for again in (make(workers=2), make(workers=0)):
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    resumed = make(workers=0, first_batch=2)
    assert torch.equal(resumed[0], images[64:]) and torch.equal(resumed[1], labels[64:])
    assert sorted(labels.tolist()) == sorted(few_digits.train.labels.tolist())


def test_epochs_and_seeds_shuffle_differently(few_digits):
    def labels(seed, epoch):
        return all_of(loader(few_digits.train, CONFIG, Policy(), batch_size=32, seed=seed, epoch=epoch))[
            1
        ].tolist()

    assert len({tuple(labels(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_flip_mirrors_about_half_of_the_training_images(few_digits):
    plain, _ = all_of(loader(few_digits.train, CONFIG, Policy(), batch_size=96, seed=0))
    flipped, _ = all_of(loader(few_digits.train, CONFIG, Policy(flip=True), batch_size=96, seed=0))
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped)]
    assert all(m or s for m, s in zip(mirrored, same))
    assert 30 < sum(mirrored) < 66


def test_size_and_normalisation_are_the_backbones(few_digits):
    model = toolkit.build_backbone("vit_small", 10, pretrained=False)
    config = data_config(model)
    images, _ = next(iter(loader(few_digits.test, config, few_digits.policy, batch_size=4)))
    assert images.shape[1:] == config["input_size"] == (3, 224, 224)
    black = (0 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    assert torch.allclose(images[0, :, 0, 0], black)


# --- folders --------------------------------------------------------------------------------------


def write_image(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


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


def test_images_of_several_sizes_are_squeezed_one_by_one_where_there_are_no_crops(photos):
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.mkdir(), "at least two; found none"),
        (lambda root: write_image(root / "cat" / "1.png"), "found only 'cat'"),
        (
            lambda root: [write_image(root / "cat" / "1.png"), (root / "dog").mkdir()],
            "class 'dog' has no images",
        ),
        (lambda root: [write_image(root / c / "1.png") for c in ("cat", "dog")], "cannot be split"),
        (
            lambda root: [write_image(root / "train" / c / "1.png") for c in ("cat", "dog")],
            "lacks val/, test/",
        ),
    ],
)
def test_unusable_folders(tmp_path, make, message):
    make(tmp_path / "photos")
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(f"folder:{tmp_path / 'photos'}")
    assert str(tmp_path / "photos") in str(caught.value)


# --- through torchvision --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("dtd", "dtd-r1.0.1.tar.gz"),
    ],
)
def test_no_network_says_what_to_put_where(tmp_path, name, archive):
    with pytest.raises(InputError) as caught:
        load_dataset(name, root=tmp_path)
    assert archive in str(caught.value) and str(tmp_path) in str(caught.value)


def test_dtd_keeps_the_three_parts_of_partition_1_apart(tmp_path):
    root = tmp_path / "dtd" / "dtd"
    lists = {"train": [0, 1], "val": [2], "test": [3]}
    for name in ("banded", "woven"):
        for number in range(4):
            write_image(root / "images" / name / f"{name}_{number}.jpg", seed=number)
    for partition, shift in ((1, 0), (2, 1)):
        for split, numbers in lists.items():
            lines = [f"{n}/{n}_{(i + shift) % 4}.jpg" for n in ("banded", "woven") for i in numbers]
            path = root / "labels" / f"{split}{partition}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines))
    splits = load_dataset("dtd", root=tmp_path)
    assert splits.classes == ["banded", "woven"]
    for split, numbers in lists.items():
        names = [path.name for path, _ in getattr(splits, split).samples]
        assert names == [f"{n}_{i}.jpg" for n in ("banded", "woven") for i in numbers]


@pytest.mark.parametrize(
    ("name", "count", "labels_key", "names_key"),
    [("cifar100", 100, "fine_labels", "fine_label_names"), ("cifar10", 10, "labels", "label_names")],
)
def test_cifar_takes_validation_from_the_training_set(
    tmp_path, monkeypatch, name, count, labels_key, names_key
):
    """1,000 and 100 images in CIFAR's format; torchvision's own reader checks and reads them."""
    kind = getattr(torchvision.datasets, name.upper())
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file, content) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for file, images in (("train", 1000), ("test", 100)):
        pixels = np.random.default_rng(images).integers(0, 256, (images, 3072), dtype=np.uint8)
        digest = write(file, {"data": pixels, labels_key: [i % count for i in range(images)]})
        monkeypatch.setattr(kind, f"{file}_list", [[file, digest]])
    meta = {"filename": "meta", "key": names_key}
    meta["md5"] = write("meta", {names_key: [f"class {i}" for i in range(count)]})
    monkeypatch.setattr(kind, "meta", meta)
    splits = load_dataset(name, root=tmp_path)
    assert [len(splits.train), len(splits.val), len(splits.test)] == [900, 100, 100]
    assert len(splits.classes) == count
    assert np.bincount(splits.val.labels).tolist() == [100 // count] * count
    image, _ = splits.test[0]
    assert image.shape == (3, 32, 32)
    train = {image.tobytes() for image in splits.train.images}
    assert not train & {image.tobytes() for image in splits.val.images}
