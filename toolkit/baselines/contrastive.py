"""Zero-shot classification by CLIP and SigLIP, through open_clip.

The text tower writes the classifier: the column of a class is the mean direction of its prompts (Radford et
al. 2021, arXiv 2103.00020, sec. 3.1.4).  That happens once.  What is timed afterwards, and stays on the
device, is the image tower and one matrix: 93 of the 375 million parameters of SigLIP 2 base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from toolkit.backbones.checkpoints import opening
from toolkit.baselines.prepared import peak_bytes_of
from toolkit.baselines.registry import WITHOUT_HUB
from toolkit.budget import tensors_of
from toolkit.errors import InputError
from toolkit.measure import Meter, Window

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

    A folder is as open_clip saves one for the hub.  The weights are in `dtype`, on the host; scale and bias
    stay float32: in bfloat16 a scale of 100 is off by 1 %.  Raises `InputError` if the files cannot be
    loaded.
    """
    import open_clip  # here, because it takes seconds

    if source.startswith("local-dir:"):
        architecture, tag = source, None
    else:
        architecture, _, tag = source.partition(":")
    with opening(source, WITHOUT_HUB):
        tokenizer = open_clip.get_tokenizer(architecture)  # first, as it is small: SigLIP's is on the hub
        model, preprocess = open_clip.create_model_from_pretrained(architecture, tag)
    scale = model.logit_scale.detach().exp().squeeze()
    bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach().squeeze().clone()
    model.eval().requires_grad_(False)
    return ContrastiveModel(source, model.to(dtype), tokenizer, preprocess, scale, bias)


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
) -> tuple[ZeroShot, Window, int]:
    """Zero-shot classifier, with the class names filled into every template.

    Consumes `contrastive`.  Only one tower is on the device at a time.  Returns the time and energy of
    writing the classifier, and its peak bytes, too.  Raises `InputError` for classes that the tokenizer
    cannot tell apart.
    """
    text, visual = contrastive.model, contrastive.model.visual
    text.visual = nn.Identity()
    tokens = _tokens(contrastive, names, templates)
    classifier, window, peak_bytes = _encoded(text.to(device), tokens, meter or Meter(device))
    del text, contrastive.model  # the text tower leaves the device before the image tower enters it
    return ZeroShot(visual, classifier, contrastive).eval().to(device), window, peak_bytes


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
def _encoded(text: nn.Module, tokens: torch.Tensor, meter: Meter) -> tuple[torch.Tensor, Window, int]:
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
    return classifier, window, peak_bytes
