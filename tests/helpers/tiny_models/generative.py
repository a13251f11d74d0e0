"""Tiny generative vision-language models with random weights, as folders that `from_pretrained` opens.

Real classes, real processors, a byte-level BPE trained on the given texts: the path of the published models
without their download.  What such a model answers means nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from toolkit.errors import check_name

MERGES = 40  # few, so that class names take several tokens
_CHAT_SPECIALS = (
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
)
_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_IMAGE, _PATCH, _SHUFFLE = 32, 8, 2  # pixels, pixels, patches that one token of SmolVLM stands for
_PATCHES = (_IMAGE // _PATCH) ** 2
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Large enough for answers to depend on the image.
    "initializer_range": 0.3,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": _IMAGE,
    "patch_size": _PATCH,
}


def tiny_generative(kind: str, folder: Path, texts: list[str]) -> Path:
    """Write a model and a processor of `kind` to `folder`, and return it.  The weights are always the same.

    `kind`: idefics3, smolvlm, paligemma or paligemma2.  `texts`: what the tokenizer learns merges from,
    such as the class names.
    """
    check_name("kind of tiny model", kind, _BUILDERS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = _BUILDERS[kind](texts)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(texts: list[str], specials: tuple[str, ...], **named: str):
    import tokenizers
    import transformers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + MERGES,
        special_tokens=list(specials),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([f" {text}" for text in texts], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **named)


def _smolvlm(texts: list[str], first: bool):
    """SmolVLM 1 (`first`) or 2: the same architecture under two names."""
    import transformers

    tokenizer = _tokenizer(
        texts,
        _CHAT_SPECIALS,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_start|>",
    )
    prefix = "Idefics3" if first else "SmolVLM"
    sizes = {"size": {"longest_edge": 2 * _IMAGE}, "max_image_size": {"longest_edge": _IMAGE}}
    parts = {
        "image_processor": getattr(transformers, f"{prefix}ImageProcessor")(**sizes),
        "tokenizer": tokenizer,
    }
    if not first:
        parts["video_processor"] = transformers.SmolVLMVideoProcessor(**sizes)
    processor = getattr(transformers, f"{prefix}Processor")(
        **parts, image_seq_len=_PATCHES // _SHUFFLE**2, chat_template=_CHAT_TEMPLATE
    )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{prefix}Config")(
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_TEXT, **ids},
        vision_config=_VISION,
        scale_factor=_SHUFFLE,
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
        **ids,
    )
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config), processor


def _paligemma(texts: list[str], text_type: str):
    import transformers

    tokenizer = _tokenizer(
        texts, ("<pad>", "<eos>", "<bos>"), pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    image_processor = transformers.SiglipImageProcessor(size={"height": _IMAGE, "width": _IMAGE})
    image_processor.image_seq_length = _PATCHES
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)  # adds its 1,153 tokens
    vocabulary = len(processor.tokenizer)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": text_type, "vocab_size": vocabulary, **_TEXT, **ids},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_VISION},
        image_token_index=processor.image_token_id,
        vocab_size=vocabulary,
        hidden_size=_TEXT["hidden_size"],
        projection_dim=_TEXT["hidden_size"],
        **ids,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


_BUILDERS = {
    "idefics3": lambda texts: _smolvlm(texts, first=True),
    "smolvlm": lambda texts: _smolvlm(texts, first=False),
    "paligemma": lambda texts: _paligemma(texts, "gemma"),
    "paligemma2": lambda texts: _paligemma(texts, "gemma2"),
}
