"""Batches of a split in the form that a backbone needs, shuffled and augmented from a seed.

Resolution and normalisation are the backbone's, cropping and flipping the data set's.  All geometry is
torchvision's `transforms.v2`; masks and boxes are `tv_tensors`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
import warnings
from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from toolkit.datasets.splits import Policy, Target
from toolkit.errors import FileError, InputError

MOST_STRETCHED = 8  # a longer side, relative to the other, is cropped before the image is resized


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
    skip_changed: bool = False,
) -> DataLoader:
    """Load batches `(images, targets)`: float (B, 3, H, W) as `config` says, and targets by the split's task.

    Classes are int64 (B,), and masks int64 (B, H, W) at the input's resolution, by nearest neighbour:
    scores computed on them are those of the resized masks.  Boxes are a dict: `"boxes"` float32 (B, M, 5),
    x1, y1, x2, y2 in pixels of the input and the class, padded by rows of class -1 to the most boxes of an
    image in the batch, at least one; and `"instances"` uint8 (B, H, W) if the split has them.
    Resizing an image keeps the IoU of its boxes, but changes which ones COCO calls small or large.

    `config` has timm's keys (`backbones.data_config(model)`).  With a `seed` the images are shuffled and
    augmented, without one they come in order and unchanged.  The shuffle is drawn from (seed, epoch) and each
    image's augmentation from (seed, epoch, index): an image comes out the same in any worker process, and
    if the epoch is resumed at `first_batch`.
    `workers`: loading processes; None: one per core, up to four, if images are decoded or cropped.
    `skip_changed`: leave out, with a warning, images whose files have changed since they were checked; a
    batch of nothing else raises `FileError`, as each such image does without it.
    """
    if workers is None:
        slow = policy.crop_scale is not None or getattr(split, "decodes", False)
        workers = min(4, os.cpu_count() or 1) if slow else 0
    return DataLoader(
        _Batches(split, config, policy, seed, epoch, skip_changed),
        sampler=batch_rows(len(split), batch_size, seed, epoch)[first_batch:],
        batch_size=None,  # an item is a batch already
        num_workers=workers,
        worker_init_fn=_outlive_stop_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # so that making an iterator does not draw from the global one
    )


def _outlive_stop_signals(worker: int) -> None:
    """Let only the main process act on the signals that a whole job gets; it ends this one by its queue."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def batch_rows(count: int, batch_size: int, seed: int | None, epoch: int) -> list[list[int]]:
    """Return the rows of each batch of a split of `count` images: shuffled by (seed, epoch), or in order."""
    if seed is None:
        order = list(range(count))
    else:
        order = torch.randperm(count, generator=_generator(seed, epoch)).tolist()
    return [order[start : start + batch_size] for start in range(0, count, batch_size)]


class _Batches(Dataset):
    """Batches, indexed by their rows.  Images of one size are transformed at once, as a stack."""

    def __init__(
        self,
        split: Dataset,
        config: dict,
        policy: Policy,
        seed: int | None,
        epoch: int,
        skip_changed: bool = False,
    ):
        self.split, self.seed, self.epoch, self.skip_changed = split, seed, epoch, skip_changed
        size = tuple(config["input_size"][1:])
        interpolation = v2.InterpolationMode(config["interpolation"])
        resize = functools.partial(v2.Resize, interpolation=interpolation, antialias=True)
        self.squeeze = resize(size)
        if policy.crop_scale is None:  # whole images
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

    def __getitem__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor]]:
        samples = {}
        for row in rows:
            try:
                samples[row] = self._sample(row)
            except FileError as error:
                if not self.skip_changed or (row == rows[-1] and not samples):
                    raise
                warnings.warn(f"left out of a batch: {error}", stacklevel=2)
        images, targets = zip(*samples.values())
        flipped = self.flipped[list(samples)]
        if not isinstance(targets[0], int):
            images, targets = self._dense(images, targets, flipped)
            return self.finish(images), targets
        if self.frame is not None:
            batch = torch.stack(images)
        elif len({image.shape for image in images}) == 1:
            batch = self.squeeze(torch.stack(images))
        else:
            batch = torch.stack([self.squeeze(image) for image in images])
        batch = self.finish(batch)  # (B, 3, H, W)
        batch[flipped] = batch[flipped].flip(-1)
        return batch, torch.tensor(targets)

    def _sample(self, row: int) -> tuple[torch.Tensor, Target]:
        """An image, cropped if crops are due, so that no batch holds many whole photos, and its target."""
        image, target = self.split[row]
        if self.frame is not None and isinstance(target, int):
            image = self._framed(image, row)
        return image, target

    def _framed(self, image: torch.Tensor, row: int) -> torch.Tensor:
        if self.seed is None:
            # Resizing the short side first would make a strip of 20,000 x 2 pixels gigabytes large.
            longest = MOST_STRETCHED * min(image.shape[1:])
            return self.frame(
                v2.functional.center_crop(image, [min(side, longest) for side in image.shape[1:]])
            )
        # Not torch.manual_seed: that would reseed the GPU's generator, and with it dropout, too.
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mix(self.seed, self.epoch, row))
        framed = self.frame(image)
        torch.default_generator.set_state(before)
        return framed

    def _dense(
        self, images: Sequence[torch.Tensor], targets: Sequence[Target], flipped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | dict[str, torch.Tensor]]:
        """Resize and mirror images together with their masks or boxes."""
        if self.frame is not None:
            raise InputError("Policy.crop_scale is for classification; masks and boxes need None.")
        samples = []
        for image, target, flip in zip(images, targets, flipped):
            sample = self.squeeze((tv_tensors.Image(image), _wrapped(target, image.shape[1:])))
            samples.append(tree_map(_mirrored, sample) if flip else sample)
        images, targets = zip(*samples)
        return torch.stack(images), _collated(targets)


class _Mask(tv_tensors.Mask):
    """A mask whose pixels are the nearest to those of the image's bilinear resizing."""


@v2.functional.register_kernel("resize", _Mask)
def _resize_mask(mask: _Mask, size: list[int], **_: object) -> _Mask:
    # torchvision's own kernel rounds down ("nearest"), up to half a pixel off the image.
    pixels = mask.as_subclass(torch.Tensor)[None]
    return _Mask(v2.functional.resize(pixels, size, v2.InterpolationMode.NEAREST_EXACT)[0])


def _mirrored(leaf: torch.Tensor) -> torch.Tensor:
    # Not v2.RandomHorizontalFlip(p=1): that draws from the global generator all the same.
    return v2.functional.horizontal_flip(leaf) if isinstance(leaf, tv_tensors.TVTensor) else leaf


def _wrapped(target: Target, size: tuple[int, int]) -> _Mask | dict[str, torch.Tensor]:
    """A dense target as tv_tensors; `size`: height and width of its image."""
    if not isinstance(target, dict):
        return _Mask(target)
    boxes, classes = target["boxes"].split([4, 1], dim=1)
    wrapped = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "classes": classes,
    }
    if "instances" in target:
        wrapped["instances"] = _Mask(target["instances"])
    return wrapped


def _collated(targets: Sequence[_Mask | dict[str, torch.Tensor]]) -> torch.Tensor | dict[str, torch.Tensor]:
    """Stack dense targets, boxes padded as `loader` says."""
    if not isinstance(targets[0], dict):
        return torch.stack(targets).long()
    boxes = torch.zeros(len(targets), max(1, *(len(target["boxes"]) for target in targets)), 5)
    boxes[..., 4] = -1  # padding
    for row, target in enumerate(targets):
        boxes[row, : len(target["boxes"])] = torch.cat([target["boxes"], target["classes"]], dim=1)
    batch = {"boxes": boxes}
    if "instances" in targets[0]:
        batch["instances"] = torch.stack([target["instances"] for target in targets])
    return batch


def _generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(_mix(*key))


def _mix(*key: object) -> int:
    """One 63-bit seed from several values."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
