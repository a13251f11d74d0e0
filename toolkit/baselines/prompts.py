"""What zero-shot models are asked: prompt templates, class names and questions, per data set.

CIFAR-10, CIFAR-100 and DTD have the prompts that CLIP's authors publish (openai/CLIP, data/prompts.md), so
that accuracies can be held against published ones.  The class names are the data set's own; how they are
lower-cased or stripped of punctuation is each model's tokenizer's business.
"""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.datasets import Splits, clean_name
from toolkit.errors import InputError

_QUALITIES = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_PHOTOS = [
    template
    for article in ("a", "the")
    for template in (
        *(f"a {quality}photo of {article} {{}}." for quality in _QUALITIES),
        *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
    )
]
_TEXTURES = [
    f"a photo of {article} {{}} {noun}."
    for article in ("a", "the")
    for noun in ("texture", "pattern", "thing", "object")
]
_TEMPLATES = {
    "cifar10": _PHOTOS,
    "cifar100": _PHOTOS,
    "dtd": _TEXTURES,
    "textures": _TEXTURES,
    "digits": ['a photo of the number: "{}".'],
}
_GENERAL = ["a photo of a {}."]


def templates(dataset: str) -> list[str]:
    """Prompt templates for the data set of that name (`Splits.name`); `{}` stands for the class.

    cifar10 and cifar100 have the 18 and dtd the 8 published ones, digits the one published for MNIST;
    textures has DTD's, and a shifted set what the clean one has.  Anything else, such as a folder, has the
    one that CLIP's paper calls a good default (Radford et al. 2021, arXiv 2103.00020, sec. 3.1.4).
    """
    return list(_TEMPLATES.get(clean_name(dataset), _GENERAL))


def class_names(splits: Splits) -> list[str]:
    """The classes as words, in label order: `aquarium_fish` becomes `aquarium fish`."""
    return [name.replace("_", " ").strip() for name in splits.classes]


def question(dataset: str) -> str:
    """What a generative model is asked about each image of the data set."""
    kind = "texture" if clean_name(dataset) in ("dtd", "textures") else "object"
    return f"What type of {kind} is in this photo?"


def check_classes(names: Sequence[str]) -> None:
    """Raise `InputError` if there are no names, an empty one, or two that differ in case or spacing only."""
    if not names:
        raise InputError("there are no class names; give at least one.")
    seen: dict[str, str] = {}
    for position, name in enumerate(names):
        words = " ".join(name.replace("_", " ").lower().split())
        if not words:
            raise InputError(f"class {position} has an empty name ({name!r}); name it.")
        if words in seen:
            raise InputError(f"classes {seen[words]!r} and {name!r} read alike; rename one of them.")
        seen[words] = name


def check_templates(templates: Sequence[str]) -> None:
    """Raise `InputError` if there are no templates, or one that has no place `{}` for the class."""
    if not templates:
        raise InputError("there are no prompt templates; give at least one, such as 'a photo of a {}.'.")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"prompt template {template!r} has no {{}} where the class belongs; add it.")
