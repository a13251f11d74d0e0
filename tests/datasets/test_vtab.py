import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

import toolkit
from toolkit.batch.sweep_file import preset
from toolkit.datasets import load_dataset, loader, vtab
from toolkit.datasets.vtab import VTAB, load_vtab
from toolkit.errors import InputError

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """20 training and 8 validation images."""
    monkeypatch.setattr(vtab, "TRAIN", 20)
    monkeypatch.setattr(vtab, "VAL", 8)


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    for module in (torchvision.datasets.utils, *sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torchvision.datasets"):
            for name in ("download_url", "download_and_extract_archive", "download_file_from_google_drive"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(vtab, "download_and_extract_archive", refuse)


def write_image(path: Path, number: int, size=(12, 10)) -> None:
    """Write an image whose first pixel holds its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[0, 0] = number % 256, number // 256, 0
    Image.fromarray(pixels).save(path, format="PNG")  # lossless, whatever the name says


def sizes(splits) -> list[int]:
    return [len(getattr(splits, split)) for split in SPLITS]


def paths(splits, split) -> set[Path]:
    return {path for path, _ in getattr(splits, split).samples}


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flower102", "resisc45"])
def test_an_unknown_task_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(InputError, match=rf"unknown dataset 'vtab:{name}'.*vtab:flowers102"):
        load_dataset(f"vtab:{name}", tmp_path)


@pytest.mark.parametrize("name", [name for name in VTAB if name != "camelyon"])
def test_missing_data_is_downloaded_or_named(tmp_path, no_download, name):
    with pytest.raises(
        InputError, match=rf"'(vtab:)?{name}' is not in .*its server cannot be reached.*Put .* from http"
    ):
        load_vtab(name, tmp_path)


def test_camelyon_without_h5py_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match="install h5py"):
        load_vtab("camelyon", tmp_path)


def test_the_preset_names_tasks_that_exist_and_builds_offline():
    experiments = preset("vtab")
    tasks = {e.dataset.removeprefix("vtab:") for e in experiments}
    assert tasks == VTAB.keys() and len(experiments) == 5 * 3 * len(VTAB)
    assert {e.method for e in experiments} == {"losa", "lst", "lora", "linear", "full"}
    assert {e.seed for e in experiments} == {0, 1, 2}
    assert all(isinstance(e, toolkit.Experiment) for e in experiments)


# --- arrays ---------------------------------------------------------------------------------------


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    """60 train and 12 test images in SVHN's .mat files; an image's pixels hold its number."""
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    folder = tmp_path / "svhn"
    folder.mkdir()
    for split, count, start in (("train", 60, 0), ("test", 12, 100)):
        images = np.zeros((32, 32, 3, count), np.uint8)
        images[:, :, 1] = start + np.arange(count)
        labels = 1 + np.arange(count, dtype=np.uint8)[:, None] % 10  # 10 is the digit 0
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": images, "y": labels})
    return tmp_path


def test_svhn_draws_train_and_val_from_the_official_train(svhn):
    splits = load_vtab("svhn", svhn)
    assert splits.name == "vtab:svhn" and sizes(splits) == [20, 8, 12] and len(splits.classes) == 10
    numbers = {split: getattr(splits, split).images[:, 1, 0, 0].tolist() for split in SPLITS}
    assert numbers["test"] == list(range(100, 112)), "the whole official test split"
    drawn = numbers["train"] + numbers["val"]
    assert len(set(drawn)) == 28 and max(drawn) < 60
    assert numbers["train"] == sorted(numbers["train"]) and max(numbers["train"]) > min(numbers["val"])
    for split in SPLITS:
        data = getattr(splits, split)
        assert all(label == (number % 100 + 1) % 10 for number, label in zip(numbers[split], data.labels))
    assert splits.train[0][0].shape == (3, 32, 32)


def test_the_seed_determines_rows_and_hashes(svhn):
    first, again, other = (load_vtab("svhn", svhn, seed=seed) for seed in (0, 0, 1))
    assert first.hashes == again.hashes
    assert first.hashes["test"] == other.hashes["test"]
    assert first.hashes["train"] != other.hashes["train"] and first.hashes["val"] != other.hashes["val"]


def test_a_split_too_small_to_draw_from_is_refused(svhn, monkeypatch):
    monkeypatch.setattr(vtab, "TRAIN", 53)
    with pytest.raises(InputError, match="vtab:svhn draws 61 images from a split that has 60"):
        load_vtab("svhn", svhn)


def test_cifar100_is_channels_last_in_torchvision(tmp_path, monkeypatch):
    class Cifar:
        classes = ("a", "b")

        def __init__(self, root, train, download):
            count = 40 if train else 6
            self.data = np.zeros((count, 32, 32, 3), np.uint8)
            self.data[:, 2, 5, 1] = np.arange(count)
            self.targets = [number % 2 for number in range(count)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Cifar)
    splits = load_vtab("cifar100", tmp_path)
    image, label = splits.test[5]
    assert image.shape == (3, 32, 32) and image[1, 2, 5] == 5 and label == 1
    assert sizes(splits) == [20, 8, 6]


def test_camelyon_reads_only_the_rows_that_it_draws(tmp_path, monkeypatch):
    class Lazy:
        """As h5py's data sets: rows are read when they are asked for."""

        def __init__(self, array):
            self.array, self.shape = array, array.shape

        def __getitem__(self, rows):
            read.append(len(self.array[rows]))
            return self.array[rows]

        def __array__(self, dtype=None, copy=None):
            return self.array

    def file(path):
        with np.load(Path(path), allow_pickle=False) as content:
            return {key: Lazy(content[key]) for key in content.files}

    read = []
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=file))
    folder = tmp_path / "pcam"
    folder.mkdir()
    for split, count in (("train", 50), ("val", 30), ("test", 9)):
        images = np.zeros((count, 96, 96, 3), np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        names = torchvision.datasets.PCAM._FILES[split]
        for what, content in (
            ("images", {"x": images}),
            ("targets", {"y": (np.arange(count) % 2).reshape(-1, 1, 1, 1)}),
        ):
            with open(folder / names[what][0], "wb") as out:
                np.savez(out, **content)
    splits = load_vtab("camelyon", tmp_path)
    assert sizes(splits) == [20, 8, 9] and sorted(read) == [8, 9, 20]
    for split in SPLITS:
        data = getattr(splits, split)
        assert data.images.shape[1:] == (3, 96, 96)
        assert (data.labels == data.images[:, 0, 0, 0] % 2).all()


# --- lists in .mat and text files -----------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """90 images in three classes: 40 for training, then 25 for validation."""
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    folder = tmp_path / "flowers-102"
    for number in range(1, 91):
        write_image(folder / "jpg" / f"image_{number:05}.jpg", number, size=(8 + number % 3, 9))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": 1 + np.arange(90) % 3})
    scipy.io.savemat(
        folder / "setid.mat",
        {"trnid": np.arange(1, 41), "valid": np.arange(41, 66), "tstid": np.arange(66, 91)},
    )
    return tmp_path


def test_flowers_draw_val_from_the_official_val(flowers):
    splits = load_vtab("flowers102", flowers)
    assert sizes(splits) == [20, 8, 25] and len(splits.classes) == 102
    limits = {"train": (1, 40), "val": (41, 65), "test": (66, 90)}
    for split, (first, last) in limits.items():
        for path, label in getattr(splits, split).samples:
            number = int(path.stem.removeprefix("image_"))
            assert first <= number <= last and label == (number - 1) % 3
    image, _ = splits.train[0]
    number = int(splits.train.samples[0][0].stem.removeprefix("image_"))
    assert image[0, 0, 0] == number, "the picture of the row"


def test_images_of_several_sizes_are_resized_whole(flowers):
    splits = load_vtab("flowers102", flowers)
    config = {
        "input_size": (3, 16, 16), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear",
        "crop_pct": 0.9,
    }  # fmt: skip
    for seed in (None, 3):
        batches = loader(splits.train, config, splits.policy, batch_size=20, seed=seed, workers=0)
        [(images, labels)] = batches
        assert images.shape == (20, 3, 16, 16) and labels.shape == (20,)
    [(again, _)] = loader(splits.train, config, splits.policy, batch_size=20, seed=3, epoch=1, workers=0)
    order = torch.sort(images[:, 0, 0, 0]).indices, torch.sort(again[:, 0, 0, 0]).indices
    assert torch.equal(images[order[0]], again[order[1]]), "no augmentation"


def test_dtd_keeps_its_three_splits(tmp_path):
    folder = tmp_path / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    number = 0
    for split, count in (("train", 30), ("val", 10), ("test", 6)):
        lines = []
        for _ in range(count):
            name = ("banded", "dotted")[number % 2]
            write_image(folder / "images" / name / f"{number}.jpg", number)
            lines.append(f"{name}/{number}.jpg")
            number += 1
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")
    splits = load_vtab("dtd", tmp_path)
    assert sizes(splits) == [20, 8, 6] and splits.classes == ["banded", "dotted"]
    assert all(30 <= int(path.stem) < 40 for path in paths(splits, "val"))


def test_pets_draw_train_and_val_from_trainval(tmp_path):
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 40), ("test", 10)):
        lines = []
        for number in range(count):
            name = f"{('Abyssinian', 'beagle')[number % 2]}_{split}{number}"
            write_image(folder / "images" / f"{name}.jpg", number)
            lines.append(f"{name} {1 + number % 2} {1 + number % 2} 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    splits = load_vtab("pets", tmp_path)
    assert sizes(splits) == [20, 8, 10] and splits.classes == ["Abyssinian", "Beagle"]
    assert not paths(splits, "train") & paths(splits, "val")


# --- one folder per class -------------------------------------------------------------------------


def test_caltech_trains_on_thirty_per_class_and_has_the_background(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(("BACKGROUND_Google", "ant", "wrench")):
        for number in range(1, 36 + label):
            write_image(folder / name / f"image_{number:04}.jpg", number)
    splits = load_vtab("caltech101", tmp_path)
    assert splits.classes == ["BACKGROUND_Google", "ant", "wrench"]
    labels = np.bincount([label for _, label in splits.test.samples])
    assert labels.tolist() == [5, 6, 7], "all but thirty of each class"
    assert not (paths(splits, "train") | paths(splits, "val")) & paths(splits, "test")
    other = load_vtab("caltech101", tmp_path, seed=1)
    assert other.hashes["test"] == splits.hashes["test"] and other.hashes["train"] != splits.hashes["train"]


def test_eurosat_has_one_fixed_test_split(tmp_path):
    for label, name in enumerate(("Forest", "River")):
        for number in range(50):
            write_image(tmp_path / "eurosat" / "2750" / name / f"{name}_{number}.jpg", 100 * label + number)
    first, other = (load_vtab("eurosat", tmp_path, seed=seed) for seed in (0, 1))
    assert sizes(first) == [20, 8, 20]
    assert paths(first, "test") == paths(other, "test") and paths(first, "val") != paths(other, "val")
    assert not (paths(first, "train") | paths(first, "val")) & paths(first, "test")
    assert len({label for _, label in first.test.samples}) == 2


def test_sun397_does_not_depend_on_the_order_of_the_disk(tmp_path, monkeypatch):
    folder = tmp_path / "SUN397"
    (folder / "a").mkdir(parents=True)
    (folder / "ClassName.txt").write_text("/a/abbey\n/b/bar/inside\n")
    for number in range(100):
        place = ("a/abbey", "b/bar/inside")[number % 2]
        write_image(folder / place / f"sun_{number:03}.jpg", number)
    splits = load_vtab("sun397", tmp_path)
    assert splits.classes == ["abbey", "bar/inside"] and sizes(splits) == [20, 8, 20]
    walk = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(walk(self, pattern))))
    assert load_vtab("sun397", tmp_path).hashes == splits.hashes


# --- scenes and roads -----------------------------------------------------------------------------


@pytest.fixture
def clevr(tmp_path):
    """Scenes of three to ten objects; the nearest moves from 7.6 to 10.6 with the scene's number."""
    folder = tmp_path / "clevr" / "CLEVR_v1.0"
    (folder / "scenes").mkdir(parents=True)
    for split, count in (("train", 40), ("val", 16)):
        scenes = []
        for number in range(count):
            name = f"CLEVR_{split}_{number:06}.png"
            write_image(folder / "images" / split / name, number)
            near = 7.6 + 3 * number / count
            objects = [{"pixel_coords": [1, 2, near + far]} for far in range(3 + number % 8)]
            scenes.append({"image_filename": name, "objects": objects[::-1]})
        (folder / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes[::-1]}))
    return tmp_path


def test_clevr_counts_objects_and_tests_on_val(clevr):
    splits = load_vtab("clevr_count", clevr)
    assert sizes(splits) == [20, 8, 16]
    assert (
        splits.classes[0] == "3 objects" and splits.classes[-1] == "10 objects" and len(splits.classes) == 8
    )
    for split in SPLITS:
        for path, label in getattr(splits, split).samples:
            assert label == int(path.stem[-6:]) % 8
            assert path.parent.name == ("val" if split == "test" else "train")


def test_clevr_labels_the_distance_of_the_nearest_object(clevr):
    """The label is the last of the benchmark's thresholds below the distance: 8 itself is class 0."""
    splits = load_vtab("clevr_distance", clevr)
    assert len(splits.classes) == 6 and splits.classes[1] == "8 to 8.5"
    for path, label in splits.test.samples:
        distance = 7.6 + 3 * int(path.stem[-6:]) / 16
        thresholds = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0])
        assert label == np.flatnonzero(thresholds - distance < 0).max()


def test_clevr_reads_scenes_once_and_refuses_damaged_ones(clevr, monkeypatch):
    load_vtab("clevr_count", clevr)
    monkeypatch.setattr(vtab, "_clevr_labels", lambda *a: pytest.fail("read again"))
    load_vtab("clevr_count", clevr)
    monkeypatch.undo()
    (clevr / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json").write_text("{}")
    with pytest.raises(InputError, match=r"CLEVR_val_scenes\.json is not CLEVR's list of scenes.*unpack"):
        load_vtab("clevr_count", clevr)


def metres(i):
    return 7 * i % 40


@pytest.fixture
def kitti(tmp_path):
    """120 images of 24 videos; the nearest vehicle is at `metres(i)`, in every tenth image there is none."""
    raw = tmp_path / "Kitti" / "raw"
    (raw / "mapping").mkdir(parents=True)
    order = np.random.default_rng(5).permutation(120)
    lines = [f"2011_09_26 2011_09_26_drive_{line // 5:04}_sync {line % 5:010}" for line in range(120)]
    (raw / "mapping" / "train_mapping.txt").write_text("\n".join(lines) + "\n")
    (raw / "mapping" / "train_rand.txt").write_text(",".join(str(1 + line) for line in order))
    (raw / "training" / "label_2").mkdir(parents=True)
    for i in range(120):
        write_image(raw / "training" / "image_2" / f"{i:06}.png", i)
        near = "Pedestrian" if i % 10 == 0 else ("Car", "Van", "Truck")[i % 3]
        told = [(near, metres(i)), ("Car", 300) if i % 10 else ("Tram", 1), ("DontCare", -1000)]
        text = "".join(f"{what} 0.00 0 0.1 1 2 3 4 1.5 1.6 3.7 0.5 1.7 {z} 0.2\n" for what, z in told)
        (raw / "training" / "label_2" / f"{i:06}.txt").write_text(text)
    return tmp_path, order // 5


def test_kitti_is_split_by_video(kitti, monkeypatch):
    root, video = kitti
    monkeypatch.setattr(vtab, "VAL", 6)
    splits = load_vtab("kitti_distance", root)
    seen = {split: {video[int(path.stem)] for path in paths(splits, split)} for split in SPLITS}
    assert len(seen["test"]) == 2 and len(splits.test) == 10 and len(seen["val"]) <= 2
    assert not seen["test"] & (seen["train"] | seen["val"]) and not seen["train"] & seen["val"]


def test_kitti_labels_the_distance_of_the_nearest_vehicle(kitti, monkeypatch):
    root, _ = kitti
    monkeypatch.setattr(vtab, "VAL", 6)
    splits = load_vtab("kitti_distance", root)
    assert splits.classes == ["up to 8 m", "8 to 20 m", "beyond 20 m", "no vehicle"]
    for split in SPLITS:
        for path, label in getattr(splits, split).samples:
            i = int(path.stem)
            assert label == (3 if i % 10 == 0 else 0 if metres(i) <= 8 else 1 if metres(i) <= 20 else 2)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("training/label_2/000007.txt", "Car 0.00\n", r"000007\.txt is not KITTI's list of objects"),
        ("mapping/train_rand.txt", "1,2,999", r"train_rand\.txt is not a list of lines"),
        ("mapping/train_rand.txt", "one", r"train_rand\.txt is not a list of lines"),
    ],
)
def test_damaged_kitti_is_refused(kitti, file, content, message):
    root, _ = kitti
    (root / "Kitti" / "raw" / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_vtab("kitti_distance", root)


def test_load_dataset_finds_a_task_by_its_name(svhn):
    assert load_dataset("vtab:svhn", root=svhn).hashes == load_vtab("svhn", svhn).hashes
