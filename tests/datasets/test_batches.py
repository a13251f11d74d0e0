"""Batches: order, augmentation, normalisation, and masks and boxes that move with their images."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import CONFIG
from torch.utils._pytree import tree_leaves

import toolkit
from toolkit.backbones import data_config
from toolkit.datasets import Policy, loader
from toolkit.datasets.splits import InMemory
from toolkit.errors import InputError


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


# --- masks and boxes ------------------------------------------------------------------------------


def config(side: int) -> dict:
    return CONFIG | {"input_size": (3, side, side)}


def test_masks_are_long_integers_at_the_input_size(embedded):
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
    """The box of each image's left half, like its instance, becomes the left half of the input."""
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


def test_boxes_are_padded_to_the_largest_count_of_the_batch_and_at_least_one(embedded):
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
