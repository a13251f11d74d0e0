"""Corruptions: what they keep, what they depend on, and that each severity is worse than the one before."""

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

from toolkit.datasets import load_dataset
from toolkit.datasets.corruptions import CORRUPTIONS, MIXED, corrupt, enlarged

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
def test_shape_and_type_are_kept_and_the_images_are_changed(name, severity, colour, side):
    images = pictures(7, colour, side)
    before = images.copy()
    changed = corrupt(images, name, severity, "train")
    assert changed.shape == images.shape and changed.dtype == np.uint8
    assert (changed != images).reshape(7, -1).any(axis=1).all()
    assert np.array_equal(images, before), "the clean images are left alone"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_comes_out_the_same_whatever_comes_after_it(name):
    images = pictures(8)
    assert np.array_equal(corrupt(images, name, 4, "val")[:3], corrupt(images[:3], name, 4, "val"))


def test_noise_is_of_the_index_the_severity_and_the_split():
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
    """Which corruption gives the mixed image, for each."""
    mixed = corrupt(images, MIXED, severity, split)
    alone = {name: corrupt(images, name, severity, split) for name in CORRUPTIONS}
    found = [
        [name for name in alone if np.array_equal(alone[name][i], image)] for i, image in enumerate(mixed)
    ]
    assert all(len(names) == 1 for names in found)
    return [name for [name] in found]


def test_mixed_deals_the_six_in_equal_parts_and_an_image_keeps_its_own():
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
def test_a_plain_image_has_nothing_to_lose(name):
    plain = np.full((1, 32, 32), 128, np.uint8)
    assert np.array_equal(corrupt(plain, name, 5, "train"), plain)


@pytest.mark.parametrize("name", ["gaussian_blur", "contrast", "brightness", "pixelate", "jpeg_compression"])
def test_grey_is_grey_in_one_channel_and_in_three(name):
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
