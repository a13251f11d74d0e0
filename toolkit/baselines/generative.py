"""Generative vision-language models behind one interface: prompt in, states and logits out.

How a question is put, where an answer begins and ends, and from which number positions are counted differs
between them.  `trie` scores class names, `matching` reads free answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from toolkit.backbones.checkpoints import opening
from toolkit.baselines.registry import WITHOUT_HUB
from toolkit.errors import InputError
from toolkit.methods.qlora import BLOCK_SIZES, quantise


@dataclass(frozen=True)
class Kind:
    """The conventions of a family of models."""

    style: str  # of the prompt: chat | paligemma | mobilevlm
    # Asks the question `{}` about the image.  Chats have a template in their processor, in about these words.
    prompt: str
    terminator: str  # the token that ends an answer
    space: str  # between prompt and answer
    start: str = ""  # text that the processor puts in the place of the image's tokens
    first_position: int = 0


_CHAT = Kind(
    "chat",
    prompt="<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:",
    terminator="<end_of_utterance>",
    space=" ",
)
_GEMMA = Kind(
    "paligemma", prompt="<image>answer en {}", terminator="<eos>", space="", start="<bos>", first_position=1
)
_VICUNA = Kind(
    "mobilevlm",
    # The conversation of the models' training, asking for a short answer.
    prompt="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
    "USER: <image>\n{}\nAnswer the question using a single word or phrase. ASSISTANT:",
    terminator="</s>",
    space=" ",
)
KINDS = {
    "idefics3": _CHAT,
    "smolvlm": _CHAT,
    "paligemma": _GEMMA,
    "paligemma2": _GEMMA,
    "mobilevlm": _VICUNA,
    "mobilevlm_v2": _VICUNA,
}


def prompt_text(kind: str, question: str) -> str:
    """The prompt of `kind` without the image, for an estimate of its length."""
    conventions = KINDS[kind]
    return conventions.prompt.format(question).replace("<image>", conventions.start)


def load(
    source: str | Path,
    kind: str,
    *,
    dtype: torch.dtype,
    four_bit: bool = False,
    revision: str | None = None,
) -> VisionLanguageModel:
    """Load the model of a local folder or a hub repository on the host: weights in `dtype`, frozen.

    `kind`: one of `KINDS`.  With `four_bit` the linear layers except the last are packed as NF4; embeddings,
    norms and arithmetic stay in `dtype`.  `revision`: a commit, branch or tag of the repository.

    Raises `InputError` if the files cannot be loaded or hold a model with other conventions.
    """
    source = str(source)
    with opening(source, WITHOUT_HUB):
        if KINDS[kind].style == "mobilevlm":
            # Here, because it imports transformers, which takes seconds.
            from toolkit.baselines.mobilevlm import load_mobilevlm

            model, processor = load_mobilevlm(source, dtype=dtype, revision=revision)
        else:
            model, processor = _from_pretrained(source, dtype, revision)
        vlm = VisionLanguageModel(model.eval().requires_grad_(False), processor, kind)
        vlm.prompt("")  # the template may be missing
    if vlm.terminator not in range(vlm.vocabulary):
        raise InputError(f"the tokenizer in {source} does not know {KINDS[kind].terminator!r}.")
    if four_bit:
        quantise(model, list(packed_layers(model)), double_quantisation=True)
    return vlm


def _from_pretrained(source: str, dtype: torch.dtype, revision: str | None):
    import transformers

    options = {"revision": revision, "trust_remote_code": False}
    processor = transformers.AutoProcessor.from_pretrained(source, **options)
    images = processor.image_processor
    if hasattr(images, "max_image_size"):
        # SmolVLM's, with one tile: otherwise even a thumbnail is enlarged and cut into 17 tiles, each a pass
        # of the vision tower.
        images.size = images.max_image_size
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        source, **options, dtype=dtype, output_loading_info=True
    )
    if loading["missing_keys"]:  # these weights would stay random
        raise InputError(
            f"the weights in {source} lack {sorted(loading['missing_keys'])[0]}; download them again."
        )
    return model, processor


def packed_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers to pack, by name.

    Not the last one, whose rows are tokens rather than features, nor those that no block size divides:
    bitsandbytes unpacks these wrongly on the CPU.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not model.get_output_embeddings()
        and module.in_features % min(BLOCK_SIZES) == 0
    }


class VisionLanguageModel(nn.Module):
    """A model of transformers with its processor and the conventions of its kind.

    `terminator`: id of the token that ends an answer.
    """

    def __init__(self, model: nn.Module, processor, kind: str):
        super().__init__()
        self.model, self.processor, self.conventions = model, processor, KINDS[kind]
        self.first_position = self.conventions.first_position
        self.terminator = processor.tokenizer.convert_tokens_to_ids(self.conventions.terminator)
        self.register_buffer("row_of_token", None)  # (vocabulary,) once it is pruned; -1: removed

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def pruned(self) -> bool:
        """Whether `prune_vocabulary` removed tokens."""
        return self.row_of_token is not None

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have a logit."""
        return self.model.get_output_embeddings().weight.shape[0]

    def prompt(self, question: str) -> str:
        """The text for the processor, with `<image>` where the image goes."""
        if self.conventions.style != "chat":
            return self.conventions.prompt.format(question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def inputs(self, images: list[Image.Image], question: str):
        """The `BatchFeature` for the same question about each image, on the host.

        All tensors have a leading batch dimension; `input_ids` (B, prefix) are the same for all images.
        """
        text = [self.prompt(question)] * len(images)
        if self.conventions.style == "chat":  # a message can have several images
            images = [[image] for image in images]
        inputs = self.processor(images=images, text=text, return_tensors="pt")
        inputs.pop("labels", None)  # PaliGemma's processor prepares for training
        return inputs

    def null_inputs(self, question: str):
        """`inputs` of one image without content: the mean colour that the processor subtracts."""
        colour = tuple(round(255 * mean) for mean in self.processor.image_processor.image_mean)
        return self.inputs([Image.new("RGB", (32, 32), colour)], question)

    def candidates(self, question: str, names: list[str]) -> list[list[int]]:
        """Token ids of each name as the answer to `question`, terminator included.

        Raises `InputError` for a name that the tokenizer merges with the end of the prompt.
        """
        tail = self._tail(question)
        before = self.null_inputs(question)["input_ids"][0, -len(self._encode(tail)) :].tolist()
        candidates = []
        for name in names:
            whole = self._encode(tail + self.conventions.space + " ".join(name.split()))
            if whole[: len(before)] != before or len(whole) == len(before):
                raise InputError(
                    f"class {name!r} does not follow the prompt as tokens of its own; rename it, or end the "
                    f"question {question!r} in another way."
                )
            candidates.append([*whole[len(before) :], self.terminator])
        return candidates

    def used_tokens(self, question: str, names: list[str]) -> list[int]:
        """Ids of all tokens that are needed to score these names, for `prune_vocabulary`."""
        prompt = self.null_inputs(question)["input_ids"].flatten().tolist()
        return sorted({*prompt, *(token for ids in self.candidates(question, names) for token in ids)})

    def _tail(self, question: str) -> str:
        """The prompt after the image; special tokens separate it from the part before."""
        tail = self.prompt(question).rpartition("<image>")[2]
        if self.conventions.style == "paligemma":  # added by its processor
            return f"{self.processor.tokenizer.bos_token}{tail}\n"
        return tail

    def _encode(self, text: str) -> list[int]:
        return self.processor.tokenizer.encode(text, add_special_tokens=False)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of embedding and logits for these token ids."""
        return self.row_of_token[tokens.to(self.row_of_token.device)] if self.pruned else tokens

    def cast(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's arguments: images in its type, tokens as rows."""
        dtype = self.model.get_input_embeddings().weight.dtype  # this weight is never packed
        cast = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        return cast | {"input_ids": self.rows(inputs["input_ids"])}

    def hidden(self, inputs: Mapping[str, torch.Tensor], **options):
        """Last states (B, length, width) and the cache, as transformers returns them, without logits."""
        return self.model.model(**self.cast(inputs), use_cache=True, **options)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) of the states `hidden` (..., width), in the model's type."""
        return capped(self.model.get_output_embeddings()(hidden), self._cap)

    def logits_of(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits float32 (B, n) of one token each (n,) after the states `hidden` (B, n, width).

        In bfloat16, logits between 8 and 16 are 1/16 apart, and classes would tie.
        """
        rows = self.model.get_output_embeddings().weight[self.rows(tokens).to(hidden.device)]
        return capped((hidden.float() * rows.float()).sum(-1), self._cap)

    @property
    def _cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """`logits` bent to lie within ±`cap`, as Gemma 2 does; None: unchanged."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def prune_vocabulary(vlm: VisionLanguageModel, tokens: Iterable[int]) -> None:
    """Keep, in place, only these tokens' rows of embedding and logits (see `vlm.used_tokens`).

    The embedding takes 1.05 of PaliGemma's 2.3 GB in four bits.  `vlm` still takes the tokenizer's ids.
    Probabilities over the vocabulary are lost; those among siblings in a trie are exact.  Prune once, and
    before moving the model to a device with little memory.
    """
    kept = torch.tensor(sorted(set(tokens)), device=vlm.device)
    embedding, head = vlm.model.get_input_embeddings(), vlm.model.get_output_embeddings()
    tied = head.weight is embedding.weight
    rows = torch.full((embedding.num_embeddings,), -1, device=vlm.device)
    rows[kept] = torch.arange(len(kept), device=vlm.device)
    embedding.weight = nn.Parameter(embedding.weight[kept], requires_grad=False)
    head.weight = embedding.weight if tied else nn.Parameter(head.weight[kept], requires_grad=False)
    embedding.num_embeddings, embedding.padding_idx, head.out_features = len(kept), None, len(kept)
    vlm.model.config.image_token_id = int(rows[vlm.model.config.image_token_id])
    vlm.row_of_token = rows
