"""The architectures of all baselines on torch's meta device: shapes and types, no memory and no download.

So a model's memory can be counted before its weights are downloaded.  open_clip and timm know their
architectures by name.  The configurations of generative models are files on the hub, some behind a licence:
what differs from transformers' defaults is here, and the tests compare parameter counts with published ones.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolkit.backbones import OWN, build_backbone, resize
from toolkit.baselines.registry import Baseline, baseline_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FEATURES_PX = 224  # default side of the images of frozen features


def _sizes(width: int, inner: int, depth: int, heads: int, **others: object) -> dict:
    """The dimensions of a transformer, by their names in transformers' configurations."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **others,
    }


_SIGLIP_BASE = _sizes(768, 3072, 12, 12, image_size=512, patch_size=16)
_SIGLIP_SO400M = _sizes(1152, 4304, 27, 16, image_size=384, patch_size=14)
_SMOL_256M = _sizes(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49280)
_SMOL_500M = _sizes(960, 2560, 32, 15, num_key_value_heads=5, vocab_size=49280)
_SMOL_2B = _sizes(2048, 8192, 24, 32, num_key_value_heads=32, vocab_size=49280)
# Vision tower, language model, and the side of the square of patches that becomes one image token.
_SMOL = {
    "smolvlm_256m": (_SIGLIP_BASE, _SMOL_256M, 4),
    "smolvlm_500m": (_SIGLIP_BASE, _SMOL_500M, 4),
    "smolvlm": (_SIGLIP_SO400M, _SMOL_2B | {"vocab_size": 49155}, 3),
    "smolvlm2_256m": (_SIGLIP_BASE, _SMOL_256M, 4),
    "smolvlm2_500m": (_SIGLIP_BASE, _SMOL_500M, 4),
    "smolvlm2": (_SIGLIP_SO400M, _SMOL_2B, 3),
}
_MOBILE_LLAMA = {
    "1.7b": _sizes(2048, 5632, 24, 16, vocab_size=32000),
    "3b": _sizes(2560, 6912, 32, 32, vocab_size=32000),
}


@functools.cache
def architecture(name: str, image_size: int = FEATURES_PX) -> nn.Module:
    """The model of the baseline `name`, float32 on the meta device.  It is shared: do not modify it.

    contrastive: open_clip's model with both towers; features: timm's without head, for images of
    `image_size` pixels a side (demo_vit has its own); generative: the class that `from_pretrained` makes.
    Raises `InputError` for an unknown name or an impossible `image_size`.
    """
    baseline = baseline_named(name)
    with torch.device("meta"):
        if baseline.family == "features":
            model = build_backbone(baseline.source, 0, pretrained=False)
            resize_features(baseline.source, model, image_size)
        elif baseline.family == "contrastive":
            model = _contrastive(baseline)
        else:
            model = _generative(baseline)
    return model.eval().requires_grad_(False)


def resize_features(source: str, model: nn.Module, image_size: int) -> None:
    """Make a vision transformer of timm take images of `image_size` pixels a side; others keep their size."""
    if source not in OWN and hasattr(model, "set_input_size"):
        resize(model, source, image_size)


def _contrastive(baseline: Baseline) -> nn.Module:
    import open_clip  # here, because it takes seconds

    # Not by `create_model`, which logs a warning that there are no weights.
    config = open_clip.get_model_config(baseline.source.partition(":")[0])
    separate_text = config.pop("custom_text", False)
    return (open_clip.CustomTextCLIP if separate_text else open_clip.CLIP)(**config)


def _generative(baseline: Baseline) -> nn.Module:
    import transformers  # here, because it takes seconds

    config = configuration(baseline.name)
    if baseline.kind in ("mobilevlm", "mobilevlm_v2"):
        from toolkit.baselines.mobilevlm import MobileVLM  # here, because it imports transformers

        return MobileVLM(config)
    return transformers.AutoModelForImageTextToText.from_config(config)


def configuration(name: str) -> PreTrainedConfig:
    """The published dimensions of a generative baseline.  Token ids other than the image's are defaults."""
    import transformers  # here, because it takes seconds

    baseline = baseline_named(name)
    if name in _SMOL:
        vision, language, scale = _SMOL[name]
        kind = {"idefics3": transformers.Idefics3Config, "smolvlm": transformers.SmolVLMConfig}[baseline.kind]
        return kind(
            vision_config=vision,
            text_config={"model_type": "llama", "pad_token_id": 2, **language},
            scale_factor=scale,
            image_token_id=49190,
        )
    if baseline.kind in ("paligemma", "paligemma2"):
        sizes = _sizes(2048, 16384, 18, 8, num_key_value_heads=1) if baseline.kind == "paligemma" else {}
        # The vocabulary: with 1024 locations, 128 segments and 64 rows of padding.
        language = {"model_type": baseline.kind.removeprefix("pali"), "vocab_size": 257216, **sizes}
        width = {"paligemma": 2048, "paligemma2": 2304}[baseline.kind]
        return transformers.PaliGemmaConfig(
            vision_config=_SIGLIP_SO400M | {"image_size": 224, "vision_use_head": False},
            text_config=language,
            projection_dim=width,
            hidden_size=width,
            image_token_index=257152,
        )
    # Here, because it imports transformers.
    from toolkit.baselines.mobilevlm import CLIP_VIT_L_14_336, MobileVLMConfig

    language = _MOBILE_LLAMA[name.rpartition("_")[2]]
    return MobileVLMConfig(
        projector="ldpv2" if baseline.kind == "mobilevlm_v2" else "ldp",
        vision_config=transformers.CLIPVisionConfig(**CLIP_VIT_L_14_336),
        text_config=transformers.LlamaConfig(**language),
        tie_word_embeddings=False,
    )
