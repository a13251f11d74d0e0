"""Prompts of zero-shot models: templates, class names and questions.

Templates and nouns come from the data set's entry (`toolkit.datasets.Prompt`); CIFAR and DTD have those that
CLIP's authors publish, so that accuracies can be compared with published ones.  Class names are the data
set's own: lower-casing them and stripping punctuation is left to each model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from toolkit.datasets import Splits, find_dataset
from toolkit.errors import InputError


def templates(dataset: str) -> list[str]:
    """Prompt templates of a data set by its name (`Splits.name`); `{}` stands for the class."""
    return list(find_dataset(dataset).prompt.templates)


def class_names(splits: Splits) -> list[str]:
    """The classes as words, in label order: `aquarium_fish` becomes `aquarium fish`."""
    return [name.replace("_", " ").strip() for name in splits.classes]


def question(dataset: str) -> str:
    """The question about each image of a data set that a generative model is asked."""
    return f"What type of {find_dataset(dataset).prompt.noun} is in this photo?"


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def check_classes(names: Sequence[str], words_of: Callable[[str], str] = _words) -> None:
    """Raise `InputError` if there are no names, one without words, or two with the same words.

    By default these are two that differ in case or spacing only.
    """
    if not names:
        raise InputError("there are no class names; give at least one.")
    seen: dict[str, str] = {}
    for position, name in enumerate(names):
        words = words_of(name)
        if not words:
            raise InputError(f"class {position} has no words in its name {name!r}; rename it.")
        if words in seen:
            raise InputError(f"classes {seen[words]!r} and {name!r} read alike; rename one of them.")
        seen[words] = name
