"""Features of a frozen backbone, computed once per image and kept on disk.

The probes of `toolkit.baselines.probes` are fitted to them in seconds.  What the features cost is kept
with them, so that a later run, which reads them, can still report it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn
from torch.utils.data import Dataset

from toolkit.backbones import OWN, build_backbone, data_config
from toolkit.baselines.probes import GRID_BLOCKS, Probe
from toolkit.budget import device_memory, tensors_of
from toolkit.datasets import Policy, loader
from toolkit.errors import InputError
from toolkit.files import sha256_of, write_atomically
from toolkit.measure import Meter, Window
from toolkit.paths import DATA
from toolkit.weights import weights_sha256

CACHE = DATA / "cache" / "features"
_LOCAL = "local-dir:"


class FeatureExtractor(nn.Module):
    """A backbone without its head, frozen: images (B, 3, H, W) to float32 features (B, D).

    `data_config` has timm's keys, as `toolkit.datasets.loader` takes them.  Its crop_pct is 1: the loader
    squeezes the whole image into the input where the data set's policy has no `crop_scale`, and else
    resizes the shorter side to the input and takes the centre.
    """

    def __init__(self, source: str, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.source, self.dtype = source, dtype
        self.data_config = data_config(model) | {"crop_pct": 1.0}
        self.model = model.to(device, dtype).eval().requires_grad_(False)

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


def extractor(
    source: str, *, device: torch.device, dtype: torch.dtype = torch.float32, image_size: int = 224
) -> FeatureExtractor:
    """A pretrained backbone as feature extractor, its weights in `dtype`.

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
        model.head = nn.Identity()
        return FeatureExtractor(source, model, device, dtype)
    model.reset_classifier(0)
    patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch_size and hasattr(model, "set_input_size"):
        if image_size < patch_size[0] or image_size % patch_size[0]:
            raise InputError(
                f"{source!r} cuts images into patches of {patch_size[0]} pixels: set image_size to a "
                f"multiple of that instead of {image_size}."
            )
        model.set_input_size(img_size=image_size)
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, image_size, image_size)}
    return FeatureExtractor(source, model, device, dtype)


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
    `y` (N,) int64; both on the CPU.  `window` and `peak_bytes`: time, energy and device memory of the
    pass that computed them, also where that was in an earlier run (`cached`)."""

    x: torch.Tensor
    y: torch.Tensor
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
    """Features of all images of `split`, computed or, if nothing that they depend on has changed, read.

    `split_hash`: of the split's content, as in `Splits.hashes`.  `layers`: those of
    `FeatureExtractor.layers`, which raises for models that lack them.  The cache is a pair of files,
    `<key>.safetensors` and, with the key in words, costs and the digest of the first, `<key>.json`; a
    pair that is damaged is computed anew.
    """
    key = cache_key(extractor, split_hash, policy, batch_size, layers)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder or CACHE
    tensors_file, meta_file = folder / f"{name}.safetensors", folder / f"{name}.json"
    if (known := _read(tensors_file, meta_file)) is not None:
        return known
    computed = _compute(extractor, split, policy, batch_size, layers, meter)
    content = safetensors.torch.save({"x": computed.x, "y": computed.y})
    meta = {
        "key": key,
        "sha256": hashlib.sha256(content).hexdigest(),
        "window": computed.window.to_dict(),
        "peak_bytes": computed.peak_bytes,
    }
    write_atomically(tensors_file, content)
    write_atomically(meta_file, json.dumps(meta, indent=2).encode())
    return computed


def cache_key(
    extractor: FeatureExtractor, split_hash: str, policy: Policy, batch_size: int, layers: bool
) -> dict:
    """All that features and their costs depend on, but for the machine.

    The libraries are part of it: timm resizes position embeddings in its own way.
    """
    config = extractor.data_config
    return {
        "source": extractor.source,
        "weights": weights_sha256(extractor.model),
        "libraries": f"timm {timm.__version__}, torch {torch.__version__}",
        "images": {name: config[name] for name in ("input_size", "mean", "std", "interpolation")},
        "resize": "whole image" if policy.crop_scale is None else "shorter side, centre",
        "features": "layers" if layers else "pooled",
        "split": split_hash,
        "batch_size": batch_size,
        "dtype": str(extractor.dtype),
        "device": next(extractor.parameters()).device.type,
    }


def _read(tensors_file: Path, meta_file: Path) -> Features | None:
    """What the cache holds; None if it is not there or not what was written."""
    try:
        meta = json.loads(meta_file.read_bytes())
        if sha256_of(tensors_file) != meta["sha256"]:
            return None
        tensors = safetensors.torch.load_file(tensors_file)
        window = Window(**meta["window"])
        return Features(tensors["x"], tensors["y"], window, meta["peak_bytes"], cached=True)
    except (OSError, ValueError, KeyError, TypeError):  # a JSON error is a ValueError
        return None


@torch.no_grad()
def _compute(
    extractor: FeatureExtractor,
    split: Dataset,
    policy: Policy,
    batch_size: int,
    layers: bool,
    meter: Meter | None,
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
    with (meter or Meter(device)).window("features") as window:
        parts = [(compute(images.to(device)).cpu(), labels) for images, labels in batches]
    x, y = (torch.cat(part) for part in zip(*parts))
    if extractor.dtype == torch.float16:
        x = x.half()
    return Features(x, y, window, memory.peak_bytes, cached=False)
