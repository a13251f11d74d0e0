"""A MobileVLM of a few thousand random weights, in the files and names of the published repositories.

It is opened by the code that opens the real ones, so that tests need no download.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from toolkit.baselines.generative import KINDS
from toolkit.errors import check_name

_PROJECTOR_TYPES = {"mobilevlm": "ldpnet", "mobilevlm_v2": "ldpnetv2"}
_WIDTH = 32  # of the language model and of the vision tower; a multiple of 32 can be stored in 4 bits
_VISION = {
    "hidden_size": _WIDTH,
    "intermediate_size": 2 * _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 48,
    "patch_size": 2,  # 24 x 24 patches, as the real tower has
}


def tiny_mobilevlm(kind: str, folder: Path, texts: Iterable[str]) -> Path:
    """Write a tiny `mobilevlm` or `mobilevlm_v2` into `folder`, always the same one, and return `folder`.

    The tokeniser is trained on `texts` and the models' conversation.  The weights of `mobilevlm` lack the
    vision tower; its config.json names a folder of a CLIP inside `folder` instead.
    """
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    check_name("kind of MobileVLM", kind, _PROJECTOR_TYPES)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder / "tokenizer.model", [*texts, KINDS[kind].prompt.format("")])
    text = {
        "vocab_size": vocabulary,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = _shapes(LlamaForCausalLM(LlamaConfig(**text)))
        tower_shapes = _shapes(CLIPVisionModel(CLIPVisionConfig(**_VISION)))
    shapes |= {f"model.mm_projector.{name}": shape for name, shape in _projector_shapes(kind).items()}
    tower = "openai/clip-vit-large-patch14-336"
    if kind == "mobilevlm":
        clip_text = {
            "vocab_size": 64,
            "hidden_size": _WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        clip_text |= {"bos_token_id": 62, "eos_token_id": 63}
        clip_config = CLIPConfig(text_config=clip_text, vision_config=_VISION)
        with torch.device("meta"):
            clip_shapes = _shapes(CLIPModel(clip_config))
        clip_weights = _random(clip_shapes, generator)
        clip = CLIPModel.from_pretrained(None, config=clip_config, state_dict=clip_weights)
        clip.save_pretrained(folder / "clip")
        tower = str(folder / "clip")
    else:
        shapes |= {f"model.vision_tower.vision_tower.vision_model.{n}": s for n, s in tower_shapes.items()}
    weights = {name: value.bfloat16() for name, value in _random(shapes, generator).items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as old checkpoints have it
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        **text,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": _WIDTH,
        "mm_projector_type": _PROJECTOR_TYPES[kind],
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": tower,
        "vision_tower_type": "clip",
        "vision_config": _VISION,  # not in published files, whose tower is known by its name
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _write_tokenizer(path: Path, texts: list[str]) -> int:
    """Train byte-pair encoding with LLaMA's settings, write it and return the size of the vocabulary."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines()]
    characters = len(set("".join(lines)) | {" "})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=3 + 256 + characters + 32,  # special tokens, bytes, characters, merges
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def _projector_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published projector's weights, from vectors of `_WIDTH` to as many."""
    square, vector, depthwise = (_WIDTH, _WIDTH), (_WIDTH,), (_WIDTH, 1, 3, 3)
    if kind == "mobilevlm_v2":
        linear = {
            f"mlp.mlp.{i}.{part}": s for i in (0, 2) for part, s in (("weight", square), ("bias", vector))
        }
        return linear | {"peg.peg.0.weight": depthwise, "peg.peg.0.bias": vector}
    shapes = {
        f"model.mlp.{i}.{part}": s for i in (1, 3) for part, s in (("weight", square), ("bias", vector))
    }
    squeezed = _WIDTH // 4
    for block in ("model.mb_block.1.block", "model.mb_block.2.block"):
        shapes |= {
            f"{block}.0.0.weight": depthwise,
            f"{block}.0.1.weight": vector,
            f"{block}.0.1.bias": vector,
            f"{block}.1.fc1.weight": (squeezed, _WIDTH, 1, 1),
            f"{block}.1.fc1.bias": (squeezed,),
            f"{block}.1.fc2.weight": (_WIDTH, squeezed, 1, 1),
            f"{block}.1.fc2.bias": vector,
            f"{block}.2.0.weight": (*square, 1, 1),
            f"{block}.2.1.weight": vector,
            f"{block}.2.1.bias": vector,
        }
    return shapes


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _random(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights that pass signals on: rows of unit length in expectation, vectors around 1 (scales) or 0."""
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = value / value[0].numel() ** 0.5
        else:
            weights[name] = 0.1 * value + (0.0 if name.endswith("bias") else 1.0)
    return weights
