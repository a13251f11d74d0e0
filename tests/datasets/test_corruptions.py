"""Corruptions and the data sets made of them: what they depend on, and that each severity is worse."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency
from sklearn.linear_model import RidgeClassifier

import toolkit
from toolkit.datasets import corruptions, find_dataset, load_dataset
from toolkit.datasets.corruptions import CORRUPTIONS, MIXED, corrupt, enlarged
from toolkit.errors import InputError

NAMES = [*CORRUPTIONS, MIXED]
LEVELS = range(1, 6)


def pictures(count: int = 6, colour: bool = False, side: int = 32) -> np.ndarray:
    """Random rectangles on a grey ground, uint8 (count, side, side) or (count, 3, side, side)."""
    rng = np.random.default_rng(0)
    images = np.full((count, 3, side, side) if colour else (count, side, side), 100, np.uint8)
    for image in images:
        for _ in range(4):
            y, x = rng.integers(0, side - 8, 2)
            image[..., y : y + 8, x : x + 8] = rng.integers(0, 256, (*image.shape[:-2], 1, 1))
    return images


@settings(max_examples=30)
@given(st.sampled_from(NAMES), st.sampled_from(LEVELS), st.booleans(), st.sampled_from([24, 48]))
def test_corruptions_change_images_but_not_their_shape_and_type(name, severity, colour, side):
    images = pictures(7, colour, side)
    before = images.copy()
    changed = corrupt(images, name, severity, "train")
    assert changed.shape == images.shape and changed.dtype == np.uint8
    assert (changed != images).reshape(7, -1).any(axis=1).all()
    assert np.array_equal(images, before), "the clean images are left alone"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_does_not_depend_on_those_after_it(name):
    images = pictures(8)
    assert np.array_equal(corrupt(images, name, 4, "val")[:3], corrupt(images[:3], name, 4, "val"))


def test_noise_depends_on_index_severity_and_split():
    images = np.full((2, 16, 16), 128, np.uint8)
    first, second = corrupt(images, "gaussian_noise", 2, "train").astype(float) - 128
    [other] = corrupt(images[:1], "gaussian_noise", 2, "test").astype(float) - 128
    [stronger] = corrupt(images[:1], "gaussian_noise", 3, "train").astype(float) - 128
    for noise in (second, other, stronger):
        assert abs(np.corrcoef(first.ravel(), noise.ravel())[0, 1]) < 0.3
    assert first.std() == pytest.approx(255 * CORRUPTIONS["gaussian_noise"][1][1], rel=0.15)


def test_another_process_makes_the_same_images():
    make = "corrupt(np.arange(7 * 256, dtype=np.uint8).reshape(7, 16, 16), 'mixed', 5, 'train').tobytes()"
    program = (
        "import hashlib; import numpy as np; from toolkit.datasets.corruptions import corrupt; "
        f"print(hashlib.sha256({make}).hexdigest())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == hashlib.sha256(eval(make)).hexdigest()


# --- severities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["digits", "textures"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_is_further_from_the_clean_images(dataset, name):
    clean = load_dataset(dataset).test.images[::15]
    if dataset == "digits":
        clean = enlarged(clean)
    distances = [np.abs(corrupt(clean, name, s, "test") - clean.astype(float)).mean() for s in LEVELS]
    assert all(a < b for a, b in pairwise([0, *distances]))


def test_a_classifier_of_clean_digits_gets_worse_with_the_severity():
    clean = load_dataset("digits")
    train, test = (enlarged(split.images) for split in (clean.train, clean.test))
    model = RidgeClassifier(alpha=100.0).fit(train.reshape(len(train), -1) / 255, clean.train.labels)

    def top1_pct(images: np.ndarray) -> float:
        return 100 * model.score(images.reshape(len(images), -1) / 255, clean.test.labels)

    accuracies = [top1_pct(test), *(top1_pct(corrupt(test, MIXED, s, "test")) for s in (1, 3, 5))]
    assert all(a > b for a, b in pairwise(accuracies)), accuracies
    assert accuracies[0] - 15 > accuracies[-1] > 30, "hard, and not chance"


# --- mixed ----------------------------------------------------------------------------------------


def corruption_of(images: np.ndarray, severity: int, split: str) -> list[str]:
    """Name the corruption that made each mixed image."""
    mixed = corrupt(images, MIXED, severity, split)
    alone = {name: corrupt(images, name, severity, split) for name in CORRUPTIONS}
    found = [
        [name for name in alone if np.array_equal(alone[name][i], image)] for i, image in enumerate(mixed)
    ]
    assert all(len(names) == 1 for names in found)
    return [name for [name] in found]


def test_mixed_assigns_the_six_evenly_and_alike_in_all_severities():
    images = pictures(31)
    dealt = corruption_of(images, 2, "train")
    counts = [dealt.count(name) for name in CORRUPTIONS]
    assert max(counts) - min(counts) <= 1
    assert corruption_of(images, 5, "train") == dealt
    assert corruption_of(images, 2, "test") != dealt
    assert dealt != (list(CORRUPTIONS) * 6)[:31], "not in turn: data sets are often sorted by class"


def test_mixed_is_independent_of_the_class():
    """Ten classes of 36 images, sorted: the counts of corruptions by class are those of chance."""
    dealt = corruption_of(pictures(360, side=24), 3, "train")
    counts = [[dealt[start : start + 36].count(name) for name in CORRUPTIONS] for start in range(0, 360, 36)]
    assert chi2_contingency(counts).pvalue > 0.05
    assert np.ptp(counts) > 0, "nor are they dealt out within a class"


# --- what each of them does -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian_blur", "contrast", "pixelate", "jpeg_compression"])
def test_a_uniform_image_stays_unchanged(name):
    plain = np.full((1, 32, 32), 128, np.uint8)
    assert np.array_equal(corrupt(plain, name, 5, "train"), plain)


@pytest.mark.parametrize("name", ["gaussian_blur", "contrast", "brightness", "pixelate", "jpeg_compression"])
def test_grey_images_come_out_alike_in_one_channel_and_in_three(name):
    grey = pictures()
    colour = corrupt(np.repeat(grey[:, None], 3, axis=1), name, 3, "train")
    difference = colour.astype(int) - corrupt(grey, name, 3, "train")[:, None]
    assert np.abs(difference).max() <= (3 if name == "jpeg_compression" else 0)  # YCbCr and back rounds


def test_brightness_adds_and_contrast_keeps_the_mean():
    images = pictures().clip(90, 130)
    brighter, flatter = (
        corrupt(images, name, 3, "train").astype(float) for name in ("brightness", "contrast")
    )
    assert np.unique(brighter - images).tolist() == [51]  # 0.2 x 255
    assert np.abs(flatter.mean(axis=(1, 2)) - images.mean(axis=(1, 2))).max() < 0.5
    assert np.allclose(flatter.std(axis=(1, 2)), 0.55 * images.std(axis=(1, 2)), atol=0.5)


# --- the data sets made of them --------------------------------------------------------------------


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
def test_bad_names_of_shifted_sets_are_refused(name, message):
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


def test_cifar10_c_splits_the_images_of_one_severity(cifar10_c):
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
def test_damaged_cifar10_c_is_refused(cifar10_c, name, content, message):
    path = cifar10_c / f"{name}.npy"
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(InputError, match=message):
        load_dataset("cifar10-c:fog:1", root=cifar10_c.parent)
