"""Mosaics and scenes of digits: exact masks and boxes, and splits that share no pixel."""

import numpy as np
import pytest
import skimage.data
import torch

from toolkit.datasets import composed, load_dataset
from toolkit.datasets.embedded import digits


@pytest.mark.parametrize("name", ["mosaics", "digit_scenes"])
def test_an_embedded_set_is_the_same_every_time(name, embedded):
    first = embedded[name]
    assert load_dataset(name).hashes == first.hashes and len(set(first.hashes.values())) == 3
    assert first.train[0][0].shape == (3, 64, 64) and first.train[0][0].dtype == torch.uint8


def test_mosaics_have_two_to_five_large_regions(embedded):
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
    """The pixels of the photograph hold the number of their tile of 64 px."""
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


def test_scenes_show_their_background_outside_instances(monkeypatch):
    rng = np.random.default_rng(3)
    tile = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    monkeypatch.setattr(composed, "varied", lambda rng, tile: tile)
    for row in range(20):
        image, target = composed._scene(np.random.default_rng(row), [tile[None]], digits().train)
        outside = target["instances"].numpy() == 0
        assert (image[:, outside] == tile[outside]).all()
        assert (image[:, ~outside] != tile[~outside]).any(0).mean() > 0.9
