"""Features of a frozen backbone, computed once per image and kept on disk.

The probes of `toolkit.baselines.probes` are fitted to them in seconds.  What the features cost is kept
with them, so that a later run, which reads them, can still report it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from toolkit import files as paths
from toolkit.backbones import OWN, build_backbone, data_config
from toolkit.baselines import cache
from toolkit.baselines.architectures import check_image_size
from toolkit.baselines.cache import Cost
from toolkit.baselines.probes import GRID_BLOCKS, Probe
from toolkit.budget import device_memory, tensors_of
from toolkit.datasets import Policy, loader
from toolkit.errors import InputError
from toolkit.files import sha256_of
from toolkit.measure import Meter
from toolkit.methods.weights import weights_sha256

CACHE = paths.CACHE / "features"
_LOCAL = "local-dir:"


class FeatureExtractor(nn.Module):
    """A backbone without its head, frozen: images (B, 3, H, W) to float32 features (B, D).

    `data_config` has timm's keys, as `toolkit.datasets.loader` takes them.  Its crop_pct is 1: the loader
    squeezes the whole image into the input where the data set's policy has no `crop_scale`, and else
    resizes the shorter side to the input and takes the centre.
    """

    def __init__(self, source: str, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.source, self.dtype = source, dtype
        self.data_config = data_config(model) | {"crop_pct": 1.0}
        self.model = model.to(dtype).eval().requires_grad_(False)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Digest of the backbone; once, for it is frozen and every split asks."""
        return weights_sha256(self.model)

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stays in evaluation mode: the backbone is frozen."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The normed class token; of models without one, what their classifier would see.

        The class token also where timm would pool the patches, as it does for DINOv3: the published
        protocols read the token.
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
        """Whether timm puts a class token first and norms tokens before they are pooled."""
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

    Raises `InputError` for an unknown source, weights that cannot be had, or a size that the model cannot
    take.
    """
    if source.startswith(_LOCAL):
        model = _build_local(source)
    else:
        model = build_backbone(source, num_classes=1, pretrained=True)
    if source in OWN:
        if hasattr(model, "reset_classifier"):
            model.reset_classifier(0)
        else:
            model.head = nn.Identity()
        return FeatureExtractor(source, model, dtype)
    model.reset_classifier(0)
    if hasattr(model, "set_input_size") and hasattr(model, "patch_embed"):
        check_image_size(source, model, image_size)
        model.set_input_size(img_size=image_size)
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, image_size, image_size)}
    return FeatureExtractor(source, model, dtype)


def _build_local(source: str) -> nn.Module:
    try:
        return timm.create_model(source, pretrained=True, num_classes=1)
    except (OSError, RuntimeError, KeyError, ValueError) as error:  # no folder, no weights, other weights
        raise InputError(
            f"{source!r} cannot be loaded: {error}. It must be a folder with config.json and "
            "model.safetensors as timm.models.save_for_hf writes them."
        ) from error


@dataclass(frozen=True)
class Features:
    """Features of a split in its order: `x` (N, D), float16 for a float16 extractor and float32 else;
    `y` (N,) int64; both on the CPU.  `cost`: of the pass that computed them."""

    x: torch.Tensor
    y: torch.Tensor
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
    """Features of all images of `split`, computed or, if nothing that they depend on has changed, read.

    `split_hash`: of the split's content, as in `Splits.hashes`.  `layers`: those of
    `FeatureExtractor.layers`, which raises for models that lack them.  `cache_folder`: default
    `data/cache/features`; features that are not finite are not kept.
    """
    device = next(extractor.parameters()).device
    meter = meter or Meter(device)
    key = cache_key(extractor, split_hash, policy, batch_size, layers) | cache.machine(device, meter)
    folder = cache_folder or CACHE
    if (known := cache.read(folder, key)) is not None:
        tensors, cost = known
        return Features(tensors["x"], tensors["y"], cost)
    computed = _compute(extractor, split, policy, batch_size, layers, meter)
    if computed.x.isfinite().all():
        cache.write(folder, key, {"x": computed.x, "y": computed.y}, computed.cost)
    return computed


def cache_key(
    extractor: FeatureExtractor, split_hash: str, policy: Policy, batch_size: int, layers: bool
) -> dict:
    """All that features depend on, and the batch size, which their memory depends on.

    The libraries are part of it: timm resizes position embeddings in its own way.
    """
    config = extractor.data_config
    return {
        "source": extractor.source,
        "config": _config_sha256(extractor.source),
        "weights": extractor.weights_sha256,
        "libraries": f"timm {timm.__version__}, torch {torch.__version__}",
        "images": {name: config[name] for name in ("input_size", "mean", "std", "interpolation")},
        "resize": "whole image" if policy.crop_scale is None else "shorter side, centre",
        "features": "layers" if layers else "pooled",
        "split": split_hash,
        "batch_size": batch_size,
        "dtype": str(extractor.dtype),
    }


@torch.no_grad()
def _compute(
    extractor: FeatureExtractor,
    split: Dataset,
    policy: Policy,
    batch_size: int,
    layers: bool,
    meter: Meter,
) -> Features:
    device = next(extractor.parameters()).device
    compute = extractor.layers if layers else extractor
    batches = loader(split, extractor.data_config, policy, batch_size=batch_size)
    # Memory on the first batch, which no other exceeds, before the clock starts: counting takes time.
    memory = device_memory(device)
    memory.track(tensors_of(extractor))
    memory.reset_peak()
    images = next(iter(batches))[0].to(device)
    memory.track([images])
    with memory:
        compute(images)
    with meter.window("features") as window:
        parts = [(compute(images.to(device)).cpu(), labels) for images, labels in batches]
    x, y = (torch.cat(part) for part in zip(*parts))
    if extractor.dtype == torch.float16:
        x = x.half()
    return Features(x, y, Cost(window, memory.peak_bytes))


def _config_sha256(source: str) -> str | None:
    """Of a folder, whose architecture its name does not tell."""
    local = source.startswith(_LOCAL)
    return sha256_of(Path(source.removeprefix(_LOCAL)) / "config.json") if local else None
