"""Zero-shot classification by CLIP and SigLIP, through open_clip.

The text tower writes the classifier: the column of a class is the mean direction of its prompts (Radford et
al. 2021, arXiv 2103.00020, sec. 3.1.4).  That happens once.  What is timed afterwards, and stays on the
device, is the image tower and one matrix: 93 of the 375 million parameters of SigLIP 2 base.

open_clip is imported inside functions, because it takes seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from toolkit import cache
from toolkit.baselines import hub
from toolkit.baselines.prepared import Cost, machine, peak_bytes_of
from toolkit.baselines.prompts import check_classes, check_templates
from toolkit.budget import tensors_of
from toolkit.errors import InputError, check_name
from toolkit.files import CACHE
from toolkit.measure import Meter
from toolkit.methods.weights import weights_sha256

_LOCAL = "local-dir:"  # open_clip's prefix of a folder
_QUICK = "-quickgelu"  # open_clip's suffix of architectures with OpenAI's approximate GELU
PROMPTS_AT_ONCE = 64  # bounds the memory of encoding: activations of 64 short texts


@dataclass
class ContrastiveModel:
    """Both towers, on the host, with their tokenizer and preprocessing."""

    source: str
    model: nn.Module  # open_clip's: `visual(images)`, `encode_text(tokens)`
    tokenizer: Callable[[list[str]], torch.Tensor]  # texts -> int64 (texts, context length)
    preprocess: Callable[[Image.Image], torch.Tensor]  # image -> float (3, H, W), as for evaluation
    scale: torch.Tensor  # float32 (), factor of the cosine
    bias: torch.Tensor  # float32 (), added to the scaled cosine; 0 for models without one


def load(source: str, *, dtype: torch.dtype) -> ContrastiveModel:
    """Load `ARCHITECTURE:TAG`, as `open_clip.list_pretrained(as_str=True)` lists them, or `local-dir:/path`.

    A folder holds `open_clip_config.json` with `open_clip_model.safetensors`, as open_clip saves for the
    hub, and the tokenizer's files if the configuration names one.  The weights are in `dtype`, on the host;
    scale and bias stay float32: in bfloat16 a scale of 100 is off by 1 %.

    Raises `InputError`, before anything is downloaded, for an unknown architecture or tag and for weights
    that were trained with another activation than the architecture's; and if the tokenizer or the weights
    cannot be loaded.
    """
    import open_clip

    architecture, tag = _checked(source)
    if tag is None:
        remedy = "The folder must be whole: configuration, open_clip_model.safetensors and tokenizer."
    else:
        remedy = "Connect to the Hugging Face hub once, so that tokenizer and weights are cached."
    with hub.opening(source, remedy):
        tokenizer = open_clip.get_tokenizer(architecture)  # first, as it is small: SigLIP's is on the hub
        model, preprocess = open_clip.create_model_from_pretrained(architecture, tag)
    scale = model.logit_scale.detach().exp().squeeze()
    bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach().squeeze().clone()
    model.eval().requires_grad_(False)
    return ContrastiveModel(source, model.to(dtype), tokenizer, preprocess, scale, bias)


def _checked(source: str) -> tuple[str, str | None]:
    """open_clip's arguments `model_name` and `pretrained`.  Raises `InputError` for a wrong source."""
    import open_clip

    def fits(architecture: str, tag: str) -> bool:
        """Whether there are such weights, trained with the activation of the architecture.

        open_clip lists weights that were trained with OpenAI's approximate GELU under the plain architecture
        too, loads them there, and only warns.  CoCa's towers return more than an embedding and are left out.
        """
        weights = open_clip.get_pretrained_cfg(architecture, tag)
        if not weights:
            return False
        config = open_clip.get_model_config(architecture)
        same_activation = weights.get("quick_gelu", False) == config.get("quick_gelu", False)
        return same_activation and "multimodal_cfg" not in config

    def tags_of(architecture: str) -> list[str]:
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        return [tag for tag in tags if fits(architecture, tag)]

    if source.startswith(_LOCAL):
        if not (Path(source.removeprefix(_LOCAL)) / "open_clip_config.json").is_file():
            raise InputError(f"{source} holds no open_clip_config.json; name a folder that open_clip saved.")
        return source, None
    architecture, separator, tag = source.partition(":")
    if not separator:
        raise InputError(f"{source!r} names no weights; write ARCHITECTURE:TAG or {_LOCAL}/path.")
    plain = architecture.removesuffix(_QUICK)
    fitting = [name for name in (plain, plain + _QUICK) if fits(name, tag)]
    if architecture not in fitting:
        if fitting:
            raise InputError(f"{source}: these weights have another activation; write {fitting[0]}:{tag}.")
        usable = [name for name in open_clip.list_models() if tags_of(name)]
        check_name("contrastive architecture", architecture, usable)
        check_name(f"weights of {architecture}", tag, tags_of(architecture))
    return architecture, tag


class ZeroShot(nn.Module):
    """Image tower and classifier, without the text tower that wrote it.

    Scores are scaled cosines (plus SigLIP's bias).  CLIP's are logits of a softmax over the classes; SigLIP
    was trained with a sigmoid per class (Zhai et al. 2023, arXiv 2303.15343): the cross-entropy of its scores
    compares models, but it is not the loss of its training.
    """

    classifier: torch.Tensor  # float32 (D, C), columns of unit length
    scale: torch.Tensor
    bias: torch.Tensor

    def __init__(self, visual: nn.Module, classifier: torch.Tensor, contrastive: ContrastiveModel):
        super().__init__()
        self.visual, self.preprocess = visual, contrastive.preprocess
        self.register_buffer("classifier", classifier)
        self.register_buffer("scale", contrastive.scale)
        self.register_buffer("bias", contrastive.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores float32 (B, C) of preprocessed `images` (B, 3, H, W)."""
        dtype = next(self.visual.parameters()).dtype
        directions = F.normalize(self.visual(images.to(dtype)).float(), dim=-1)
        return self.scale * (directions @ self.classifier) + self.bias


def zero_shot(
    contrastive: ContrastiveModel,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    device: torch.device,
    meter: Meter | None = None,
    cache_folder: Path | None = None,
) -> tuple[ZeroShot, Cost]:
    """Zero-shot classifier, with the class names filled into every template, and the cost of writing it.

    Consumes `contrastive`.  Only one tower is on the device at a time: the text tower while it encodes, and
    not even then if the classifier is in `cache_folder` (default `data/cache/classifiers`), which holds one
    for every combination of text tower and prompts.

    Raises `InputError` for unusable names or templates, and for classes that the tokenizer cannot tell
    apart.
    """
    check_classes(names)
    check_templates(templates)
    meter = meter or Meter(device)
    text, visual = contrastive.model, contrastive.model.visual
    text.visual = nn.Identity()
    tokens = _tokens(contrastive, names, templates)
    folder = cache_folder or CACHE / "classifiers"
    key = _key(contrastive.source, text, tokens) | machine(device, meter)
    found = cache.read(folder, key)
    if found is not None:
        classifier, cost = torch.from_numpy(found[1]["classifier"]), Cost.of(found[0], cached=True)
    else:
        classifier, cost = _encoded(text.to(device), tokens, meter)
        cache.write(folder, key, cost.answer(), {"classifier": classifier.numpy()})
    del text, contrastive.model  # the text tower leaves the device before the image tower enters it
    return ZeroShot(visual, classifier, contrastive).eval().to(device), cost


def _tokens(contrastive: ContrastiveModel, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """The prompts, int64 (C, templates, context length)."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    tokens = contrastive.tokenizer(prompts).unflatten(0, (len(names), len(templates)))
    seen: dict[bytes, str] = {}
    for name, rows in zip(names, tokens.numpy()):
        twin = seen.setdefault(rows.tobytes(), name)
        if twin != name:  # they differ in punctuation, which SigLIP drops, or after the context's end
            raise InputError(
                f"classes {twin!r} and {name!r} read alike to {contrastive.source}; rename one of them."
            )
    return tokens


@torch.no_grad()
def _encoded(text: nn.Module, tokens: torch.Tensor, meter: Meter) -> tuple[torch.Tensor, Cost]:
    """The classifier, float32 (D, C) on the host: normalised mean of each class's normalised prompts."""
    device = next(text.parameters()).device

    def directions(prompts: torch.Tensor) -> torch.Tensor:
        return F.normalize(text.encode_text(prompts.to(device)).float(), dim=-1)

    parts = tokens.flatten(0, 1).split(PROMPTS_AT_ONCE)
    peak_bytes = peak_bytes_of(device, tensors_of(text), lambda: directions(parts[0]))
    with meter.window("prompts") as window:
        encoded = torch.cat([directions(part).cpu() for part in parts])
        means = encoded.unflatten(0, tokens.shape[:2]).mean(1)  # (C, D)
        classifier = F.normalize(means, dim=-1).T.contiguous()
    return classifier, Cost(window, peak_bytes)


def _key(source: str, text: nn.Module, tokens: torch.Tensor) -> dict:
    """Cache key: everything the classifier depends on; names and templates are in the tokens."""
    import open_clip

    architecture = source if source.startswith(_LOCAL) else source.partition(":")[0]
    return {
        "source": source,
        "open_clip": open_clip.__version__,
        "config": open_clip.get_model_config(architecture),
        "text_tower": weights_sha256(text),
        "tokens": [list(tokens.shape), hashlib.sha256(tokens.numpy().tobytes()).hexdigest()],
    }
