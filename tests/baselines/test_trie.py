"""Likelihoods of class names: the packed pass against one pass per class, and aggregations of its table."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import tiny_generative, tiny_mobilevlm
from trie import score_naive

from toolkit import InputError
from toolkit.baselines import trie as trie_module
from toolkit.baselines.generative import KINDS, load, prune_vocabulary
from toolkit.baselines.trie import AGGREGATIONS, Trie, TrieClassifier, aggregate, score_trie

NAMES = ["can", "candle", "maple tree", "aquarium fish", "cat"]  # one is the beginning of another
QUESTION = "What type of object is in this photo?"
_noise = np.random.default_rng(0)
IMAGES = [Image.fromarray(_noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """`tiny(kind)`: a tiny random model, loaded afresh from its folder."""
    folders = {}

    def build(kind: str, **options):
        if kind not in folders:
            write = tiny_mobilevlm if kind.startswith("mobilevlm") else tiny_generative
            folders[kind] = write(kind, tmp_path_factory.mktemp(kind), NAMES)
        options = {"dtype": torch.float32} | options
        return load(folders[kind], kind, **options)

    return build


@pytest.fixture(scope="module")
def model(tiny):
    """`model(kind)`: one that the tests share and do not change."""
    return functools.cache(tiny)


def largest_difference(vlm, inputs) -> float:
    candidates = vlm.candidates(QUESTION, NAMES)
    trie = Trie(candidates)
    table, steps = score_trie(vlm, inputs, trie), score_naive(vlm, inputs, candidates)
    return max(
        float((table[:, path[:length]] - naive).abs().max())
        for path, length, naive in zip(trie.paths, trie.lengths, steps)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_pass_equals_one_pass_per_class(model, kind):
    vlm = model(kind)
    for images in (IMAGES[:1], IMAGES):
        assert largest_difference(vlm, vlm.inputs(images, QUESTION)) < 1e-4


@pytest.mark.parametrize("kind", ["smolvlm", "paligemma2", "mobilevlm_v2"])
def test_the_packed_pass_equals_one_pass_per_class_in_four_bits(tiny, kind):
    vlm = tiny(kind, four_bit=True)
    assert largest_difference(vlm, vlm.inputs(IMAGES, QUESTION)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_s_scores_depend_on_it_alone(model, kind):
    """Not on the others in the batch, nor on calls before."""
    vlm = model(kind)
    classifier = TrieClassifier(vlm, QUESTION, NAMES, "sum")
    together = classifier(vlm.inputs(IMAGES, QUESTION))
    alone = torch.cat([classifier(vlm.inputs([image], QUESTION)) for image in IMAGES])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert torch.equal(together, classifier(vlm.inputs(IMAGES, QUESTION)))
    assert together.std(0).min() > 1e-3  # but on the image


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_vocabulary_gives_the_same_sibling_scores(tiny, kind):
    vlm = tiny(kind)
    inputs = vlm.inputs(IMAGES, QUESTION)
    whole, before = TrieClassifier(vlm, QUESTION, NAMES)(inputs), vlm.vocabulary
    prune_vocabulary(vlm, vlm.used_tokens(QUESTION, NAMES))
    assert vlm.vocabulary < before / 2
    pruned = TrieClassifier(vlm, QUESTION, NAMES)
    torch.testing.assert_close(pruned(inputs), whole, rtol=0, atol=1e-5)
    assert pruned.offered == ("sibling",)
    with pytest.raises(InputError, match="unknown aggregation 'sum'"):
        TrieClassifier(vlm, QUESTION, NAMES, "sum")


def test_sibling_scores_are_log_probabilities_of_the_classes(model):
    scores = TrieClassifier(model("idefics3"), QUESTION, NAMES)(model("idefics3").inputs(IMAGES, QUESTION))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))


def test_an_image_without_content_tells_nothing(model):
    vlm = model("paligemma")
    classifier = TrieClassifier(vlm, QUESTION, NAMES, "pmi")
    assert torch.equal(classifier(vlm.null_inputs(QUESTION)), torch.zeros(1, len(NAMES)))
    assert classifier(vlm.inputs(IMAGES, QUESTION)).abs().min() > 0


def test_chunked_logits_are_the_same(model, monkeypatch):
    vlm = model("paligemma2")
    inputs, trie = vlm.inputs(IMAGES, QUESTION), Trie(vlm.candidates(QUESTION, NAMES))
    at_once = score_trie(vlm, inputs, trie)
    widths = []
    logits = vlm.logits
    monkeypatch.setattr(vlm, "logits", lambda hidden: widths.append(hidden.shape[1]) or logits(hidden))
    monkeypatch.setattr(trie_module, "LOGITS_BYTES", 2 * 4 * 3 * vlm.vocabulary)
    torch.testing.assert_close(score_trie(vlm, inputs, trie), at_once)
    assert max(widths) == 2
    assert sum(widths) == len(trie.inner)


def test_half_precision_gives_float32_scores(tiny):
    vlm = tiny("smolvlm", dtype=torch.bfloat16)
    scores = TrieClassifier(vlm, QUESTION, NAMES)(vlm.inputs(IMAGES, QUESTION))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))


def test_choose_takes_the_most_accurate_aggregation(model):
    vlm = model("idefics3")
    classifier = TrieClassifier(vlm, QUESTION, NAMES)
    inputs = vlm.inputs(IMAGES, QUESTION)
    answers = {how: TrieClassifier(vlm, QUESTION, NAMES, how)(inputs).argmax(1) for how in AGGREGATIONS}
    for how, labels in answers.items():
        classifier.choose(
            [(vlm.inputs([image], QUESTION), label[None]) for image, label in zip(IMAGES, labels)]
        )
        expected = {other: 100 * float((answers[other] == labels).float().mean()) for other in AGGREGATIONS}
        assert classifier.choices == pytest.approx(expected)
        assert classifier.choices[how] == pytest.approx(100)
        first = next(other for other in AGGREGATIONS if torch.equal(answers[other], labels))
        assert classifier.aggregation == first
        assert torch.equal(classifier(inputs).argmax(1), labels)


# ---------------------------------------------------------------------------------------------------
# The table alone

END = 9
candidate_sets = st.lists(
    st.lists(st.integers(0, 3), max_size=4).map(lambda tokens: [*tokens, END]),
    min_size=1,
    max_size=8,
    unique_by=tuple,
)


@settings(max_examples=30)
@given(candidate_sets, st.integers(0, 2**31 - 1))
def test_aggregations_equal_enumeration(candidates, seed):
    trie = Trie(candidates)
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(3, len(trie.tokens), generator=generator)
    tables[:, 0] = 0  # the root
    tables, null = tables[:2], tables[2:]

    beginnings = {tuple(ids[:n]) for ids in candidates for n in range(1, len(ids) + 1)}
    assert len(trie.tokens) == len(beginnings) + 1
    node = {  # of each beginning, by walking the trie's own links
        tuple(candidates[c][: step + 1]): int(trie.paths[c, step])
        for c in range(len(candidates))
        for step in range(len(candidates[c]))
    }
    assert sorted(node.values()) == list(range(1, len(trie.tokens)))
    for beginning, index in node.items():
        assert trie.tokens[index] == beginning[-1]
        assert trie.depths[index] == len(beginning)
        assert trie.parents[index] == node.get(beginning[:-1], 0)

    def log_p(table, beginning) -> float:
        return float(table[node[beginning]])

    def among(table, beginning) -> float:
        siblings = [b for b in beginnings if b[:-1] == beginning[:-1]]
        return log_p(table, beginning) - math.log(sum(math.exp(log_p(table, b)) for b in siblings))

    for row in range(2):
        for c, ids in enumerate(candidates):
            steps = [tuple(ids[:n]) for n in range(1, len(ids) + 1)]
            total = sum(log_p(tables[row], step) for step in steps)
            expected = {
                "sum": total,
                "mean": total / len(ids),
                "pmi": total - sum(log_p(null[0], step) for step in steps),
                "sibling": sum(among(tables[row], step) for step in steps),
            }
            for how, value in expected.items():
                assert float(aggregate(tables, trie, how, null)[row, c]) == pytest.approx(value, abs=1e-4)
    torch.testing.assert_close(aggregate(tables, trie, "sibling").exp().sum(1), torch.ones(2))


@settings(max_examples=30)
@given(candidate_sets)
def test_a_node_sees_its_ancestors_and_itself(candidates):
    trie = Trie(candidates)
    packed, sees = trie.inner[1:].tolist(), trie.sees()
    assert sees.shape == (len(packed), len(packed))
    for row, node in enumerate(packed):
        ancestors = set()
        while node:
            ancestors.add(node)
            node = int(trie.parents[node])
        assert {packed[column] for column in sees[row].nonzero().flatten().tolist()} == ancestors


@pytest.mark.parametrize("candidates", [[[1, 2], [1]], [[1, 9], [1, 9]], [[1], []]])
def test_a_trie_refuses_candidates_that_are_not_alternatives(candidates):
    with pytest.raises(InputError, match="same tokens, or one begins with the other"):
        Trie(candidates)
