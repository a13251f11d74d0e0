"""Intervals that cover, differences paired by seed, and sets that must not be averaged."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from toolkit.analysis import compare
from toolkit.analysis.statistics import (
    change,
    differences,
    holm,
    interval,
    mean_and_interval,
    means,
    standing,
)
from toolkit.errors import InputError


def runs(**columns) -> pd.DataFrame:
    """Two methods, three seeds each; lora is about 2 points below full in every seed."""
    frame = pd.DataFrame(
        {
            "dataset": "digits", "backbone": "demo_vit", "method": ["full"] * 3 + ["lora"] * 3,
            "checkpointing": "none", "seed": [0, 1, 2] * 2, "status": "ok",
            "test_top1_pct": [90.0, 94.0, 98.0, 88.1, 92.0, 95.9],
            "train_peak_bytes": 2**20, "within_budget": True, "train_seconds": 1.0, "params_trainable": 1,
            "env_hash": "a", "memory_source": "tracked_tensors", "budget_mode": "simulated",
            "energy_source": "nvml_counter", "alloc_conf": None, "train_energy_joules": 100.0,
        }
    )  # fmt: skip
    for name, values in columns.items():
        frame[name] = values
    return frame


def test_interval_against_a_textbook_value():
    """n = 3, sd = 1: t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4841."""
    mean, half, n = mean_and_interval(pd.Series([1.0, 2.0, 3.0]))
    assert (mean, n) == (2.0, 3) and half == pytest.approx(2.4841, abs=1e-4)


def test_one_value_has_no_interval_and_missing_is_never_zero():
    mean, half, n = mean_and_interval(pd.Series([5.0]))
    assert (mean, n) == (5.0, 1) and np.isnan(half)
    mean, half, n = mean_and_interval(pd.Series([None], dtype=object))
    assert np.isnan(mean) and np.isnan(half) and n == 0
    mean, _, n = mean_and_interval(pd.Series([100, None, 100]))
    assert (mean, n) == (100.0, 2)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_cover_the_truth_in_95_per_cent(n):
    rng = np.random.default_rng(n)
    covered = []
    for values in rng.normal(80.0, 0.2, (2000, n)):
        mean, half, _ = mean_and_interval(pd.Series(values))
        covered.append(abs(mean - 80.0) <= half)
    assert 0.93 <= np.mean(covered) <= 0.97


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-100, 100), st.floats(0.1, 10))
def test_law_interval_moves_with_shift_and_scale(values, shift, scale):
    mean, half, n = mean_and_interval(pd.Series(values))
    moved_mean, moved_half, _ = mean_and_interval(pd.Series(values) * scale + shift)
    assert n == len(values)
    assert moved_mean == pytest.approx(mean * scale + shift, rel=1e-6, abs=1e-3)
    assert moved_half == pytest.approx(half * scale, rel=1e-6, abs=1e-3)


def test_comparison_table():
    frame = runs(
        seed=[0, 1, 2, 0, 1, 2],
        status=["ok", "ok", "oom", "ok", "nan", "nan"],
        test_top1_pct=[90.0, 92.0, np.nan, 95.0, np.nan, np.nan],
        within_budget=[True, False, False, True, True, True],
    )
    table = compare(frame).set_index("method")
    assert list(table.columns[:3]) == ["dataset", "backbone", "checkpointing"]
    assert table.loc["full", "test accuracy (%)"] == "91.00 ± 12.71"
    assert table.loc["full", "n"] == "2" and table.loc["full", "not ok"] == "oom"
    assert table.loc["full", "within budget"] == "no"
    assert table.loc["lora", "test accuracy (%)"] == "95.00", "one seed, no interval"
    assert table.loc["lora", "peak memory (MiB)"] == "1.00"


@pytest.mark.parametrize(("name", "values"), [("lr", (0.1, 0.2)), ("test_sha256", ("a", "b"))])
def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(name, values):
    frame = runs(method="lora", seed=[0, 1, 2] * 2, **{name: [values[0]] * 3 + [values[1]] * 3})
    table = means(frame)
    assert table[name].tolist() == list(values) and table.n.tolist() == [3, 3]


def test_a_learning_rate_that_follows_from_the_method_is_not_shown():
    assert "lr" not in means(runs(lr=[1e-3] * 3 + [3e-3] * 3))


@pytest.mark.parametrize("name", ["env_hash", "memory_source", "energy_source"])
def test_runs_that_were_not_measured_alike_are_never_averaged_or_paired(name):
    for place in range(3):
        frame = runs()
        frame[name] = frame[name].astype(object)
        frame.loc[place, name] = "another"
        table = means(frame)
        assert sorted(table.n) == [1, 2, 3] and set(table.environment) == {"E1", "E2"}
        assert differences(frame, "score_pct", {"method": "full"}).n.tolist() == [2]


def test_runs_without_a_meter_are_alike():
    assert set(means(runs(energy_source=["nvml_counter", "none", "nvml_counter"] * 2)).environment) == {"E1"}


def test_standing_of_methods():
    """Full is more accurate, lora cheaper: both are on the front; what costs more for less is behind it."""
    frame = runs(
        ns_m_training=[70.0, 71.0, 72.0, 73.0, 74.0, 75.0],
        train_peak_bytes=[4.0] * 3 + [2.0] * 3,
        train_energy_joules=None,
        energy_source="none",
    )
    worse = frame[3:].assign(method="bitfit", train_peak_bytes=3.0, test_top1_pct=80.0, train_seconds=2.0)
    table = standing(pd.concat([frame, worse], ignore_index=True)).set_index("method")
    assert table.pareto_rank.to_dict() == {"bitfit": 2, "lora": 1, "full": 1}
    assert table.loc["lora", "ns_m_training"] == 74 and pd.isna(table.loc["lora", "ns_e_training"])
    accuracy = (88.1 + 92.0 + 95.9) / 300
    expected = 100 * accuracy * (1 - 2 / 4.4) * (1 - 1 / 2.2)
    assert table.loc["lora", "dominated_pct"] == pytest.approx(expected, abs=0.05)


def test_standing_needs_the_same_figures_of_all():
    table = standing(runs(train_energy_joules=[100.0] * 3 + [None] * 3)).set_index("method")
    assert table.loc["full", "pareto_rank"] == 1 and pd.isna(table.loc["lora", "pareto_rank"])
    assert standing(runs(status="oom")).pareto_rank.isna().all()


def test_standing_ranks_within_a_data_set_and_an_environment():
    """A 3060 is slower than an H100 whatever the method."""
    textures = runs(dataset="textures", test_top1_pct=runs().test_top1_pct - 30, train_sha256="other")
    slower = runs(env_hash="b", train_seconds=100.0, train_sha256="one")
    frame = pd.concat([runs(train_sha256="one"), textures, slower], ignore_index=True)
    table = standing(frame)
    assert len(table) == 6 and set(table.groupby(["dataset", "environment"]).pareto_rank.min()) == {1}


def test_differences_are_paired_by_seed():
    """Seeds spread by 4 points, the difference by 0.1: pairing finds it, two intervals would not."""
    (lora,) = differences(runs(), "score_pct", {"method": "full"}).to_dict("records")
    assert lora["method"] == "lora" and lora["mean"] == pytest.approx(-2.0) and lora["n"] == 3
    assert lora["half_width"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3) and lora["p"] < 0.01
    _, spread, _ = mean_and_interval(runs().test_top1_pct[:3])
    assert spread > 2, "which is why"


def test_every_method_has_its_own_learning_rate():
    frame = runs(lr=[1e-3] * 3 + [3e-3] * 3)
    assert differences(frame, "score_pct", {"method": "full"}).n.tolist() == [3]
    again = frame.assign(lr=1e-2, test_top1_pct=frame.test_top1_pct - 1)
    table = differences(pd.concat([frame, again], ignore_index=True), "score_pct", {"method": "full"})
    assert table.set_index("lr").loc[1e-2, "mean"] == pytest.approx(-2.0)


def test_other_data_make_no_pair():
    frame = runs(train_sha256=["x"] * 3 + ["y"] * 3)
    assert differences(frame, "score_pct", {"method": "full"}).empty


def test_a_seed_without_partner_is_left_out_and_one_pair_has_no_interval():
    frame = runs(status=["ok", "oom", "oom", "ok", "ok", "ok"])
    (lora,) = differences(frame, "score_pct", {"method": "full"}).to_dict("records")
    assert lora["n"] == 1 and lora["mean"] == pytest.approx(-1.9)
    assert np.isnan(lora["half_width"]) and np.isnan(lora["p"])


def test_unknown_columns_and_repeated_seeds_are_refused():
    for value, against in (("speed", {"method": "full"}), ("score_pct", {"methods": "full"})):
        with pytest.raises(InputError, match="no column"):
            differences(runs(), value, against)
    with pytest.raises(InputError, match="seed occurs twice"):
        differences(runs(seed=0), "score_pct", {"method": "full"})
    assert differences(runs(), "score_pct", {"method": "bitfit"}).empty


def test_partners_need_not_share_options_that_only_one_method_has():
    lora = runs()[3:]
    frame = pd.concat(
        [
            runs(rank=8, batch_norm="auto")[:3],
            lora.assign(rank=4, batch_norm="auto"),
            lora.assign(rank=16, batch_norm="updated"),
        ],
        ignore_index=True,
    )
    table = differences(frame, "score_pct", {"method": "full"}).set_index("rank")
    assert table.n.to_dict() == {4: 3, 16: 3} and table["mean"].tolist() == pytest.approx([-2.0, -2.0])
    # Two ranks among the partners: none of them is the one to compare with.
    assert differences(frame, "score_pct", {"method": "lora"}).empty


def test_costs_are_compared_as_ratios_by_a_paired_t_test():
    energies = [1000.0, 1010.0, 1020.0, 900.0, 930.0, 1000.0]
    (row,) = differences(runs(train_energy_joules=energies), "adapt_joules", {"method": "full"}).to_dict(
        "records"
    )
    expected = scipy.stats.ttest_rel(np.log(energies[3:]), np.log(energies[:3]))
    assert row["p"] == pytest.approx(expected.pvalue)
    ratio = scipy.stats.gmean(np.divide(energies[3:], energies[:3]))
    assert change("adapt_joules", row["mean"]) == pytest.approx(100 * (ratio - 1))


def test_pairs_that_all_agree_leave_nothing_to_test():
    frame = runs(test_top1_pct=[90.0, 94.0, 98.0, 89.0, 93.0, 97.0])
    (row,) = differences(frame, "score_pct", {"method": "full"}).to_dict("records")
    assert row["mean"] == pytest.approx(-1.0) and np.isnan(row["p"])
    assert interval("score_pct", -1.0, 0.0) == "−1.00 [=]"
    assert interval("adapt_seconds", np.log(2), np.nan, " %") == "+100.0 %"
    assert interval("adapt_seconds", 0.0, np.nan) == "0.0"


def test_holm_of_a_textbook():
    """p = 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02; what is missing does not count."""
    p = pd.Series([0.01, 0.04, np.nan, 0.03, 0.005], index=list("abcde"))
    assert holm(p).drop("c").to_dict() == pytest.approx({"a": 0.03, "b": 0.06, "d": 0.06, "e": 0.02})
    assert np.isnan(holm(p)["c"])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_law_holm_raises_keeps_the_order_and_is_below_bonferroni(values):
    p = pd.Series(values)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= (p * len(p)).clip(upper=1) + 1e-12).all()
    assert adjusted[p.sort_values().index].is_monotonic_increasing
