"""Probes: the results of reference implementations, and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from toolkit.baselines import probes
from toolkit.baselines.probes import fit_probe
from toolkit.baselines.registry import PROTOCOLS
from toolkit.errors import InputError

CLASSES, WIDTH = 4, 10
WITHOUT_DRAWS = [protocol for protocol in PROTOCOLS["features"] if protocol != "linear_grid"]
QUICK = {"iterations": 20}


def clusters(rows: int, seed: int, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters whose features have different scales and means."""
    means = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % CLASSES
    y = torch.where(torch.rand(rows, generator=generator) < 0.2, 0, y)  # classes of different sizes
    x = means[y] + spread * torch.randn(rows, WIDTH, generator=generator)
    return x * torch.logspace(-1, 1, WIDTH) + 3, y


TRAIN, VAL, TEST = clusters(200, 1), clusters(100, 2), clusters(150, 3)


def standardised() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = TRAIN[0].double()
    mean, std = x.mean(0), x.std(0, correction=0)
    return (x - mean) / std, mean, std


def test_every_protocol_of_the_registry_is_fitted_and_beats_the_largest_class():
    largest = 100 * (TEST[1] == 0).double().mean().item()
    for protocol in PROTOCOLS["features"]:
        probe = fit_probe(protocol, TRAIN, VAL, CLASSES, **QUICK)
        scores = probe(TEST[0])
        assert scores.shape == (150, CLASSES) and scores.dtype == torch.float32
        assert 100 * (scores.argmax(1) == TEST[1]).double().mean().item() > largest + 10, protocol
        expected = 100 * (probe(VAL[0]).argmax(1) == VAL[1]).double().mean().item()
        assert probe.val_top1_pct == pytest.approx(expected)
        assert not any(parameter.requires_grad for parameter in probe.parameters())


def test_knn_decides_as_the_sum_of_exponential_votes():
    probe = fit_probe("knn", TRAIN, VAL, CLASSES)
    bank, queries = (
        x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (TRAIN[0], TEST[0])
    )
    cosines = queries @ bank.T
    votes = np.zeros((len(queries), CLASSES))
    for row, nearest in enumerate(np.argsort(-cosines, axis=1)[:, : probe.k]):
        for neighbour in nearest:
            votes[row, TRAIN[1][neighbour]] += math.exp(cosines[row, neighbour] / 0.07)
    assert probe(TEST[0]).argmax(1).tolist() == votes.argmax(1).tolist()
    torch.testing.assert_close(probe(TEST[0]).exp().sum(1), torch.ones(150))


def test_knn_tries_no_more_neighbours_than_there_are_rows():
    few = TRAIN[0][:15], TRAIN[1][:15]
    assert fit_probe("knn", few, VAL, CLASSES).k in (10, 15)


def test_neighbours_of_many_queries_are_those_of_each_alone():
    probe = fit_probe("knn", TRAIN, VAL, CLASSES)
    many = TEST[0].repeat(4, 1)  # more than are compared at a time
    torch.testing.assert_close(probe(many)[450:], torch.cat([probe(row[None]) for row in TEST[0]]))


def test_centroid_decides_by_the_cosine_to_class_means():
    probe = fit_probe("centroid", TRAIN, VAL, CLASSES)
    unit, queries = F.normalize(TRAIN[0]), F.normalize(TEST[0])
    means = torch.stack([unit[TRAIN[1] == label].mean(0) for label in range(CLASSES)])
    cosines = queries @ F.normalize(means).T
    torch.testing.assert_close(probe(TEST[0]), probe.choices["scale"] * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", ["centroid", "ridge"])
def test_scores_are_scaled_to_the_lowest_validation_loss(protocol):
    probe = fit_probe(protocol, TRAIN, VAL, CLASSES)
    scores, scale = probe(VAL[0]), probe.choices["scale"]
    loss = F.cross_entropy(scores, VAL[1])
    assert 1 < scale < 4096
    assert loss < F.cross_entropy(scores * 2**0.5, VAL[1])
    assert loss < F.cross_entropy(scores / 2**0.5, VAL[1])


def test_ridge_is_scikit_learns():
    probe = fit_probe("ridge", TRAIN, VAL, CLASSES)
    theirs = RidgeClassifier(alpha=probe.choices["alpha"]).fit(TRAIN[0].double().numpy(), TRAIN[1])
    assert probe(TEST[0]).argmax(1).tolist() == theirs.predict(TEST[0].numpy()).tolist()
    indicators = (theirs.decision_function(TEST[0].numpy()) + 1) / 2  # its targets are -1 and 1
    ours = probe(TEST[0]) / probe.choices["scale"]
    torch.testing.assert_close(ours.double(), torch.from_numpy(indicators), rtol=1e-4, atol=1e-4)


def test_lda_is_scikit_learns():
    probe = fit_probe("lda", TRAIN, VAL, CLASSES)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=probe.choices["shrinkage"])
    theirs.fit(TRAIN[0].double().numpy(), TRAIN[1])
    expected = torch.from_numpy(theirs.predict_proba(TEST[0].double().numpy()))
    torch.testing.assert_close(probe(TEST[0]).softmax(1).double(), expected, rtol=1e-3, atol=1e-5)


def test_logreg_ends_where_the_gradient_vanishes():
    probe = fit_probe("logreg", TRAIN, VAL, CLASSES)
    z, mean, std = standardised()
    weight = (probe.weight.double() * std[:, None]).requires_grad_()
    bias = (probe.bias.double() + mean @ probe.weight.double()).requires_grad_()
    penalty = probe.choices["l2"] / 2 * weight.square().sum()
    (F.cross_entropy(z @ weight + bias, TRAIN[1]) + penalty).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()).item() < 1e-4


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-5])
def test_logreg_is_scikit_learns(monkeypatch, l2):
    monkeypatch.setattr(probes, "L2_PATH", (l2,))
    monkeypatch.setattr(probes, "GRADIENT_TOLERANCE", 1e-6)
    probe = fit_probe("logreg", TRAIN, VAL, CLASSES)
    z, mean, std = standardised()
    theirs = LogisticRegression(C=probe.choices["C"], tol=1e-9, max_iter=10_000).fit(z.numpy(), TRAIN[1])
    ours = (probe.weight.double() * std[:, None]).T
    torch.testing.assert_close(ours, torch.from_numpy(theirs.coef_), rtol=5e-3, atol=5e-3)
    expected = torch.from_numpy(theirs.predict_proba(((TEST[0] - mean) / std).numpy()))
    torch.testing.assert_close(probe(TEST[0]).softmax(1).double(), expected, rtol=1e-2, atol=1e-3)


def test_logreg_chooses_on_the_path_as_if_each_setting_were_fitted_alone(monkeypatch):
    probe = fit_probe("logreg", TRAIN, VAL, CLASSES)
    alone = {}
    for l2 in probes.L2_PATH[:9]:
        monkeypatch.setattr(probes, "L2_PATH", (l2,))
        alone[l2] = fit_probe("logreg", TRAIN, VAL, CLASSES).val_top1_pct
    assert alone[probe.choices["l2"]] == max(alone.values())


def test_logreg_that_does_not_converge_is_an_error(monkeypatch):
    monkeypatch.setattr(probes, "GRADIENT_TOLERANCE", 1e-12)
    with pytest.raises(RuntimeError, match=r"stopped at a gradient of .* take another protocol"):
        fit_probe("logreg", TRAIN, VAL, CLASSES)


def test_logreg_takes_constant_and_repeated_features():
    def widened(x):
        return torch.cat([x, x, torch.full((len(x), 2), 7.3)], dim=1)

    wide = fit_probe("logreg", (widened(TRAIN[0]), TRAIN[1]), (widened(VAL[0]), VAL[1]), CLASSES)
    assert abs(wide.val_top1_pct - fit_probe("logreg", TRAIN, VAL, CLASSES).val_top1_pct) <= 3


@pytest.mark.parametrize("protocol", WITHOUT_DRAWS)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_the_order_of_rows_changes_nothing(protocol, seed):
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(seed))
    probe = fit_probe(protocol, TRAIN, VAL, CLASSES)
    shuffled = fit_probe(protocol, (TRAIN[0][rows], TRAIN[1][rows]), VAL, CLASSES)
    tolerance = 2e-2 if protocol == "logreg" else 1e-3  # both are within the gradient's tolerance
    torch.testing.assert_close(shuffled(TEST[0]), probe(TEST[0]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("protocol", WITHOUT_DRAWS)
@settings(max_examples=4)
@given(names=st.permutations(range(CLASSES)))
def test_other_names_of_classes_reorder_the_scores(protocol, names):
    renamed = torch.tensor(names)
    probe = fit_probe(protocol, TRAIN, VAL, CLASSES)
    other = fit_probe(protocol, (TRAIN[0], renamed[TRAIN[1]]), (VAL[0], renamed[VAL[1]]), CLASSES)
    tolerance = 2e-2 if protocol == "logreg" else 1e-3
    torch.testing.assert_close(other(TEST[0])[:, renamed], probe(TEST[0]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("protocol", ["knn", "centroid"])
@settings(max_examples=4)
@given(factor=st.floats(1e-2, 1e2))
def test_cosines_do_not_see_the_length_of_features(protocol, factor):
    probe = fit_probe(protocol, TRAIN, VAL, CLASSES)
    longer = fit_probe(protocol, (factor * TRAIN[0], TRAIN[1]), VAL, CLASSES)
    torch.testing.assert_close(longer(TEST[0]), probe(TEST[0]), rtol=1e-3, atol=1e-3)


def test_among_equal_settings_the_most_regularised_is_chosen():
    train, val = clusters(200, 4, spread=0.01), clusters(100, 5, spread=0.01)  # every setting is right
    assert fit_probe("lda", train, val, CLASSES).choices["shrinkage"] == 1.0
    assert fit_probe("knn", train, val, CLASSES).choices["k"] == 200


@pytest.mark.parametrize("protocol", PROTOCOLS["features"])
def test_half_precision_features_are_taken(protocol):
    half = fit_probe(protocol, (TRAIN[0].half(), TRAIN[1]), (VAL[0].half(), VAL[1]), CLASSES, **QUICK)
    assert half(TEST[0].half()).dtype == torch.float32
    single = fit_probe(protocol, TRAIN, VAL, CLASSES, **QUICK)
    assert abs(half.val_top1_pct - single.val_top1_pct) <= 2


# ---------------------------------------------------------------------------------------------------
# The grid of linear layers


def test_a_head_of_the_grid_is_plain_sgd():
    x, y = F.normalize(TRAIN[0][:100]), TRAIN[1][:100]  # one batch: the order does not count
    probe = fit_probe("linear_grid", (x, y), (x, y), CLASSES, seed=5, iterations=30)
    assert probe.layers
    choices, width, heads = probe.choices, WIDTH // 5, 13
    generator, start = torch.Generator().manual_seed(5), {}
    for blocks in (1, 4):
        for patches in (False, True):
            columns = (blocks + patches) * width
            drawn = 0.01 * torch.randn(columns + 1, heads * CLASSES, generator=generator)
            start[blocks, patches] = drawn[:-1].view(columns, heads, CLASSES)
    part = slice(0 if choices["blocks"] == 4 else 3 * width, (4 + choices["mean_patch"]) * width)
    layer = torch.nn.Linear(part.stop - part.start, CLASSES)
    head = probes.GRID_LEARNING_RATES.index(choices["learning_rate"])
    layer.weight.data = start[choices["blocks"], choices["mean_patch"]][:, head].T.clone()
    layer.bias.data.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=choices["learning_rate"] * 100 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(layer(x[:, part]), y).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(probe.weight[part], layer.weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probe.bias, layer.bias, rtol=1e-4, atol=1e-5)
    outside = [column for column in range(WIDTH) if not part.start <= column < part.stop]
    assert not probe.weight[outside].any()


def test_the_grid_is_drawn_from_the_seed():
    first, again, other = (
        fit_probe("linear_grid", TRAIN, VAL, CLASSES, seed=seed, **QUICK).weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------------
# Bad input


def test_unknown_protocol_gets_the_nearest():
    with pytest.raises(InputError, match=r"unknown protocol 'logreq'\. Did you mean 'logreg'"):
        fit_probe("logreq", TRAIN, VAL, CLASSES)


def test_a_class_without_training_rows_is_refused():
    some = TRAIN[1] != 2
    with pytest.raises(InputError, match=r"4 classes, without rows: \[2\]"):
        fit_probe("knn", (TRAIN[0][some], TRAIN[1][some]), VAL, CLASSES)
    with pytest.raises(InputError, match=r"without rows: \[1, 2, 3\]"):
        fit_probe("knn", (TRAIN[0], torch.zeros_like(TRAIN[1])), VAL, CLASSES)
    with pytest.raises(InputError, match="two or more classes"):
        fit_probe("knn", (TRAIN[0], torch.zeros_like(TRAIN[1])), (VAL[0], torch.zeros_like(VAL[1])), 1)


def test_lda_of_one_row_per_class_is_refused():
    rows = [(TRAIN[1] == label).nonzero()[0].item() for label in range(CLASSES)]
    with pytest.raises(InputError, match="lda needs features that differ within a class"):
        fit_probe("lda", (TRAIN[0][rows], TRAIN[1][rows]), VAL, CLASSES)
