"""Verdicts on published claims, from records made so that the verdict is known."""

from unittest import mock

import numpy as np
import pandas as pd
import pytest

from toolkit.analysis import claims_checkpointing as verdicts
from toolkit.analysis.claims import REFUTED, SUPPORTED, UNTESTED
from toolkit.analysis.claims_checkpointing import CLAIMS, double_count, findings

SEEDS = (0, 1, 2)
NOISE = (0.99, 1.0, 1.012)  # of the three seeds


def runs(method="full", checkpointing="none", **columns) -> pd.DataFrame:
    """Three seeds of one method and strategy on the paper's data and backbone."""
    frame = pd.DataFrame(
        {
            "dataset": "cifar100", "backbone": "vit_small", "method": method, "checkpointing": checkpointing,
            "seed": SEEDS, "budget_bytes": 10**9, "status": "ok", "phase": "training", "environment": "E1",
            "test_top1_pct": [88.0, 89.0, 90.1], "train_peak_bytes": 1000 * 2**20, "train_seconds": 10.0,
            "train_energy_joules": [1000.0 * noise for noise in NOISE], "energy_source": "nvml_counter",
            "checkpointed_blocks": 6, "params_trainable": 1000, "train_sha256": "a", "test_sha256": "b",
        }
    )  # fmt: skip
    return frame.assign(**columns)


def verdict(frame, text):
    """The one finding on the claim that contains `text`, this claim alone judged: all of them take longer."""
    (claim,) = [claim for claim in CLAIMS if text in claim.text]
    with mock.patch.object(verdicts, "CLAIMS", (claim,)):
        table = findings(frame)  # the first needs no run
    assert len(table) == 2
    return table.iloc[1]


def both(*parts):
    return pd.concat(parts, ignore_index=True)


def test_every_claim_has_a_finding_even_without_runs():
    found = findings(pd.DataFrame({"status": []}))[1:]
    assert list(found.claim) == [claim.text for claim in CLAIMS]
    assert set(found.verdict) == {UNTESTED} and set(found.n) == {0} and set(found.why) == {"no run ended ok"}


def test_table_v_needs_no_run():
    found = findings(pd.DataFrame({"status": []})).iloc[0]
    assert found.verdict == SUPPORTED and found.ours == "NS-E 69.39, NS-M 70.52, NS# 61.81"


@pytest.mark.parametrize(
    ("share", "expected"), [(0.50, SUPPORTED), (0.21, SUPPORTED), (0.70, REFUTED), (1.2, REFUTED)]
)
def test_peak_memory_of_the_adaptive_rule(share, expected):
    rule = runs(checkpointing="threshold", train_peak_bytes=int(share * 1000 * 2**20))
    found = verdict(both(runs(), rule), "43 to 79 %")
    assert found.verdict == expected and found.n == 3
    assert f"{100 * (share - 1):+.1f} %".replace("-", "−") in found.ours


def test_a_rule_that_checkpointed_nothing_is_not_tested():
    rule = runs(checkpointing="threshold", checkpointed_blocks=0)
    found = verdict(both(runs(), rule), "43 to 79 %")
    assert found.verdict == UNTESTED and "checkpointed nothing" in found.why


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ((1.19, 1.20, 1.21), SUPPORTED),
        ((1.49, 1.50, 1.51), REFUTED),
        ((1.00, 1.10, 1.25), UNTESTED),  # contains 0 and the published range
        ((0.999, 1.0, 1.001), REFUTED),  # sure to be less than 9 %
    ],
)
def test_energy_of_the_adaptive_rule(factors, expected):
    plain = runs()
    rule = runs(checkpointing="threshold", train_energy_joules=plain.train_energy_joules * list(factors))
    assert verdict(both(plain, rule), "more energy").verdict == expected


def test_claims_without_measurements_are_not_tested():
    for frame, why in ((runs(train_energy_joules=None), "no energy was measured"),):
        frame = both(frame, frame.assign(checkpointing="threshold"))
        found = verdict(frame, "more energy")
        assert (found.verdict, found.n, found.why) == (UNTESTED, 0, why)
    assert verdict(runs(), "more energy").why == "no finished run of threshold"
    other = both(runs(), runs(checkpointing="threshold", seed=[7, 8, 9]))
    assert "share seed" in verdict(other, "more energy").why


def test_two_pairs_are_too_few():
    frame = both(runs(), runs(checkpointing="threshold", train_peak_bytes=500 * 2**20))
    found = verdict(frame[frame.seed < 2], "43 to 79 %")
    assert found.verdict == UNTESTED and found.n == 2 and "fewer than 3 pairs" in found.why


@pytest.mark.parametrize(
    ("cost", "expected"),
    [((1.0, 1.1, 0.9), SUPPORTED), ((5.0, 5.1, 4.9), REFUTED), ((0.5, 2.0, 3.0), UNTESTED)],
)
def test_accuracy_of_bitfit(cost, expected):
    bitfit = runs("bitfit", test_top1_pct=runs().test_top1_pct - list(cost))
    found = verdict(both(runs(), bitfit), "BitFit costs no more")
    assert found.verdict == expected and found.ours.startswith(f"−{np.mean(cost):.2f} points")


def test_one_setting_outside_is_enough_against_a_claim():
    good, bad = 500 * 2**20, 900 * 2**20
    frame = both(
        runs(), runs(checkpointing="threshold", train_peak_bytes=good),
        runs("lora"), runs("lora", "threshold", train_peak_bytes=bad),
    )  # fmt: skip
    found = verdict(frame, "43 to 79 %")
    assert found.verdict == REFUTED and found.why.startswith("of 2 settings 1 meet")
    assert found.ours == "2 settings, from −50.0 % [=] (full) to −10.0 % [=] (lora)"


def test_intervals_hold_together():
    """Costs of 0.7, 1.0 and 1.3 points: 1 ± 0.75 alone, 1 ± 1.06 as one of two settings."""
    bitfit = runs("bitfit", test_top1_pct=runs().test_top1_pct - [0.7, 1.0, 1.3])
    one = both(runs(), bitfit)
    assert verdict(one, "BitFit costs no more").verdict == SUPPORTED
    found = verdict(both(one, one.assign(backbone="tiny_vit")), "BitFit costs no more")
    assert found.verdict == UNTESTED and "[−2.0" in found.ours


def test_other_data_and_backbones_are_named():
    assert "not the paper's" not in verdict(runs(), "43 to 79 %")["tested on"]
    ours = runs(dataset="digits", backbone="demo_vit")
    assert (
        verdict(ours, "43 to 79 %")["tested on"]
        == "digits, demo_vit (E1); not the paper's data and backbones"
    )


def test_each_data_set_has_its_own_verdict():
    here = both(runs(), runs(checkpointing="threshold", train_peak_bytes=500 * 2**20))
    there = here.assign(dataset="digits", train_peak_bytes=1000 * 2**20)
    found = findings(both(here, there))
    found = found[found.claim.str.contains("43 to 79 %")]
    places = found["tested on"].str.split(",").str[0]
    assert dict(zip(places, found.verdict)) == {"cifar100": SUPPORTED, "digits": REFUTED}


def baseline(name, protocol, accuracy):
    return runs(protocol, backbone=name, phase="inference", test_top1_pct=accuracy, seed=0)[:1]


@pytest.mark.parametrize(("accuracy", "expected"), [(95.0, SUPPORTED), (80.0, REFUTED), (89.5, UNTESTED)])
def test_frozen_features_against_the_best_fine_tuned(accuracy, expected):
    worse = runs("lora", test_top1_pct=50.0)
    frame = both(runs(), worse, baseline("dinov2_b", "logreg", accuracy), baseline("demo_vit", "knn", 99.0))
    found = verdict(frame, "DINOv2")
    assert found.verdict == expected and "dinov2_b" in found.ours and "vit_small, full" in found.ours


def test_another_frozen_model_is_not_dinov2():
    found = verdict(both(runs(), baseline("demo_vit", "knn", 99.0)), "DINOv2")
    assert found.verdict == UNTESTED and "no finished run of a dinov2 baseline" in found.why


@pytest.mark.parametrize(("accuracy", "expected"), [(60.0, SUPPORTED), (95.0, REFUTED)])
def test_generative_models(accuracy, expected):
    frame = both(runs(), baseline("smolvlm", "likelihood", accuracy))
    assert verdict(frame, "vision-language").verdict == expected
    assert "baseline of this kind" in verdict(runs(), "vision-language").why


def test_models_that_saw_other_data_are_not_compared():
    frame = both(runs(), baseline("dinov2_b", "logreg", 95.0).assign(test_sha256="other"))
    found = verdict(frame, "DINOv2")
    assert found.verdict == UNTESTED and "different data" in found.why


@pytest.mark.parametrize(("peak", "expected"), [(1200, SUPPORTED), (800, REFUTED)])
def test_peak_memory_and_trained_parameters(peak, expected):
    frame = both(runs(), runs("dora", train_peak_bytes=peak * 2**20, params_trainable=100))
    found = verdict(frame, "does not follow")
    assert found.verdict == expected and "100 parameters instead of 1,000" in found.ours


@pytest.mark.parametrize(("shift", "expected"), [(0.5, SUPPORTED), (-9.0, REFUTED)])
def test_the_accuracy_of_table_v(shift, expected):
    frame = runs(test_top1_pct=runs().test_top1_pct + shift)
    assert verdict(frame, "reaches 89.7 %").verdict == expected
    assert verdict(frame.assign(backbone="tiny_vit"), "reaches 89.7 %").verdict == UNTESTED


def test_the_published_log_is_a_fifth_too_high():
    table = double_count()
    published = table.loc["as its meter adds: both"]
    assert published.joules == pytest.approx(81_379.68) and published.seconds == pytest.approx(523.29)
    assert published["joules too high %"] == pytest.approx(21.5, abs=0.05)
    assert published["seconds too high %"] == pytest.approx(22.2, abs=0.05)
