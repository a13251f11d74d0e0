"""MobileVLM on transformers' own classes: no code from the hub is run.

MobileVLM (Chu et al. 2023, arXiv 2312.16886) and V2 (2024, arXiv 2402.03766) consist of a CLIP ViT-L/14 at
336 px, a projector that turns its 24 x 24 patches into 12 x 12 tokens, and a LLaMA of 1.7 or 3 billion
parameters.  Their repositories hold pickled weights and a configuration that transformers does not know.
Except for the projector the model is LLaVA, so the weights are renamed and loaded into LLaVA with that
projector.

Importing this module imports transformers, which takes seconds: import it where the model is needed.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import huggingface_hub
import torch
from PIL import Image
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from transformers import (
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from toolkit.backbones.checkpoints import opening
from toolkit.baselines.registry import WITHOUT_HUB
from toolkit.errors import InputError

IMAGE_TOKENS = 144
IMAGE_TOKEN_ID = 0  # `<unk>`, which byte fallback keeps out of texts, so that no row is added for it
MEAN_COLOUR = (122, 116, 104)  # CLIP's mean, in the rounding of the published preparation

# openai/clip-vit-large-patch14-336
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}

_PROJECTOR_TYPES = {"ldpnet": "ldp", "ldpnetv2": "ldpv2"}  # in the repositories' config.json, and here
_VISION_TOWER = "model.vision_tower.vision_tower.vision_model."
_PREFIXES = {  # of the names of weights: in the repositories, and here; the first that fits counts
    _VISION_TOWER: "model.vision_tower.",
    "model.mm_projector.model.mlp.1.": "model.multi_modal_projector.mlp.0.",
    "model.mm_projector.model.mlp.3.": "model.multi_modal_projector.mlp.2.",
    "model.mm_projector.model.mb_block.1.": "model.multi_modal_projector.blocks.0.",
    "model.mm_projector.model.mb_block.2.": "model.multi_modal_projector.blocks.1.",
    "model.mm_projector.mlp.mlp.": "model.multi_modal_projector.mlp.",
    "model.mm_projector.peg.peg.0.": "model.multi_modal_projector.position.",
    "model.": "model.language_model.",
}
_NOT_WEIGHTS = (".rotary_emb.inv_freq", ".position_ids")  # computed, not learnt


class LDP(nn.Module):
    """Lightweight downsample projector of MobileVLM: (B, 576, inputs) -> (B, 144, outputs).

    Two linear layers, then two MobileNetV3 blocks without expansion, the second of stride 2
    (arXiv 2312.16886, figure 4).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mlp = _mlp(inputs, outputs)
        self.blocks = nn.Sequential(
            *(
                InvertedResidual(
                    InvertedResidualConfig(outputs, 3, outputs, outputs, True, "HS", stride, 1, 1.0),
                    norm_layer=partial(LayerNorm2d, eps=1e-5),
                )
                for stride in (1, 2)
            )
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return _tokens(self.blocks(_image(self.mlp(patches))))


class LDPv2(nn.Module):
    """Projector of MobileVLM V2: (B, 576, inputs) -> (B, 144, outputs).

    Two linear layers, average pooling to 12 x 12, and a depthwise convolution with a shortcut for the
    positions (arXiv 2402.03766, section 3.3).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.mlp = _mlp(inputs, outputs)
        self.pool = nn.AdaptiveAvgPool2d(12)
        self.position = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        pooled = self.pool(_image(self.mlp(patches)))
        return _tokens(pooled + self.position(pooled))


PROJECTORS = {"ldp": LDP, "ldpv2": LDPv2}


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def _image(tokens: torch.Tensor) -> torch.Tensor:
    """(B, side * side, C) -> (B, C, side, side)."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _tokens(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


class MobileVLMConfig(LlavaConfig):
    """LLaVA's configuration and the name of the projector.

    It has a type of its own: as `llava` it would be opened with LLaVA's projector and random weights.
    """

    model_type = "mobilevlm_llava"

    projector: str = "ldpv2"  # a name in PROJECTORS
    image_token_index: int = IMAGE_TOKEN_ID
    image_seq_length: int = IMAGE_TOKENS


class MobileVLM(LlavaForConditionalGeneration):
    """LLaVA with MobileVLM's projector; forward and generation are LLaVA's."""

    config_class = MobileVLMConfig

    def __init__(self, config: MobileVLMConfig):
        super().__init__(config)
        self.model.multi_modal_projector = PROJECTORS[config.projector](
            config.vision_config.hidden_size, config.text_config.hidden_size
        )


def convert_config(upstream: dict) -> MobileVLMConfig:
    """The configuration for a repository's config.json.

    That file only names the vision tower; its dimensions are those of `CLIP_VIT_L_14_336`, unless the file
    has a `vision_config`.
    """
    names = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
    text = {name: value for name, value in upstream.items() if name in names}
    # Padding is `</s>`: with `<unk>` transformers would take the image's placeholders for padding.
    text = LlamaConfig(**text | {"pad_token_id": upstream.get("eos_token_id")})
    return MobileVLMConfig(
        projector=_PROJECTOR_TYPES[upstream["mm_projector_type"]],
        text_config=text,
        vision_config=CLIPVisionConfig(**upstream.get("vision_config", CLIP_VIT_L_14_336)),
        tie_word_embeddings=text.tie_word_embeddings,
    )


def convert_state_dict(upstream: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A repository's weights under their names in `MobileVLM`, without tensors that are computed."""
    return {_own_name(name): value for name, value in upstream.items() if not name.endswith(_NOT_WEIGHTS)}


def _own_name(name: str) -> str:
    for there, here in _PREFIXES.items():
        if name.startswith(there):
            return here + name.removeprefix(there)
    return name


class MobileVLMProcessor:
    """Prepares images and prompts for `MobileVLM`; `tokenizer` is the LLaMA tokeniser.

    A prompt is split at `<image>` and its parts are tokenised one by one, as in the model's training: the
    tokeniser puts a space before each part.  `<s>` comes first, once.
    """

    def __init__(self, tokenizer: LlamaTokenizer, image_size: int):
        self.tokenizer = tokenizer
        # Pillow resizes, as when the published models were trained and tested.
        self.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
        )

    def __call__(
        self, images: list[Image.Image], text: list[str], return_tensors: str = "pt"
    ) -> BatchFeature:
        """Input ids and mask (B, tokens), pixel values (B, 3, size, size) float32.

        The prompts are alike: each has one `<image>`, which becomes 144 placeholders.
        """
        rows = [self._ids(prompt) for prompt in text]
        pixels = self.image_processor([_square(image) for image in images], return_tensors=return_tensors)
        return BatchFeature(
            {
                "input_ids": rows,
                "attention_mask": [[1] * len(row) for row in rows],
                "pixel_values": pixels["pixel_values"],
            },
            tensor_type=return_tensors,
        )

    def _ids(self, prompt: str) -> list[int]:
        before, after = self.tokenizer(prompt.split("<image>"), add_special_tokens=False)["input_ids"]
        return [self.tokenizer.bos_token_id, *before, *[IMAGE_TOKEN_ID] * IMAGE_TOKENS, *after]


def _square(image: Image.Image) -> Image.Image:
    """The image in RGB, padded to a square with bars of the mean colour."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def load_mobilevlm(
    source: str | Path, *, dtype: torch.dtype, revision: str | None = None
) -> tuple[MobileVLM, MobileVLMProcessor]:
    """Load a published MobileVLM or MobileVLM V2, on the host, in evaluation mode.

    `source` is a repository of the Hugging Face hub, at `revision`, or a folder with the same files.  A
    checkpoint of MobileVLM (not V2) lacks the weights of the vision tower: they are those of the
    `mm_vision_tower` in config.json, with which it was trained.

    Raises what its libraries raise for files that are missing or damaged (see `opening`), and
    `InputError` for files of another model.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.json", "*.bin", "tokenizer.model"]
        folder = Path(
            huggingface_hub.snapshot_download(str(source), revision=revision, allow_patterns=patterns)
        )
    upstream = json.loads((folder / "config.json").read_text())
    config = convert_config(upstream)
    weights = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        # Tensors are read on first use; pickles that hold anything else, such as code, are refused.
        weights |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if config.projector == "ldp" and not any(name.startswith(_VISION_TOWER) for name in weights):
        weights |= _tower_weights(upstream["mm_vision_tower"], dtype)
    (folder / "tokenizer.model").stat()  # without the file transformers makes an empty tokenizer
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    model, loading = MobileVLM.from_pretrained(
        None, config=config, state_dict=convert_state_dict(weights), dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys"):
        if loading[problem]:
            raise InputError(
                f"the weights in {folder} are not those of its config.json: {problem.replace('_', ' ')} such "
                f"as {min(loading[problem])}. Use both files of one published revision."
            )
    return model, MobileVLMProcessor(tokenizer, config.vision_config.image_size)


def _tower_weights(tower: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a published CLIP's vision tower under their names in checkpoints of MobileVLM V2."""
    with opening(f"the vision tower {tower}", WITHOUT_HUB):
        model, loading = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    if loading["missing_keys"]:
        raise InputError(f"the vision tower {tower} lacks {min(loading['missing_keys'])}.")
    return {_VISION_TOWER + name: value for name, value in model.state_dict().items()}
