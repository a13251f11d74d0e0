"""Batches of a split in the form that a backbone asks for, shuffled and augmented from a seed.

Resolution and normalisation are the backbone's, cropping and flipping the data set's.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from toolkit.datasets.splits import Policy
from toolkit.errors import InputError

Targets = torch.Tensor | dict[str, torch.Tensor]


def loader(
    split: Dataset,
    config: dict,
    policy: Policy,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    first_batch: int = 0,
    workers: int | None = None,
) -> DataLoader:
    """Batches `(images, targets)`: float (B, 3, H, W) as `config` asks, and targets by the split's task.

    Classes are int64 (B,), and masks int64 (B, H, W) at the input's resolution, by nearest neighbour:
    a score that is computed on them is that of the resized masks.  Boxes are a dict: `"boxes"` float32
    (B, M, 5), x1, y1, x2, y2 in pixels of the input and the class, padded by rows of class -1 to the most
    boxes of an image in the batch, at least one; and `"instances"` uint8 (B, H, W) if the split has them.
    Squeezing an image changes no IoU of boxes, but it does change which ones COCO calls small or large.

    `config` has timm's keys (`backbones.data_config(model)`).  With a `seed` the images are shuffled
    and augmented, without they come in order and unchanged.  The shuffle is drawn from (seed, epoch)
    and each image's augmentation from (seed, epoch, index): whichever worker loads it, and whether or
    not the epoch is entered at `first_batch` after an interruption, an image comes out the same.
    `workers`: processes that load; None takes one per core, up to four, where images are decoded or cropped.
    """
    if workers is None:
        slow = policy.crop_scale is not None or getattr(split, "decodes", False)
        workers = min(4, os.cpu_count() or 1) if slow else 0
    return DataLoader(
        _Batches(split, config, policy, seed, epoch),
        sampler=batch_rows(len(split), batch_size, seed, epoch)[first_batch:],
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that making an iterator does not draw from the global one
    )


def batch_rows(count: int, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """The rows of each batch of a split of `count` images: shuffled by (seed, epoch), or in order."""
    if seed is None:
        order = list(range(count))
    else:
        order = torch.randperm(count, generator=_generator(seed, epoch)).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


class _Batches(Dataset):
    """Indexed by the rows of a batch.  What is alike for all its images is done once, on the stack."""

    def __init__(self, split: Dataset, config: dict, policy: Policy, seed: int | None, epoch: int):
        self.split, self.policy, self.seed, self.epoch = split, policy, seed, epoch
        self.size = size = tuple(config["input_size"][1:])
        interpolation = v2.InterpolationMode(config["interpolation"])
        resize = functools.partial(v2.Resize, interpolation=interpolation, antialias=True)
        self.squeeze = resize(size)
        if policy.crop_scale is None:  # images taken whole
            self.frame = None
        elif seed is not None:
            self.frame = v2.RandomResizedCrop(size, scale=policy.crop_scale, interpolation=interpolation)
        else:
            self.frame = v2.Compose([resize(round(max(size) / config["crop_pct"])), v2.CenterCrop(size)])
        self.finish = v2.Compose(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        )
        if policy.flip and seed is not None:
            self.flipped = torch.rand(len(split), generator=_generator(seed, epoch, "flip")) < 0.5
        else:
            self.flipped = torch.zeros(len(split), dtype=torch.bool)

    def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, Targets]:
        images, targets = zip(*(self.split[row] for row in rows))
        flipped = self.flipped[rows]
        dense = isinstance(targets[0], dict) or np.ndim(targets[0]) == 2
        if dense and self.frame is not None:
            raise InputError("Policy.crop_scale crops images, not masks and boxes: give None.")
        if isinstance(targets[0], dict):
            targets = _boxes(targets, [image.shape[1:] for image in images], self.size, flipped)
        elif dense:
            targets = _masks(targets, self.size, flipped).long()
        else:
            targets = torch.tensor(targets)
        if self.frame is not None:
            batch = torch.stack([self._framed(image, row) for image, row in zip(images, rows)])
        else:
            batch = _squeezed(images, self.squeeze)
        batch = self.finish(batch)  # (B, 3, H, W)
        batch[flipped] = batch[flipped].flip(-1)
        return batch, targets

    def _framed(self, image: torch.Tensor, row: int) -> torch.Tensor:
        if self.seed is None:
            return self.frame(image)
        # Not torch.manual_seed: that would reseed the GPU's generator, and with it dropout, too.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mix(self.seed, self.epoch, row))
        framed = self.frame(image)
        torch.default_generator.set_state(before)
        return framed


def _squeezed(images: Sequence[torch.Tensor], resize: v2.Resize) -> torch.Tensor:
    """The stack of `images` (..., h, w), each resized; at once if they are of one size."""
    if len({image.shape for image in images}) == 1:
        return resize(torch.stack(images))
    return torch.stack([resize(image) for image in images])


def _masks(masks: Sequence[torch.Tensor], size: tuple[int, int], flipped: torch.Tensor) -> torch.Tensor:
    """Masks (h, w) as uint8 (B, H, W); nearest-exact takes the same places as the images' bilinear."""
    resize = v2.Resize(size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    batch = _squeezed([mask[None] for mask in masks], resize)[:, 0]
    batch[flipped] = batch[flipped].flip(-1)
    return batch


def _boxes(
    targets: Sequence[dict[str, torch.Tensor]],
    sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    flipped: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Boxes in pixels of images of `sizes`, as those of the input of `size`, both (height, width)."""
    height, width = size
    boxes = torch.zeros(len(targets), max(1, *(len(target["boxes"]) for target in targets)), 5)
    boxes[..., 4] = -1  # padding
    for row, (target, (h, w)) in enumerate(zip(targets, sizes)):
        found = target["boxes"] * torch.tensor([width / w, height / h, width / w, height / h, 1])
        if flipped[row]:
            found[:, [0, 2]] = width - found[:, [2, 0]]
        boxes[row, : len(found)] = found
    batch = {"boxes": boxes}
    if "instances" in targets[0]:
        batch["instances"] = _masks([target["instances"] for target in targets], size, flipped)
    return batch


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*key))


def _mix(*key: object) -> int:
    """One 63-bit seed from several values."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
