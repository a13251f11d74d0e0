"""Prompt templates, class names and questions."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.baselines.prompts import check_classes, class_names, question, templates
from toolkit.datasets import DATASETS
from toolkit.errors import InputError

DTD = [
    "a photo of a {} texture.",
    "a photo of a {} pattern.",
    "a photo of a {} thing.",
    "a photo of a {} object.",
    "a photo of the {} texture.",
    "a photo of the {} pattern.",
    "a photo of the {} thing.",
    "a photo of the {} object.",
]


def test_templates_of_dtd_are_the_published_ones():
    assert templates("dtd") == templates("textures") == DTD


def test_templates_of_cifar100_are_the_published_ones():
    found = templates("cifar100")
    assert len(found) == len(set(found)) == 18
    assert found[:3] == ["a photo of a {}.", "a blurry photo of a {}.", "a black and white photo of a {}."]
    assert found[7:11] == [
        "a photo of a small {}.",
        "a photo of a big {}.",
        "a photo of the {}.",
        "a blurry photo of the {}.",
    ]
    assert found[-1] == "a photo of the big {}."


def test_every_data_set_has_usable_templates():
    for entry in DATASETS.values():
        assert all("{}" in template for template in entry.prompt.templates)
    assert templates("digits") == ['a photo of the number: "{}".']
    assert templates("folder:/somewhere") == ["a photo of a {}."]


def test_templates_are_the_callers_to_change():
    templates("dtd").clear()
    assert templates("dtd") == DTD


def test_class_names_are_words(few_digits):
    classes = ["aquarium_fish", "polka-dotted", " sweet_pepper_ ", "apple"]
    splits = dataclasses.replace(few_digits, classes=classes)
    assert class_names(splits) == ["aquarium fish", "polka-dotted", "sweet pepper", "apple"]
    assert class_names(few_digits) == [str(digit) for digit in range(10)]


def test_question_asks_for_textures_where_there_are_textures():
    assert question("cifar100") == question("folder:/x") == "What type of object is in this photo?"
    assert question("dtd") == question("textures") == "What type of texture is in this photo?"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no class names"),
        (["cat", " _ "], "class 1 has no words in its name"),
        (["oak tree", "cat", "Oak_tree"], "'oak tree' and 'Oak_tree' read alike"),
        (["cat", "cat"], "'cat' and 'cat' read alike"),
    ],
)
def test_unusable_class_names(names, message):
    with pytest.raises(InputError, match=message):
        check_classes(names)


@settings(max_examples=20)
@given(st.lists(st.text("abc _", min_size=1, max_size=5), min_size=1, max_size=5))
def test_classes_are_refused_exactly_if_two_share_their_words(names):
    words = [tuple(name.replace("_", " ").split()) for name in names]
    if len(set(words)) == len(words) and () not in words:
        check_classes(names)
    else:
        with pytest.raises(InputError):
            check_classes(names)
