"""Intervals that cover, differences paired by seed, and sets that must not be averaged."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.analysis.statistics import (
    ALIKE,
    compare,
    mean_and_interval,
    paired_differences,
    refuse_mixed,
    standing,
)
from toolkit.errors import InputError


def runs(**columns) -> pd.DataFrame:
    """Two methods, three seeds each; lora is 2 points below full in every seed."""
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
    assert mean_and_interval(pd.Series([5.0])) == (5.0, None, 1)
    assert mean_and_interval(pd.Series([], dtype=float)) == (None, None, 0)
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
    assert table.loc["full", "test top-1 %"] == "91.00 ± 12.71"
    assert table.loc["full", "n"] == 2 and table.loc["full", "not ok"] == "oom"
    assert table.loc["full", "in budget"] == "no"
    assert table.loc["lora", "test top-1 %"] == "95.00", "one seed, no interval"
    assert table.loc["lora", "peak MiB"] == "1.00"


@pytest.mark.parametrize("name", ["lr", "budget", "test_sha256"])
def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(name):
    frame = runs(method="lora", seed=[0, 1, 2] * 2, **{name: ["a"] * 3 + ["b"] * 3})
    table = compare(frame)
    assert table[name].tolist() == ["a", "b"] and table.n.tolist() == [3, 3]


def test_joules_of_a_simulated_gpu_are_not_printed_as_measurements():
    assert set(compare(runs())["adapt J"]) == {"100 ± 0"}
    assert set(compare(runs(energy_source="fake"))["adapt J"]) == {"simulated"}
    assert set(compare(runs(train_energy_joules=None, energy_source="none"))["adapt J"]) == {"–"}


def test_every_mixed_set_is_refused_unless_told_to_mix():
    """50 sets, each with one run that was measured in another way."""
    rng = np.random.default_rng(0)
    for number in range(50):
        name = ALIKE[number % len(ALIKE)]
        frame = runs()
        frame[name] = frame[name].astype(object)
        frame.loc[rng.integers(len(frame)), name] = "another"
        with pytest.raises(InputError, match=name):
            compare(frame)
        with pytest.raises(InputError, match="mix=True"):
            paired_differences(frame, "test_top1_pct", {"method": "full"})
        assert len(compare(frame, mix=True)) == 2


def test_what_is_alike_is_not_refused():
    refuse_mixed(runs())
    refuse_mixed(runs(env_hash=["a"] * 3 + ["b"] * 3))  # two methods on two machines: no mean is mixed
    refuse_mixed(runs(energy_source=["nvml_counter", "none", "nvml_counter"] * 2))  # one without a meter
    refuse_mixed(runs(status=["ok", "ok", "failed"] * 2, env_hash=["a", "a", "b"] * 2))


def test_the_refusal_says_what_differs():
    frame = runs(env_hash=["a", "b", "a"] * 2, version_torch=["2.14.1", "2.11.0", "2.14.1"] * 2)
    with pytest.raises(InputError, match=r"none differ in env_hash: a, b \(version_torch\)"):
        refuse_mixed(frame)


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
    assert table["Pareto rank"].to_dict() == {"bitfit": 2, "lora": 1, "full": 1}
    assert table.loc["lora", "NS-M"] == "74.00 ± 2.48" and table.loc["lora", "NS-E"] == "–"
    accuracy = (88.1 + 92.0 + 95.9) / 300
    expected = 100 * accuracy * (1 - 2 / 4.4) * (1 - 1 / 2.2)
    assert table.loc["lora", "dominated %"] == pytest.approx(expected, abs=0.05)


def test_standing_needs_the_same_figures_of_all():
    lacking = runs(train_energy_joules=[100.0] * 3 + [None] * 3)
    table = standing(lacking).set_index("method")
    assert table.loc["full", "Pareto rank"] == 1 and pd.isna(table.loc["lora", "Pareto rank"])
    assert standing(runs(status="oom"))["Pareto rank"].isna().all()
    simulated = runs(energy_source="fake", ns_e_training=60.0, train_energy_joules=[1.0] * 3 + [9.0] * 3)
    table = standing(simulated).set_index("method")
    assert set(table["NS-E"]) == {"–"} and table.loc["lora", "Pareto rank"] == 2, "memory and time are real"


def test_standing_ranks_within_a_data_set():
    textures = runs(dataset="textures", test_top1_pct=runs().test_top1_pct - 30, train_sha256="other")
    table = standing(pd.concat([runs(train_sha256="one"), textures], ignore_index=True))
    assert table.groupby("dataset")["Pareto rank"].min().to_dict() == {"digits": 1, "textures": 1}


def test_rivals_must_be_measured_alike():
    """A 3060 is slower than an H100 whatever the method."""
    frame = runs(env_hash=["a"] * 3 + ["b"] * 3, train_seconds=[10.0] * 3 + [100.0] * 3)
    with pytest.raises(InputError, match="env_hash"):
        standing(frame)
    with pytest.raises(InputError, match="env_hash"):
        paired_differences(frame, "train_seconds", {"method": "full"})
    assert len(standing(frame, mix=True)) == len(compare(frame)) == 2
    assert len(standing(runs(budget_mode=["native"] * 3 + ["simulated"] * 3))) == 2, "budgets may compete"


def test_differences_are_paired_by_seed():
    """Seeds spread by 4 points, the difference by 0.1: pairing finds it, two intervals would not."""
    table = paired_differences(runs(), "test_top1_pct", {"method": "full"}).set_index("method")
    lora = table.loc["lora"]
    assert lora["mean"] == pytest.approx(-2.0) and lora.n == 3
    assert lora.half_width == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3) and not lora.tied
    assert table.loc["full", "mean"] == 0 and table.loc["full", "tied"]
    _, spread, _ = mean_and_interval(runs().test_top1_pct[:3])
    assert spread > 2, "which is why"


def test_every_method_has_its_own_learning_rate():
    table = paired_differences(runs(lr=[1e-3] * 3 + [3e-3] * 3), "test_top1_pct", {"method": "full"})
    lora = table.set_index("method").loc["lora"]
    assert lora.n == 3 and lora["mean"] == pytest.approx(-2.0)
    both = runs(lr=[1e-3] * 3 + [3e-3] * 3, seed=[0, 1, 2] * 2)
    again = both.assign(lr=1e-2, test_top1_pct=both.test_top1_pct - 1)
    table = paired_differences(
        pd.concat([both, again], ignore_index=True), "test_top1_pct", {"method": "full"}
    )
    assert table.set_index(["method", "lr"]).loc[("lora", 1e-2)]["mean"] == pytest.approx(-2.0)


def test_other_data_make_no_pair():
    frame = runs(train_sha256=["x"] * 3 + ["y"] * 3)
    table = paired_differences(frame, "test_top1_pct", {"method": "full"}).set_index("method")
    assert table.loc["lora", "n"] == 0 and pd.isna(table.loc["lora", "mean"])


def test_joules_of_a_simulated_gpu_are_not_compared():
    with pytest.raises(InputError, match="no finished run"):
        paired_differences(runs(energy_source="fake"), "train_energy_joules", {"method": "full"})


def test_a_seed_without_partner_is_left_out_and_one_pair_has_no_interval():
    frame = runs(status=["ok", "oom", "oom", "ok", "ok", "ok"])
    lora = paired_differences(frame, "test_top1_pct", {"method": "full"}).set_index("method").loc["lora"]
    assert lora.n == 1 and lora["mean"] == pytest.approx(-1.9)
    assert pd.isna(lora.half_width) and lora.tied is None


@pytest.mark.parametrize(
    ("value", "against", "message"),
    [
        ("speed", {"method": "full"}, "no column 'speed'"),
        ("test_top1_pct", {"methods": "full"}, "no column 'methods'"),
        ("test_top1_pct", {"method": "bitfit"}, "no finished run has"),
    ],
)
def test_what_cannot_be_paired_is_an_error(value, against, message):
    with pytest.raises(InputError, match=message):
        paired_differences(runs(), value, against)
    with pytest.raises(InputError, match="seed occurs twice"):
        paired_differences(runs(seed=0), "test_top1_pct", {"method": "full"})


def test_partners_need_not_share_what_their_method_does_not_have():
    lora = runs()[3:]
    frame = pd.concat(
        [
            runs(lora_rank=8, batch_norm="auto")[:3],
            lora.assign(lora_rank=4, batch_norm="auto"),
            lora.assign(lora_rank=16, batch_norm="updated"),
        ],
        ignore_index=True,
    )
    table = paired_differences(frame, "test_top1_pct", {"method": "full"})
    rows = table[table.method == "lora"].set_index("lora_rank")
    assert rows.n.to_dict() == {4: 3, 16: 3} and rows["mean"].tolist() == pytest.approx([-2.0, -2.0])
    # Two ranks among the partners: none of them is the one to compare with.
    table = paired_differences(frame, "test_top1_pct", {"method": "lora"}).set_index("method")
    assert table.n["full"] == 0
