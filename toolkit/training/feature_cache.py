"""Features of a frozen backbone, computed once and read in every epoch after: training runs no backbone.

What losa, lst and linear read of the backbone does not depend on what they train, so with fixed
preprocessing it is the same in every epoch.  It is kept on disk (`feature_rows`), in a folder named
by the hash of all that it depends on.  The trade is augmentation: one form of each image is cached, so
training images are prepared as test images are, see `augmentation_lost`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader
from tqdm import tqdm

from toolkit.backbones import data_config
from toolkit.budget import format_bytes
from toolkit.budget.step import autocast, on_fake_tensors
from toolkit.datasets import Policy, Splits, batch_rows, loader
from toolkit.errors import InputError, check_name
from toolkit.files import CACHE
from toolkit.measure import Meter, Window
from toolkit.measure.environment import code_sha256, device_name
from toolkit.methods import head_name, set_train_mode
from toolkit.methods.side import SideModel
from toolkit.methods.weights import state_sha256, weights_sha256
from toolkit.training.feature_rows import STORED, Layout, Rows, close_cache, open_cache, write_rows

FORMAT = 1  # of the files, and of how features are brought to their shapes
FREE_SHARE = 0.05  # of the disk that a cache leaves free
SPLITS = ("train", "val")
_REMEDIES = "tap fewer blocks (side_taps), or compute features in every epoch (feature_cache='')"


class FeatureModel(nn.Module):
    """What trains, on rows of cached features (B, F): the side network and the head, or the classifier.

    The modules are those of the whole model, so who trains this one has trained that one.  The backbone is
    no part of it, and need not be on the device.
    """

    def __init__(self, whole: nn.Module, layout: Layout):
        super().__init__()
        self.layout = layout
        self.pretrained_cfg = data_config(whole)
        self.get_classifier = whole.get_classifier
        if isinstance(whole, SideModel):
            self.side, self.head, self._logits = whole.side, whole.head, whole.from_features
        else:
            self.head = whole.get_classifier()
            self._logits = lambda parts: self.head(*parts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._logits(self.layout.unpack(rows))


@dataclass(frozen=True)
class CachedFeatures:
    """Features of the training and validation images, and the `model` that takes them, see `FeatureModel`.

    `window`: time and energy of computing them, in an earlier run if `cached`; `nbytes`: on disk.
    """

    train: Rows
    val: Rows
    model: FeatureModel
    window: Window
    nbytes: int
    cached: bool

    @property
    def width(self) -> int:
        """F, the numbers per image."""
        return sum(self.model.layout.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of batches."""
        return self.model.layout.dtype

    def loader(
        self, split: str, *, batch_size: int, seed: int | None = None, epoch: int = 0, first_batch: int = 0
    ) -> DataLoader:
        """Batches `(features (B, F), labels (B,))`, in the order of `toolkit.datasets.loader`."""
        rows = getattr(self, check_name("cached split", split, SPLITS))
        return DataLoader(
            rows,
            batch_sampler=batch_rows(len(rows), batch_size, seed, epoch)[first_batch:],
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that making an iterator does not draw from the global one
        )


def cached_features(
    model: nn.Module,
    splits: Splits,
    *,
    budget_bytes: int,
    batch_size: int,
    precision: str = "fp32",
    folder: Path = CACHE / "features",
    meter: Meter | None = None,
) -> CachedFeatures:
    """What `model` reads of its backbone for the training and validation images, computed or found.

    `model`: adapted by losa, lst or linear, on the device that shall compute; it is left in evaluation
    mode.  Training images are prepared as test images are: no random crops, no mirroring.  `budget_bytes`:
    of disk that the features may take.  `batch_size`: images at a time while they are computed.
    `precision`: of computing, and of the rows: those of fp32 are what the backbone gives, but for the
    rounding of kernels that depend on the batch.  Of processes that want the same features one computes,
    the others wait.

    Raises `InputError` for a model whose features depend on what trains, for features that exceed the
    budget or the disk (before any is computed), and for some that are not finite.
    """
    layout, need = checked_size(model, splits, budget_bytes, precision)
    device = next(model.parameters()).device
    key = cache_key(model, splits, layout) | {"device": device_name(device.type)}
    own = Path(folder) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    own.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(own / ".lock"):
        window = open_cache(own, key)
        cached = window is not None
        if not cached:
            _check_disk(own, need)
            window = _compute(model, splits, layout, batch_size, own, key, meter or Meter(device))
    train, val = (Rows(own / f"{split}.npy", layout) for split in SPLITS)
    return CachedFeatures(train, val, FeatureModel(model, layout), window, need, cached)


def checked_size(model: nn.Module, splits: Splits, budget_bytes: int, precision: str) -> tuple[Layout, int]:
    """Layout and bytes of the features of all images; nothing is computed.  Raises as `cached_features`."""
    layout = layout_of(model, precision)
    need = sum(len(getattr(splits, split)) for split in SPLITS) * layout.record.itemsize
    if need > budget_bytes:
        raise InputError(
            f"the features of all images take {format_bytes(need)}, more than the "
            f"{format_bytes(budget_bytes)} of feature_cache; allow more, {_REMEDIES}."
        )
    return layout, need


def augmentation_lost(policy: Policy) -> str:
    """What training on cached features goes without, in one sentence; "" where that is nothing."""
    lost = []
    if policy.crop_scale is not None:
        low, high = (round(100 * share) for share in policy.crop_scale)
        lost.append(f"random crops of {low} to {high} % of the image")
    if policy.flip:
        lost.append("mirrored images")
    return f"One form of each image is cached: training goes without {' and '.join(lost)}." if lost else ""


def layout_of(model: nn.Module, precision: str) -> Layout:
    """Shapes and types of an image's features in `precision`, on fake tensors: nothing is computed.

    Leaves the model in evaluation mode.  Raises `InputError` for a model whose features depend on what
    trains.
    """
    check_name("precision", precision, STORED)
    _check_frozen(model)
    model.eval()
    parameter = next(model.parameters())
    image = torch.zeros(1, *data_config(model)["input_size"], device=parameter.device)
    with on_fake_tensors(model, image) as fake, torch.no_grad(), autocast(parameter.device, precision):
        parts = _features(model, fake)
        shapes = tuple(tuple(part.shape[1:]) for part in parts)
        dtypes = tuple(str(part.dtype).removeprefix("torch.") for part in parts)
    return Layout(shapes, dtypes, precision)


def cache_key(model: nn.Module, splits: Splits, layout: Layout) -> dict:
    """All that the features depend on, but for the device."""
    config = data_config(model)
    preprocessing = {name: config[name] for name in ("input_size", "mean", "std", "interpolation")}
    if splits.policy.crop_scale is None:
        preprocessing["resize"] = "whole image"
    else:
        preprocessing |= {"resize": "shorter side, centre", "crop_pct": config["crop_pct"]}
    taps = [tap.name for tap in model.taps.taps] if isinstance(model, SideModel) else []
    return {
        "format": FORMAT,
        "weights": _frozen_sha256(model),
        "libraries": {library.__name__: library.__version__ for library in (timm, torch, torchvision)},
        "code": code_sha256(),
        "data": {split: [splits.hashes[split], len(getattr(splits, split))] for split in SPLITS},
        "preprocessing": preprocessing,
        "precision": layout.precision,
        "features": {"taps": taps, **asdict(layout)},
    }


def _compute(
    model: nn.Module, splits: Splits, layout: Layout, batch_size: int, folder: Path, key: dict, meter: Meter
) -> Window:
    files = {}
    with meter.window("features") as window:
        for split in SPLITS:
            data = getattr(splits, split)
            batches = loader(data, data_config(model), splits.policy, batch_size=batch_size)
            records = _records(model, tqdm(batches, f"features, {split}", leave=False, disable=None), layout)
            files[f"{split}.npy"] = write_rows(folder / f"{split}.npy", records, len(data), layout.record)
    close_cache(folder, key, files, window)
    return window


@torch.no_grad()
def _records(model: nn.Module, batches: DataLoader, layout: Layout) -> Iterator[np.ndarray]:
    device = next(model.parameters()).device
    for images, labels in batches:
        with autocast(device, layout.precision):
            rows = layout.pack(_features(model, images.to(device)))
        if not rows.isfinite().all():
            raise InputError(
                f"some features are not finite in precision {layout.precision!r}; take 'bf16' or 'fp32', or "
                "check the weights."
            )
        yield layout.records(rows, labels)


def _check_disk(folder: Path, need: int) -> None:
    disk = shutil.disk_usage(folder)
    free = max(0, disk.free - int(FREE_SHARE * disk.total))
    if need > free:
        raise InputError(
            f"the features take {format_bytes(need)}, and the disk of {folder} has room for "
            f"{format_bytes(free)} (a twentieth stays free); make room, {_REMEDIES}."
        )


def _features(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the trained part reads; of a plain model, what its classifier does."""
    if isinstance(model, SideModel):
        return model.features(images)
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_classifier().register_forward_hook(lambda module, args, out: read.append((*args, out)))
    try:
        logits = model(images)
    finally:
        handle.remove()
    if len(read) != 1 or read[0][1] is not logits:
        raise InputError(
            f"features cannot be cached: {type(model).__name__} does not end in its classifier; leave "
            "feature_cache empty."
        )
    return (read[0][0],)


def _check_frozen(model: nn.Module) -> None:
    """Refuse a model whose features change while it trains."""
    if isinstance(model, SideModel):
        return
    inside = f"{head_name(model)}."
    moving = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
    set_train_mode(model)
    moving += [n for n, m in model.named_modules() if isinstance(m, _NormBase) and m.training]
    if moving:
        raise InputError(
            f"features cannot be cached: {moving[0]} trains, or follows the batches, before the head; take "
            "method 'losa', 'lst' or 'linear', with batch_norm 'frozen', or leave feature_cache empty."
        )


def _frozen_sha256(model: nn.Module) -> str:
    """Digest of all in the model that features depend on."""
    if isinstance(model, SideModel):
        return weights_sha256(model.backbone)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return state_sha256({name: value for name, value in model.state_dict().items() if name not in trained})


def _as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch
