"""Small contrastive models with random weights, in folders that open_clip opens like published ones.

They show and test the whole path without a download; what they answer means nothing.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from toolkit.errors import check_name

_TEXT = {"width": 8, "heads": 2, "layers": 1}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tiny_contrastive(folder: Path, texts: Sequence[str], kind: str = "clip", *, seed: int = 0) -> Path:
    """Write a model to `folder` and return it: `toolkit.baselines.contrastive.load(f"local-dir:{folder}")`.

    `kind`: `clip` has open_clip's own towers, CLIP's tokenizer and preprocessing (32 px); `siglip` has
    timm's tower with attention pooling (160 px), an own text tower, a bias, and a tokenizer with the
    words of `texts`, which CLIP's does not need.  Equal arguments give equal weights.
    """
    import open_clip

    check_name("kind of tiny contrastive model", kind, ("clip", "siglip"))
    folder.mkdir(parents=True, exist_ok=True)
    config = _clip() if kind == "clip" else _siglip(_save_tokenizer(folder, texts))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    towers = dict(config["model_cfg"])
    custom_text = towers.pop("custom_text", False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**towers)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as drawn, all texts and all images would look alike
                torch.nn.init.normal_(parameter, std=2 / math.sqrt(parameter.shape[-1]))
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def _clip() -> dict:
    return {
        "model_cfg": {
            "embed_dim": 24,
            "init_logit_scale": math.log(100),
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 2},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, **_TEXT},
        },
        "preprocess_cfg": {"mean": _CLIP_MEAN, "std": _CLIP_STD},
    }


def _siglip(vocabulary: int) -> dict:
    return {
        "model_cfg": {
            "embed_dim": 64,
            "init_logit_scale": math.log(10),
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 160,
                "timm_model_name": "test_vit",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": {
                "context_length": 16,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "in this folder",
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                **_TEXT,
            },
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    }


def _save_tokenizer(folder: Path, texts: Sequence[str]) -> int:
    """SigLIP's kind of tokenizer, which pads with the end of text; returns the size of its vocabulary.

    Its tokens are the words of `texts`, and letters and digits for all others.
    """
    from open_clip.tokenizer import canonicalize_text
    from transformers import T5TokenizerFast

    words = sorted({f"▁{word}" for text in texts for word in canonicalize_text(text).split()})
    spelling = ["▁", *string.ascii_lowercase, *string.digits]
    scores = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0) | dict.fromkeys(spelling, -9.0)
    scores |= dict.fromkeys(words, -1.0)
    tokenizer = T5TokenizerFast(list(scores.items()), pad_token="</s>", extra_ids=0)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)
