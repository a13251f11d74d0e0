"""Features of a frozen backbone, computed once per image and kept on disk.

The probes of `toolkit.baselines.probes` are fitted to them in seconds.  The cost of the features is kept with
them, so that a later run, which reads them, still reports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from toolkit.backbones import build_backbone, data_config
from toolkit.backbones.checkpoints import opening
from toolkit.baselines.architectures import resize_features
from toolkit.baselines.prepared import peak_bytes_of
from toolkit.baselines.probes import GRID_BLOCKS, Probe
from toolkit.baselines.registry import WITHOUT_HUB
from toolkit.budget import tensors_of
from toolkit.cache import kept_rows
from toolkit.datasets import Policy, loader
from toolkit.errors import InputError
from toolkit.files import CACHE, sha256_of
from toolkit.measure import Meter, Window
from toolkit.measure.environment import device_name
from toolkit.methods.weights import weights_sha256
from toolkit.training.feature_cache import STORED, Rows, feature_key, records_of

_LOCAL = "local-dir:"


class FeatureExtractor(nn.Module):
    """A backbone without its head, frozen: images (B, 3, H, W) to float32 features (B, D).

    `data_config` has timm's keys, as `toolkit.datasets.loader` expects them.  Its crop_pct is 1: the loader
    squeezes the whole image into the input if the data set's policy has no `crop_scale`, and otherwise
    resizes the shorter side to the input and crops the centre.
    """

    def __init__(self, source: str, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.source, self.dtype = source, dtype
        self.data_config = data_config(model) | {"crop_pct": 1.0}
        self.model = model.to(dtype).eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The normed class token; for models without one, the input of their classifier.

        The class token even if timm would pool the patches, as it does for DINOv3: the published protocols
        read the token.
        """
        images = images.to(self.dtype)
        if self._has_class_token:
            return self.model.forward_features(images)[:, 0].float()
        return self.model(images).float()

    def layers(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, 5 D) for `linear_grid`: normed class tokens of the last four blocks, earliest
        first, then the mean patch token of the last block, normed before.

        Raises `InputError` for a model without class token or with fewer blocks.
        """
        if not self._has_class_token or len(self.model.blocks) < GRID_BLOCKS:
            raise InputError(
                f"linear_grid reads class tokens of {GRID_BLOCKS} blocks, which {self.source!r} does not "
                "have: take another protocol."
            )
        blocks = self.model.forward_intermediates(
            images.to(self.dtype),
            indices=GRID_BLOCKS,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        tokens = [prefix[:, 0] for _, prefix in blocks]  # the prefix holds registers, too
        return torch.cat([*tokens, blocks[-1][0].mean(1)], dim=1).float()

    @property
    def _has_class_token(self) -> bool:
        """Whether a class token comes first and tokens are normed before they are pooled."""
        normed = not isinstance(getattr(self.model, "norm", None), nn.Identity | None)
        return normed and getattr(self.model, "num_prefix_tokens", 0) > 0 and self.model.cls_token is not None


class Frozen(nn.Module):
    """A probe on an extractor: images (B, 3, H, W) to float32 scores (B, classes)."""

    def __init__(self, extractor: FeatureExtractor, probe: Probe):
        super().__init__()
        self.extractor, self.probe = extractor, probe

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.probe((self.extractor.layers if self.probe.layers else self.extractor)(images))


def extractor(source: str, *, dtype: torch.dtype = torch.float32, image_size: int = 224) -> FeatureExtractor:
    """A pretrained backbone as feature extractor, its weights in `dtype`, on the host.

    `source`: a name that `build_backbone` knows, or `local-dir:PATH` of a folder that timm's `save_for_hf`
    wrote.  `image_size`: pixels a side, for timm models that can be resized (position embeddings are
    interpolated, as on loading); the others and the backbones of this package keep their own size.

    Raises `InputError` for an unknown source, weights that cannot be loaded, or a size that does not fit the
    model.
    """
    if source.startswith(_LOCAL):
        with opening(source, WITHOUT_HUB):
            model = timm.create_model(source, pretrained=True, num_classes=1)
    else:
        model = build_backbone(source, num_classes=1, pretrained=True)
    model.reset_classifier(0)
    resize_features(source, model, image_size)
    return FeatureExtractor(source, model, dtype)


@dataclass(frozen=True)
class Features:
    """Features of a split, in its order, on the CPU, and the cost of computing them, now or when `cached`."""

    x: torch.Tensor  # (N, D), float16 for a float16 extractor, otherwise float32
    y: torch.Tensor  # (N,) int64
    window: Window
    peak_bytes: int
    cached: bool


def features(
    extractor: FeatureExtractor,
    split: Dataset,
    split_hash: str,
    policy: Policy,
    *,
    batch_size: int,
    layers: bool = False,
    meter: Meter | None = None,
    cache_folder: Path | None = None,
) -> Features:
    """Features of all images of `split`: computed, or read if nothing that they depend on has changed.

    `split_hash`: of the split's content, as in `Splits.hashes`.  `layers`: those of
    `FeatureExtractor.layers`, which raises for models that lack them.  `cache_folder`: default
    `data/cache/features`.  Raises `FloatingPointError` for features that are not finite.
    """
    device = next(extractor.parameters()).device
    meter = meter or Meter(device)
    compute = extractor.layers if layers else extractor
    precision = "fp16" if extractor.dtype == torch.float16 else "fp32"

    @torch.no_grad()
    def make(write: Callable) -> dict:
        batches = loader(split, extractor.data_config, policy, batch_size=batch_size)
        images = next(iter(batches))[0].to(device)
        peak_bytes = peak_bytes_of(device, [*tensors_of(extractor), images], lambda: compute(images))
        with meter.window("features") as window:
            for images, labels in batches:
                x = compute(images.to(device)).to(STORED[precision][0])
                if not x.isfinite().all():
                    raise FloatingPointError(
                        f"features of {extractor.source} are not finite in {extractor.dtype}"
                    )
                write(records_of(x, labels, precision))
        return {"window": window.to_dict(), "peak_bytes": peak_bytes}

    key = cache_key(extractor, split_hash, policy, batch_size, layers) | {"device": device_name(device.type)}
    records, answer, found = kept_rows(cache_folder or CACHE / "features", key, len(split), make)
    x, y = Rows(records, precision, range(len(records))).__getitems__(range(len(records)))
    return Features(x, y, Window(**answer["window"]), answer["peak_bytes"], found)


def cache_key(
    extractor: FeatureExtractor, split_hash: str, policy: Policy, batch_size: int, layers: bool
) -> dict:
    """All that features depend on, and the batch size, which their memory depends on."""
    # The configuration in a folder, whose architecture its name does not tell.
    folder = extractor.source.removeprefix(_LOCAL) if extractor.source.startswith(_LOCAL) else ""
    return feature_key(weights_sha256(extractor.model), split_hash, extractor.data_config, policy) | {
        "source": extractor.source,
        "config": sha256_of(Path(folder) / "config.json") if folder else None,
        "features": "layers" if layers else "pooled",
        "batch_size": batch_size,
        "dtype": str(extractor.dtype),
    }
