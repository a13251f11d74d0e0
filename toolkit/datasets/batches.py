"""Batches of a split in the form that a backbone asks for, shuffled and augmented from a seed.

Resolution and normalisation are the backbone's, cropping and flipping the data set's.
"""

from __future__ import annotations

import functools
import hashlib
import os

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from toolkit.datasets.splits import Policy


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
    """Batches `(images, labels)`: float (B, 3, H, W) as `config` asks, and int64 (B,).

    `config` has timm's keys (`backbones.data_config(model)`).  With a `seed` the images are shuffled
    and augmented, without they come in order and unchanged.  The shuffle is drawn from (seed, epoch)
    and each image's augmentation from (seed, epoch, index): whichever worker loads it, and whether or
    not the epoch is entered at `first_batch` after an interruption, an image comes out the same.
    `workers`: processes that load; None takes one per core, up to four, where images are decoded or cropped.
    """
    if workers is None:
        workers = 0 if policy.crop_scale is None else min(4, os.cpu_count() or 1)
    if seed is None:
        order = list(range(len(split)))
    else:
        order = torch.randperm(len(split), generator=_generator(seed, epoch)).tolist()
    rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return DataLoader(
        _Batches(split, config, policy, seed, epoch),
        sampler=rows[first_batch:],
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that making an iterator does not draw from the global one
    )


class _Batches(Dataset):
    """Indexed by the rows of a batch.  What is alike for all its images is done once, on the stack."""

    def __init__(self, split: Dataset, config: dict, policy: Policy, seed: int | None, epoch: int):
        self.split, self.policy, self.seed, self.epoch = split, policy, seed, epoch
        size = tuple(config["input_size"][1:])
        interpolation = v2.InterpolationMode(config["interpolation"])
        resize = functools.partial(v2.Resize, interpolation=interpolation, antialias=True)
        finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config["mean"], config["std"])]
        if policy.crop_scale is None:  # images of one size, taken whole
            self.frame, finish = None, [resize(size), *finish]
        elif seed is not None:
            self.frame = v2.RandomResizedCrop(size, scale=policy.crop_scale, interpolation=interpolation)
        else:
            self.frame = v2.Compose([resize(round(max(size) / config["crop_pct"])), v2.CenterCrop(size)])
        self.finish = v2.Compose(finish)
        if policy.flip and seed is not None:
            self.flipped = torch.rand(len(split), generator=_generator(seed, epoch, "flip")) < 0.5
        else:
            self.flipped = torch.zeros(len(split), dtype=torch.bool)

    def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = zip(*(self.split[row] for row in rows))
        if self.frame is not None:
            images = [self._framed(image, row) for image, row in zip(images, rows)]
        batch = self.finish(torch.stack(images))  # (B, 3, H, W)
        flipped = self.flipped[rows]
        batch[flipped] = batch[flipped].flip(-1)
        return batch, torch.tensor(labels)

    def _framed(self, image: torch.Tensor, row: int) -> torch.Tensor:
        if self.seed is None:
            return self.frame(image)
        # Not torch.manual_seed: that would reseed the GPU's generator, and with it dropout, too.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mix(self.seed, self.epoch, row))
        framed = self.frame(image)
        torch.default_generator.set_state(before)
        return framed


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*key))


def _mix(*key: object) -> int:
    """One 63-bit seed from several values."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
