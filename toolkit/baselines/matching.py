"""Free answers as classes: the answer of a vision-language model, looked up among the class names.

This protocol asks least of a model and loses most: an answer that names no class counts as wrong.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import torch
from torch import nn

from toolkit.baselines.generative import VisionLanguageModel
from toolkit.baselines.prompts import check_classes

NEW_TOKENS = 16  # a name and a few words around it
_ARTICLES = {"a", "an", "the"}
# Singular and plural become one form, which may be neither: rose, roses -> ros; bus, buses -> bus;
# berry, berries -> berrie; glass, glasses -> glass.
_ENDINGS = ((r"(?<=..[^su])s$", ""), (r"(?<=s|x|z)e$|(?<=[cs]h)e$", ""), (r"y$", "ie"))


@functools.cache
def normalise(text: str) -> str:
    """Lower case, one space between words, no punctuation, no articles, most plurals as singulars."""
    words = re.findall(r"[^\W_]+", text.lower())
    named = [word for word in words if word not in _ARTICLES] or words  # a class may be the letter A
    for pattern, ending in _ENDINGS:
        named = [re.sub(pattern, ending, word) for word in named]
    return " ".join(named)


def match(answer: str, classes: list[str]) -> int | None:
    """Index of the class that `answer` names; None if it names none.

    Answer and classes are compared after `normalise`.  The longest class that occurs in the answer as whole
    words counts; among equally long ones the first.
    """
    said = f" {normalise(answer)} "
    found = []
    for index, name in enumerate(classes):
        words = f" {normalise(name)} "
        if words in said:
            found.append((-len(words), said.index(words), index))
    return min(found)[-1] if found else None


class GenerationClassifier(nn.Module):
    """Classifies by the greedily decoded answer to the question in its inputs.

    `forward`: `vlm.inputs` of B images, on the model's device -> float32 (B, classes + 1): 1 at the class
    that `match` finds, or in the last column if it finds none, and 0 elsewhere.

    Raises `InputError` for class names that `match` cannot tell apart.
    """

    def __init__(self, vlm: VisionLanguageModel, names: list[str]):
        super().__init__()
        check_classes(names, normalise)
        self.vlm, self.names = vlm, names

    def answers(self, inputs: Mapping[str, torch.Tensor]) -> list[str]:
        """The model's answer about each image, at most `NEW_TOKENS` tokens."""
        tokens = self.vlm.model.generate(
            **self.vlm.cast(inputs),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=self.vlm.terminator,
            pad_token_id=self.vlm.terminator,
        )
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return self.vlm.processor.tokenizer.batch_decode(new, skip_special_tokens=True)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found = [match(answer, self.names) for answer in self.answers(inputs)]
        columns = [len(self.names) if index is None else index for index in found]
        scores = nn.functional.one_hot(torch.tensor(columns), len(self.names) + 1)
        return scores.float().to(self.vlm.device)
