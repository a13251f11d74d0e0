"""Golden vectors of the literature, and the laws that a score must obey."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolkit
from toolkit.errors import InputError
from toolkit.measure.scores import (
    NETSCORES,
    SAM_VERSIONS,
    pareto_rank,
    sam,
    sam_winners,
    why_no_score,
)

VIT_SMALL = {"seconds": 21.3, "watts": 144.2, "peak_mib": 1084, "params_m": 21.7, "macs_g": 4.6}


@pytest.mark.parametrize(
    ("kind", "score"), [("NS-E", 69.3933), ("NS-M", 70.5241), ("NS#", 61.8058), ("NS", 58.1195)]
)
def test_netscores_of_the_published_row(kind, score):
    """ViT-S, full fine-tuning, CIFAR-100: table V of arXiv 2607.02158 as quoted elsewhere; NS by hand."""
    assert toolkit.netscore(kind, 89.7, **VIT_SMALL) == pytest.approx(score, abs=5e-5)


def test_netscore_by_hand():
    """20 log10(10² / (2 · 8)^1/2) = 20 log10 25."""
    assert toolkit.netscore("NS", 10, params_m=2, macs_g=8) == pytest.approx(20 * math.log10(25))


def test_units_move_a_score_by_constants():
    """MiB to GiB is 7.53 dB, seconds to milliseconds -7.5, accuracy as a fraction -80."""
    base = toolkit.netscore("NS#", 89.7, **VIT_SMALL)
    in_gib = toolkit.netscore("NS#", 89.7, **VIT_SMALL | {"peak_mib": 1084 / 1024})
    in_ms = toolkit.netscore("NS#", 89.7, **VIT_SMALL | {"seconds": 21300})
    as_fraction = toolkit.netscore("NS#", 0.897, **VIT_SMALL)
    assert [in_gib - base, in_ms - base, as_fraction - base] == pytest.approx([7.526, -7.5, -80], abs=1e-3)


@pytest.mark.parametrize("kind", NETSCORES)
@pytest.mark.parametrize("bad", [None, 0, -1.0, math.nan, math.inf])
def test_missing_or_non_positive_figures_give_no_score_but_a_reason(kind, bad):
    for name in NETSCORES[kind]:
        costs = VIT_SMALL | {name: bad}
        assert toolkit.netscore(kind, 89.7, **costs) is None
        assert name in why_no_score(kind, 89.7, **costs)
    assert toolkit.netscore(kind, bad, **VIT_SMALL) is None
    assert "accuracy_pct" in why_no_score(kind, bad, **VIT_SMALL)
    assert why_no_score(kind, 89.7, **VIT_SMALL) is None


def test_unknown_names_are_errors():
    with pytest.raises(InputError, match="Did you mean 'NS-E'"):
        toolkit.netscore("NSE", 89.7, **VIT_SMALL)
    with pytest.raises(InputError, match="unknown SAM version"):
        sam("SAM", 0.9, 100)


def test_sam_of_the_published_log():
    """Food-101 after an epoch: 84.53 %, 97,688 J as logged, 83,269 J without the double count."""
    version = "cifar100_vits16_repro/src"
    assert sam(version, 0.8453, 97_688) == pytest.approx(0.1694, abs=5e-5)
    assert sam(version, 0.8453, 83_269) == pytest.approx(0.1718, abs=5e-5)
    assert sam(version, 0.8453, 83_269, 5) / sam(version, 0.8453, 97_688, 5) == pytest.approx(1.072, abs=5e-4)


def test_the_three_sams_by_hand():
    """36,000 J are 10 Wh and 3.6e7 mJ."""
    legacy, src, video = (sam(version, 0.8, 36_000, 2) for version in SAM_VERSIONS)
    assert legacy == pytest.approx(2 * 0.64 / 1)
    assert src == pytest.approx(0.64 / math.log10(36_000) ** 2)
    assert video == pytest.approx(2 * 0.64 / math.log10(3.6e7))


@pytest.mark.parametrize(("version", "unit"), zip(SAM_VERSIONS, (3600.0, 1.0, 1e-3)))
def test_sam_has_no_value_at_one_unit_of_energy(version, unit):
    assert sam(version, 0.9, unit) is None
    assert sam(version, 0.9, None) is None and sam(version, 0.9, 0) is None
    assert sam(version, 0.9, 2 * unit) > 0


points = st.lists(st.tuples(st.floats(1, 100), st.floats(1, 100), st.floats(1, 100)), min_size=1, max_size=12)


@given(points, st.floats(1e-3, 1e3))
def test_law_ranks_do_not_depend_on_units(rows, unit):
    accuracy, memory, seconds = (np.array(column) for column in zip(*rows))
    costs = np.column_stack([memory, seconds])
    assert (pareto_rank(accuracy, costs) == pareto_rank(accuracy, costs * [unit, 1])).all()


@given(points)
def test_law_pareto_ranks(rows):
    accuracy, *costs = (np.array(column) for column in zip(*rows))
    costs = np.column_stack(costs)
    ranks = pareto_rank(accuracy, costs)
    assert ranks.min() == 1 and set(ranks) == set(range(1, ranks.max() + 1))
    for i in range(len(rows)):
        dominators = [
            j
            for j in range(len(rows))
            if accuracy[j] >= accuracy[i] and (costs[j] <= costs[i]).all()
            and (accuracy[j] > accuracy[i] or (costs[j] < costs[i]).any())
        ]  # fmt: skip
        assert ranks[i] == 1 + max((ranks[j] for j in dominators), default=0)


def test_points_that_cannot_be_ranked_are_an_error():
    with pytest.raises(InputError, match="missing figure"):
        pareto_rank([90, 80], [[1, math.nan], [1, 2]])
    with pytest.raises(InputError, match="a row for each"):
        pareto_rank([90, 80], [[1, 2]])


def test_the_verdict_of_sam_depends_on_the_version():
    winners = sam_winners((0.9, 440_000), (0.8865, 330_000), range(1, 6))
    assert set(winners.loc["VideoClassificationTest"]) == {1}
    assert set(winners.loc["cifar100_vits16_repro/src"]) == {2}
    assert winners.loc["cifar100_vits16_repro/legacy"].nunique() == 2
