"""Digits and textures: sizes, splits and hashes."""

import numpy as np
import pytest
import torch

from toolkit.datasets import load_dataset
from toolkit.datasets.embedded import TEXTURE_CROPS, assign_tiles
from toolkit.errors import InputError


def test_digits_is_split_three_ways(digits):
    assert [len(digits.train), len(digits.val), len(digits.test)] == [1077, 270, 450]
    assert len(digits.classes) == 10
    for split in (digits.train, digits.val, digits.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() <= 0.15 * counts.mean(), "classes are stratified"
    image, label = digits.train[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and isinstance(label, int)


def test_texture_crops_of_two_splits_share_no_pixel():
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


def test_an_unknown_data_set_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"unknown dataset 'digit'.*Did you mean 'digits'.*folder:PATH"):
        load_dataset("digit")
