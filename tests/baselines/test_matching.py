"""Free answers as classes: which class an answer names, and the classifier that asks for answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_generative

from toolkit import InputError
from toolkit.baselines.generative import load
from toolkit.baselines.matching import NEW_TOKENS, GenerationClassifier, match, normalise

CLASSES = [
    "tree",
    "maple tree",
    "can",
    "candle",
    "bus",
    "rose",
    "aquarium_fish",
    "polka-dotted",
    "house",
    "fly",
]
QUESTION = "What type of object is in this photo?"
_noise = np.random.default_rng(0)
IMAGES = [Image.fromarray(_noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("candle", "candle"),
        ("  A Candle. ", "candle"),
        ("It is a maple tree in autumn", "maple tree"),  # the longest
        ("a tree, not a maple", "tree"),
        ("a can and a bus", "can"),  # equally long: the first
        ("a bus and a can", "bus"),
        ("candlestick", None),  # whole words only
        ("Buses!", "bus"),
        ("two roses", "rose"),
        ("houses", "house"),
        ("flies", "fly"),
        ("aquarium fish", "aquarium_fish"),
        ("polka dotted texture", "polka-dotted"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_class_that_an_answer_names(answer, expected):
    found = match(answer, CLASSES)
    assert (None if found is None else CLASSES[found]) == expected


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("bus", "buses"),
        ("box", "boxes"),
        ("dish", "dishes"),
        ("berry", "berries"),
        ("glass", "glasses"),
        ("boy", "boys"),
        ("tie", "ties"),
        ("house", "houses"),
        ("church", "churches"),
    ],
)
def test_regular_plurals_are_their_singulars(one, many):
    assert normalise(one) == normalise(many)


def test_unlike_words_stay_unlike():
    words = ["bus", "bush", "rose", "rise", "can", "cane", "glass", "gloss", "fly", "flea", "ray", "rat"]
    assert len({normalise(word) for word in words}) == len(words)


words = st.text(st.characters(categories=["Lu", "Ll", "Nd"]), min_size=1, max_size=8)


@given(st.lists(words, min_size=1, max_size=5, unique_by=normalise), st.data())
def test_every_class_is_an_answer_for_itself(names, data):
    names = [name for name in names if normalise(name)]
    for index, name in enumerate(names):
        dressed = data.draw(st.sampled_from([name, f"The {name}.", f"{name.upper()}!", f"  a  {name}"]))
        if normalise(dressed) == normalise(name):  # not where upper case has other letters
            assert match(dressed, names) == index


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tiny_generative("idefics3", tmp_path_factory.mktemp("idefics3"), CLASSES)
    return load(folder, "idefics3", dtype=torch.float32)


def test_scores_mark_the_class_that_the_answer_names(vlm, monkeypatch):
    classifier = GenerationClassifier(vlm, CLASSES)
    monkeypatch.setattr(classifier, "answers", lambda inputs: ["A rose.", "nothing", "the can"])
    scores = classifier({})
    assert scores.dtype == torch.float32
    assert scores.shape == (3, len(CLASSES) + 1)
    assert scores.argmax(1).tolist() == [CLASSES.index("rose"), len(CLASSES), CLASSES.index("can")]
    assert torch.equal(scores.sum(1), torch.ones(3))


def test_answers_are_greedily_decoded(vlm):
    classifier, tokenizer = GenerationClassifier(vlm, CLASSES), vlm.processor.tokenizer
    answers = classifier.answers(vlm.inputs(IMAGES, QUESTION))
    for image, answer in zip(IMAGES, answers):
        inputs, said = vlm.inputs([image], QUESTION), []
        for _ in range(NEW_TOKENS):
            hidden = vlm.hidden(inputs).last_hidden_state[:, -1:]
            said.append(int(vlm.logits(hidden).argmax()))
            if said[-1] == vlm.terminator:
                break
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([said[-1:]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert answer == tokenizer.decode(said, skip_special_tokens=True)
    assert answers[0] != answers[1]


def test_names_that_answers_cannot_tell_apart_are_refused(vlm):
    with pytest.raises(InputError, match="'bus' and 'The Buses' read alike"):
        GenerationClassifier(vlm, ["bus", "rose", "The Buses"])
    with pytest.raises(InputError, match="class 1 has no words in its name"):
        GenerationClassifier(vlm, ["bus", "?!"])
    with pytest.raises(InputError, match="no class names"):
        GenerationClassifier(vlm, [])
