"""Frozen features, computed once and read in every later epoch: training does not run the backbone.

What losa, lst and linear read of the backbone does not depend on what they train, so with fixed preprocessing
it is the same in every epoch.  It is kept on disk (`toolkit.cache`) under the hash of all that it depends on.
The price is augmentation: one form of each image is cached, so training images are prepared as test images
are.  The probes of `toolkit.baselines` read their features from the same store.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from toolkit.backbones import data_config
from toolkit.budget import format_bytes
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.step import autocast
from toolkit.cache import RowFile, kept_rows
from toolkit.datasets import Policy, Splits, batch_rows, loader
from toolkit.errors import InputError, check_name
from toolkit.files import CACHE
from toolkit.measure import Meter, Window
from toolkit.measure.environment import code_sha256, device_name
from toolkit.methods import METHODS, head_name, set_train_mode
from toolkit.methods.weights import state_sha256

FORMAT = 2  # of the files, and of how features are brought to their shapes
FREE_SHARE = 0.05  # of the disk that a cache leaves free
SPLITS = ("train", "val")
# By precision: the type of the rows, and what numpy calls it; it has no bfloat16, so its bits are kept.
STORED = {
    "fp32": (torch.float32, "<f4"),
    "bf16": (torch.bfloat16, "<i2"),
    "fp16": (torch.float16, "<f2"),
}
_REMEDIES = "tap fewer blocks (taps), or compute features in every epoch (feature_cache=0)"


def records_of(rows: torch.Tensor, labels: torch.Tensor, precision: str) -> np.ndarray:
    """Rows (B, F) and labels (B,) as records for `kept_rows`."""
    dtype, stored = STORED[precision]
    records = np.empty(len(labels), [("features", stored, (rows.shape[1],)), ("label", "<i8")])
    bits = rows.cpu().view(torch.int16) if dtype == torch.bfloat16 else rows.cpu()
    records["features"], records["label"] = bits.numpy(), labels.numpy()
    return records


class Rows(Dataset):
    """The features of a split in its order, the `rows` of a file: `(features (F,), label)`."""

    def __init__(self, records: RowFile, precision: str, rows: range):
        self._records, self._dtype, self._rows = records, STORED[precision][0], rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        features, labels = self.__getitems__([index])
        return features[0], int(labels[0])

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch at once, as torch's loaders ask for it: (B, F) and int64 (B,)."""
        records = self._records[[self._rows[row] for row in rows]]
        features, labels = (np.array(records[name]) for name in ("features", "label"))
        return torch.from_numpy(features).view(self._dtype), torch.from_numpy(labels)


@dataclass(frozen=True)
class Layout:
    """How the features of an image lie in one row of F numbers: tensors of these shapes, one after another.

    `dtypes`: names of the types in which the backbone returns the tensors, and `unpack` restores them;
    `precision`: of the row.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    precision: str

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the row."""
        return STORED[self.precision][0]

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's record: features and label."""
        return sum(self.sizes) * self.dtype.itemsize + 8

    def pack(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Tensors (B, *shape) as rows (B, F)."""
        return torch.cat([part.flatten(1).to(self.dtype) for part in features], dim=1)

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows (B, F) as tensors (B, *shape): views, where their type is that of the row."""
        parts = rows.split(self.sizes, dim=1)
        return tuple(
            part.unflatten(1, shape).to(getattr(torch, dtype))
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes)
        )


class _Parts(NamedTuple):
    """A model in two: features of images, and logits of features."""

    features: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    logits: Callable[[tuple[torch.Tensor, ...]], torch.Tensor]
    trained: dict[str, nn.Module]  # the modules that `logits` calls
    frozen: dict[str, torch.Tensor]  # the state that `features` depends on
    taps: list[str]  # names of the blocks that are read; none: the input of the classifier


def _parts_of(model: nn.Module) -> _Parts:
    """Side networks declare their parts (`features`, `from_features`); plain models end in a classifier.

    Raises `InputError` for a model whose features change while it trains.
    """
    if hasattr(model, "from_features"):
        trained = {"side": model.side, "head": model.head}
        taps = [tap.name for tap in model.taps.taps]
        return _Parts(model.features, model.from_features, trained, model.backbone.state_dict(), taps)
    _check_frozen(model)
    head, state = model.get_submodule(head_name(model)), model.state_dict()
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: value for name, value in state.items() if name not in moving}
    return _Parts(
        lambda images: (_input_of_classifier(model, images),), lambda x: head(*x), {"head": head}, frozen, []
    )


def _input_of_classifier(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    read: list[tuple[torch.Tensor, torch.Tensor]] = []
    head = model.get_submodule(head_name(model))
    handle = head.register_forward_hook(lambda module, args, out: read.append((*args, out)))
    try:
        logits = model(images)
    finally:
        handle.remove()
    if len(read) != 1 or read[0][1] is not logits:
        raise InputError(
            f"features cannot be cached: {type(model).__name__} does not end in its classifier; set "
            "feature_cache to 0."
        )
    return read[0][0]


def _check_frozen(model: nn.Module) -> None:
    inside = f"{head_name(model)}."
    moving = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]
    set_train_mode(model)
    moving += [n for n, m in model.named_modules() if isinstance(m, _NormBase) and m.training]
    if moving:
        able = " or ".join(repr(name) for name, method in METHODS.items() if method.frozen_features)
        raise InputError(
            f"features cannot be cached: {moving[0]} trains, or follows the batches, before the head; take "
            f"method {able}, with batch_norm 'frozen', or set feature_cache to 0."
        )


class FeatureModel(nn.Module):
    """The part that trains, on rows of cached features (B, F): side network and head, or the classifier.

    Its modules are those of the whole model: training this one trains the original.  It holds no backbone,
    which need not be on the device.
    """

    def __init__(self, whole: nn.Module, layout: Layout):
        super().__init__()
        self.layout = layout
        self.pretrained_cfg = data_config(whole)
        if hasattr(whole, "get_classifier"):
            self.get_classifier = whole.get_classifier
        parts = _parts_of(whole)
        self._logits = parts.logits
        for name, module in parts.trained.items():
            self.add_module(name, module)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self._logits(self.layout.unpack(rows))


@dataclass(frozen=True)
class CachedFeatures:
    """Features of the training and validation images, and the `model` that reads them, see `FeatureModel`.

    `window`: time and energy of computing them, in an earlier run if `cached`; `nbytes`: on disk.
    """

    train: Rows
    val: Rows
    model: FeatureModel
    window: Window
    nbytes: int
    cached: bool

    def loader(
        self, split: str, *, batch_size: int, seed: int | None = None, epoch: int = 0, first_batch: int = 0
    ) -> DataLoader:
        """Batches `(features (B, F), labels (B,))`, in the order of `toolkit.datasets.loader`."""
        rows = getattr(self, check_name("cached split", split, SPLITS))
        return DataLoader(
            rows,
            batch_sampler=batch_rows(len(rows), batch_size, seed, epoch)[first_batch:],
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that making an iterator does not draw from the global one
        )


def _unchanged(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch


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
    """The features that `model` reads of its backbone for training and validation images, computed or found.

    `model`: adapted by losa, lst or linear, already on the device that computes; it is left in evaluation
    mode.  Training images are prepared as test images are: no random crops, no mirroring.  `budget_bytes`:
    limit on disk.  `batch_size`: images at a time while features are computed.  `precision`: of computing,
    and of the rows; fp32 rows are what the backbone returns, up to the rounding of kernels that depends on
    the batch.

    Raises `InputError` for a model whose features depend on what trains, for features that exceed the
    budget or the disk (before any is computed), and for features that are not finite.
    """
    layout, need = checked_size(model, splits, budget_bytes, precision)
    device, features_of = next(model.parameters()).device, _parts_of(model).features
    meter = meter or Meter(device)
    model.eval()

    @torch.no_grad()
    def make(write: Callable) -> dict:
        _check_disk(folder, need)
        with meter.window("features") as window:
            for split in SPLITS:
                data = getattr(splits, split)
                batches = loader(data, data_config(model), splits.policy, batch_size=batch_size)
                for images, labels in tqdm(batches, f"features, {split}", leave=False, disable=None):
                    with autocast(device, precision):
                        rows = layout.pack(features_of(images.to(device)))
                    if not rows.isfinite().all():
                        raise InputError(
                            f"some features are not finite in precision {precision!r}; take 'bf16' or "
                            "'fp32', or check the weights."
                        )
                    write(records_of(rows, labels, precision))
        return {"window": window.to_dict()}

    key = cache_key(model, splits, layout) | {"device": device_name(device.type)}
    count = len(splits.train)
    records, answer, found = kept_rows(folder, key, count + len(splits.val), make)
    train, val = (Rows(records, precision, r) for r in (range(count), range(count, len(records))))
    return CachedFeatures(train, val, FeatureModel(model, layout), Window(**answer["window"]), need, found)


def checked_size(model: nn.Module, splits: Splits, budget_bytes: int, precision: str) -> tuple[Layout, int]:
    """Layout and bytes of the features of all images; nothing is computed.  Raises as `cached_features`."""
    layout = layout_of(model, precision)
    need = sum(len(getattr(splits, split)) for split in SPLITS) * layout.image_bytes
    if need > budget_bytes:
        raise InputError(
            f"the features of all images take {format_bytes(need)}, more than the "
            f"{format_bytes(budget_bytes)} of feature_cache; allow more, {_REMEDIES}."
        )
    return layout, need


def layout_of(model: nn.Module, precision: str) -> Layout:
    """Shapes and types of an image's features in `precision`, on fake tensors: nothing is computed.

    Leaves the model in evaluation mode.  Raises `InputError` for a model whose features depend on what
    trains.
    """
    check_name("precision", precision, STORED)
    parts = _parts_of(model)
    model.eval()
    device = next(model.parameters()).device
    image = torch.zeros(1, *data_config(model)["input_size"], device=device)
    with on_fake_tensors(model, image) as fake, torch.no_grad(), autocast(device, precision):
        features = parts.features(fake)
        shapes = tuple(tuple(part.shape[1:]) for part in features)
        dtypes = tuple(str(part.dtype).removeprefix("torch.") for part in features)
    return Layout(shapes, dtypes, precision)


def cache_key(model: nn.Module, splits: Splits, layout: Layout) -> dict:
    """All that the features depend on, except for the device."""
    parts = _parts_of(model)
    data = {split: [splits.hashes[split], len(getattr(splits, split))] for split in SPLITS}
    return feature_key(state_sha256(parts.frozen), data, data_config(model), splits.policy) | {
        "precision": layout.precision,
        "features": {"taps": parts.taps, **asdict(layout)},
    }


def feature_key(weights_sha256: str, data: object, config: dict, policy: Policy) -> dict:
    """What all features depend on: weights, libraries, data, and how images are prepared for a test.

    `config` has timm's keys; `policy` is the data set's.
    """
    preprocessing = {name: config[name] for name in ("input_size", "mean", "std", "interpolation")}
    if policy.crop_scale is None:
        preprocessing["resize"] = "whole image"
    else:
        preprocessing |= {"resize": "shorter side, centre", "crop_pct": config["crop_pct"]}
    return {
        "format": FORMAT,
        "weights": weights_sha256,
        "libraries": {library.__name__: library.__version__ for library in (timm, torch, torchvision)},
        "code": code_sha256(),
        "data": data,
        "preprocessing": preprocessing,
    }


def _check_disk(folder: Path, need: int) -> None:
    disk = shutil.disk_usage(folder)
    free = max(0, disk.free - int(FREE_SHARE * disk.total))
    if need > free:
        raise InputError(
            f"the features take {format_bytes(need)}, and the disk of {folder} has room for "
            f"{format_bytes(free)} (a twentieth stays free); make room, {_REMEDIES}."
        )
