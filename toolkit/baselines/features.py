"""Features of a frozen backbone, computed once per image and kept on disk.

The probes of `toolkit.baselines.probes` are fitted to them in seconds.  The cost of the features is kept with
them, so that a later run, which reads them, still reports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from toolkit import files as paths
from toolkit.backbones import OWN, build_backbone, data_config
from toolkit.baselines import hub
from toolkit.baselines.architectures import check_image_size
from toolkit.baselines.prepared import Cost, machine, peak_bytes_of
from toolkit.baselines.probes import GRID_BLOCKS, Probe
from toolkit.budget import tensors_of
from toolkit.cache import kept_rows
from toolkit.datasets import Policy, loader
from toolkit.errors import InputError
from toolkit.files import sha256_of
from toolkit.measure import Meter
from toolkit.methods.weights import weights_sha256
from toolkit.training.feature_cache import STORED, Rows, feature_key, records_of

CACHE = paths.CACHE / "features"
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

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Digest of the backbone, computed once: it is frozen and needed for every split."""
        return weights_sha256(self.model)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Do nothing: the backbone is frozen and stays in evaluation mode."""
        return super().train(False)

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
    local = source.startswith(_LOCAL)
    model = _build_local(source) if local else build_backbone(source, num_classes=1, pretrained=True)
    model.reset_classifier(0)
    if source not in OWN and hasattr(model, "set_input_size") and hasattr(model, "patch_embed"):
        check_image_size(source, model, image_size)
        model.set_input_size(img_size=image_size)
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, image_size, image_size)}
    return FeatureExtractor(source, model, dtype)


def _build_local(source: str) -> nn.Module:
    remedy = (
        "It must be a folder with config.json and model.safetensors as timm.models.save_for_hf writes them."
    )
    with hub.opening(source, remedy):
        return timm.create_model(source, pretrained=True, num_classes=1)


@dataclass(frozen=True)
class Features:
    """Features of a split, in its order, on the CPU, and the cost of computing them."""

    x: torch.Tensor  # (N, D), float16 for a float16 extractor, otherwise float32
    y: torch.Tensor  # (N,) int64
    cost: Cost


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
        return Cost(window, peak_bytes).answer()

    key = cache_key(extractor, split_hash, policy, batch_size, layers) | machine(device, meter)
    records, answer, found = kept_rows(cache_folder or CACHE, key, len(split), make)
    x, y = Rows(records, precision).__getitems__(slice(None))
    return Features(x, y, Cost.of(answer, found))


def cache_key(
    extractor: FeatureExtractor, split_hash: str, policy: Policy, batch_size: int, layers: bool
) -> dict:
    """All that features depend on, and the batch size, which their memory depends on."""
    return feature_key(extractor.weights_sha256, split_hash, extractor.data_config, policy) | {
        "source": extractor.source,
        "config": _config_sha256(extractor.source),
        "features": "layers" if layers else "pooled",
        "batch_size": batch_size,
        "dtype": str(extractor.dtype),
    }


def _config_sha256(source: str) -> str | None:
    """Digest of the configuration in a folder, whose architecture its name does not tell."""
    local = source.startswith(_LOCAL)
    return sha256_of(Path(source.removeprefix(_LOCAL)) / "config.json") if local else None
