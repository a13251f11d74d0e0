"""Verdicts on the claims about CNNs on the edge, from records made so that the verdict is known."""

import json
from unittest import mock

import numpy as np
import pandas as pd
import pytest

from toolkit.analysis import claims_cnns as claims
from toolkit.analysis.claims import REFUTED, SUPPORTED, UNTESTED
from toolkit.analysis.claims_cnns import CLAIMS, findings, is_about_cnns
from toolkit.forecast.cnn_costs import StepCosts

SEEDS = (0, 1, 2)
FULL = np.array([80.0, 81.0, 82.5])


def runs(method="full", change=0.0, spread=0.1, **columns) -> pd.DataFrame:
    """Three seeds of one method whose accuracy is `change` points from full fine-tuning's, more or less."""
    frame = pd.DataFrame(
        {
            "dataset": "cifar10-c:fog:5", "backbone": "mobilenetv2_100", "method": method,
            "checkpointing": "none", "seed": SEEDS, "budget_bytes": 2**30, "status": "ok",
            "phase": "training", "environment": "E1", "train_sha256": "a", "test_sha256": "b",
            "test_top1_pct": FULL + change + (np.array([-spread, 0, spread]) if method != "full" else 0),
            "rank": 8, "clip_rank": False, "epochs": 5, "batch_size": 64,
        }
    )  # fmt: skip
    return frame.assign(**columns)


def both(*parts):
    return pd.concat(parts, ignore_index=True)


def verdict(frame, text):
    """The one finding on the claim about accuracy that contains `text`."""
    (claim,) = [claim for claim in CLAIMS if text in claim.text]
    with mock.patch.object(claims, "_of_costs", list), mock.patch.object(claims, "CLAIMS", (claim,)):
        (found,) = findings(frame).to_dict("records")
    return pd.Series(found)


def costs_judged(figures) -> dict:
    """Findings on costs by the beginning of their claim and their batch, on these `figures`."""

    def step_costs(backbone, method, *, batch_size, **options):
        return StepCosts(**NO_COSTS | figures(backbone, method, batch_size))

    with mock.patch.object(claims, "step_costs", step_costs):
        found = [pd.Series(one) for one in claims._count_costs()]
    return {(f.claim.split()[0], f["tested on"].split(",")[0]): f for f in found}


NO_COSTS = dict(
    forward_flops=100, backward_flops=200, optimizer_flops=0, svd_flops=0, published_flops=300,
    corrected_flops=300, peak_bytes=100, category_peaks={"parameters": 120}, trainable=1, total=2,
)  # fmt: skip


def test_every_claim_has_a_finding_without_runs():
    with mock.patch.object(claims, "_of_costs", list):
        found = findings(pd.DataFrame({"status": []}))
    assert list(found.claim) == [claim.text for claim in CLAIMS]
    assert set(found.verdict) == {UNTESTED} and set(found.n) == {0}
    assert set(found.why) == {"no run on shifted data (*-c:) ended ok"}


def test_runs_on_clean_data_do_not_count():
    frame = both(runs(), runs("norm", -40)).assign(dataset="digits")
    assert verdict(frame, "up to 40 points").verdict == UNTESTED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"galore": -0.2, "lora": -5, "dora": -6, "norm": 4}, SUPPORTED),
        ({"galore": -5, "lora": -0.2, "dora": -6, "norm": -7}, REFUTED),
        ({"galore": -0.2, "lora": 0.2, "dora": -6, "norm": -7}, UNTESTED),
    ],
)
def test_the_method_nearest_to_full(changes, expected):
    frame = both(runs(), *(runs(method, change) for method, change in changes.items()))
    found = verdict(frame, "closest to full")
    assert found.verdict == expected and found.n == 3 and "galore" in found.ours
    if expected == REFUTED:
        assert found.why.startswith("lora clearly")


def test_all_four_methods_are_needed():
    found = verdict(both(runs(), runs("galore"), runs("lora"), runs("dora")), "closest to full")
    assert (found.verdict, found.why) == (UNTESTED, "no finished run of norm")


def test_settings_that_full_does_not_have_are_paired():
    frame = both(runs(), *(runs("norm", -38, clip_rank=True, rank=rank) for rank in (2, 4)))
    found = verdict(frame, "up to 40 points")
    assert found.verdict == SUPPORTED and found.ours.startswith("2 settings") and "−38" in found.ours


@pytest.mark.parametrize(("change", "expected"), [(-36, SUPPORTED), (-60, SUPPORTED), (-5, UNTESTED)])
def test_a_smaller_loss_does_not_refute_up_to(change, expected):
    found = verdict(both(runs(), runs("norm", change)), "up to 40 points")
    assert found.verdict == expected and "not the paper's" not in found["tested on"]


@pytest.mark.parametrize(
    ("backbone", "change", "expected", "n"),
    [
        ("mobilenetv3_small_100", -18, SUPPORTED, 3),
        ("demo_cnn_digits", -3, UNTESTED, 3),
        ("resnet18", -18, UNTESTED, 0),
    ],
)
def test_the_best_and_the_worst_setting_are_compared(backbone, change, expected, n):
    frame = both(runs("lora"), runs("lora", change, rank=64)).assign(backbone=backbone)
    found = verdict(frame, "swing")
    assert (found.verdict, found.n) == (expected, n)
    if n:
        assert "rank 8 against 64" in found.ours


@pytest.mark.parametrize(
    ("changes", "expected"),
    [((0, 4, 1), SUPPORTED), ((0, 4, 8), REFUTED), ((0, 4, 4.01), UNTESTED), ((0,), UNTESTED)],
)
def test_each_rank_is_compared_with_the_next(changes, expected):
    frame = both(*(runs("lora", change, 0.1 * i, rank=2**i) for i, change in enumerate(changes)))
    assert verdict(frame, "higher rank").verdict == expected


@pytest.mark.parametrize(
    ("lora", "expected"),
    [((10, 20, 30, 70), SUPPORTED), ((10, 70, 70, 70), REFUTED), ((5, 10, 20, 30), REFUTED)],
)
def test_epochs_to_a_common_accuracy_are_compared(tmp_path, lora, expected):
    """GaLore reaches the 70 % of both in the second epoch (30 % of the slowest in the first)."""
    curves = {"galore": (40, 70, 71, 72), "lora": lora}
    for method, curve in curves.items():
        (tmp_path / method).mkdir()
        history = [{"val_top1_pct": value} for value in curve]
        (tmp_path / method / "record.json").write_text(json.dumps({"curves": {"history": history}}))
    frame = both(*(runs(method, folder=str(tmp_path / method)) for method in curves))
    found = verdict(frame, "iterations")
    assert found.verdict == expected and found.n == 3 and "more epochs than GaLore" in found.ours
    assert verdict(frame[frame.seed < 2], "iterations").verdict == UNTESTED


def test_memory_of_lora_is_judged_by_the_true_peak_at_each_batch():
    def figures(backbone, method, batch_size):
        saved = {("resnet18", 1): 70, ("mobilenetv2_100", 1): 20}.get((backbone, batch_size), 5)
        return {"peak_bytes": 100 - saved * (method == "lora"), "category_peaks": {"all": 120}}

    found = costs_judged(figures)
    assert found["LoRA", "batch 1"].verdict == SUPPORTED and found["LoRA", "batch 16"].verdict == REFUTED
    assert "mobilenetv2_100 −20 %, +0 % by sum of maxima" in found["LoRA", "batch 1"].ours


@pytest.mark.parametrize(("true", "expected"), [(15, SUPPORTED), (200, REFUTED)])
def test_flops_are_judged_by_our_counter(true, expected):
    def figures(backbone, method, batch_size):
        return {
            "forward_flops": 0,
            "backward_flops": true if method == "lora" else 300,
            "published_flops": 15,
        }

    (finding,) = [f for (claim, _), f in costs_judged(figures).items() if claim.startswith("Parameter")]
    assert finding.verdict == expected


@pytest.mark.parametrize(
    ("svd", "batch"),
    [(2000, 1), (2000, 16), (12000, 1)],
)
def test_galore_has_to_meet_the_range_at_both_gaps(svd, batch):
    """300 in the passes, 30 for projections: at gaps of 50 and 200 that is 10 % and more."""

    def figures(backbone, method, batch_size):
        if method == "full":
            return {}
        return {"svd_flops": svd, "optimizer_flops": 30 + svd // 50}

    found = costs_judged(figures)["GaLore", f"batch {batch}"]
    more = 100 * (30 + svd / 50) / (300 * batch)
    assert f"+{more:.0f} % at gap 50" in found.ours
    assert found.verdict == (SUPPORTED if 10 <= more <= 30 else REFUTED)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"dataset": "digits", "backbone": "demo_vit"}, False),
        ({"dataset": "digits-c:mixed:3", "backbone": "demo_vit"}, True),
        ({"dataset": "digits", "backbone": "demo_cnn"}, True),
        ({"dataset": "digits", "backbone": "mobilenetv3_small_100"}, True),
    ],
)
def test_which_records_are_about_cnns(columns, expected):
    assert is_about_cnns(runs(**columns)) is expected
    assert is_about_cnns(runs()[:0]) is False
