"""Ranking of runs and the choice inside two limits; the frames are small enough to check by hand."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.analysis.recommend import ranking, recommend, write_ranking
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.training.record import FILE_NAME, GROUPS, SCHEMA_VERSION

MIB = 2**20


def row(method: str, accuracy: float, half: float, mib: float, mflop: float, **more) -> dict:
    known = {"dataset": "digits-c:mixed:5", "variant": "", "n": 3}
    figures = {"score_pct": accuracy, "score_pct_half_width": half, "peak_bytes": mib * MIB}
    return known | {"method": method} | figures | {"flops_per_step": mflop * 1e6} | more


FRAME = pd.DataFrame(
    [
        row("full", 97.0, 0.5, 22, 300),
        row("galore", 94.0, 1.0, 14, 330),
        row("lora", 93.1, 0.8, 12, 200, variant="rank 8"),
        row("norm", 90.0, 0.4, 9, 190),
        row("linear", 80.0, 0.2, 4, 60),
    ]
)


def test_the_smallest_of_equally_good_methods_wins():
    found = recommend(FRAME, 16 * MIB, 400e6)
    assert (found.method, found.variant) == ("lora", "rank 8")
    said = "lora (rank 8) is the smallest of 2 as good as the best within 16.0 MiB and 400.0 MFLOP a step."
    assert found.why == said
    fits = dict(zip(found.table.method, found.table.fits))
    assert fits["full"] == "no: memory" and fits["galore"] == "yes, as good as the best"
    assert fits["norm"] == "yes, worse"


def test_both_limits_count():
    assert recommend(FRAME, 100 * MIB, 310e6).method == "full"
    assert recommend(FRAME, 100 * MIB, 195e6).method == "norm"
    assert recommend(FRAME, 4 * MIB, 60e6).method == "linear"  # limits may be met exactly
    fits = recommend(FRAME, 13 * MIB, 100e6).table.set_index("method").fits
    assert fits["galore"] == "no: memory and FLOPs" and fits["norm"] == "no: FLOPs"


def test_one_seed_is_equal_to_nothing_else_and_says_so():
    frame = pd.DataFrame([row("full", 94.0, np.nan, 22, 300, n=1), row("lora", 93.9, np.nan, 12, 200, n=1)])
    found = recommend(frame, 100 * MIB, 1e9)
    assert found.method == "full" and "one seed" in found.why


def test_unmeasured_methods_are_never_recommended():
    frame = pd.concat([FRAME, pd.DataFrame([row("dora", 99.0, 0.1, np.nan, 1)])], ignore_index=True)
    found = recommend(frame, 100 * MIB, 1e9)
    assert found.method == "full"
    shown = found.table.set_index("method").loc["dora"]
    assert shown.fits == "not measured"
    nothing = recommend(frame[frame.method == "dora"], 100 * MIB, 1e9)
    assert nothing.method is None and nothing.why.startswith("nothing fits into")


@pytest.mark.parametrize(
    ("frame", "memory_bytes", "flops", "said"),
    [
        (FRAME[:0], MIB, 1e9, "choose among the rows"),
        (FRAME, 0, 1e9, "memory_bytes must be a positive number, got 0"),
        (FRAME, MIB, math.nan, "flops_per_step must be a positive number"),
        (pd.concat([FRAME, FRAME.assign(dataset="other")]), MIB, 1e9, "on one data set"),
    ],
)
def test_bad_input_is_one_message(frame, memory_bytes, flops, said):
    with pytest.raises(InputError, match=said):
        recommend(frame, memory_bytes, flops)


FIGURES = st.tuples(
    st.floats(0, 100), st.one_of(st.floats(0, 20), st.none()), st.floats(1, 50), st.floats(1, 50)
)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(FIGURES, min_size=1, max_size=8, unique_by=lambda figures: figures[2]),
    mib=st.floats(1, 60), mflop=st.floats(1, 60), order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_choice_is_the_smallest_that_is_level_with_the_best_of_what_fits(rows, mib, mflop, order):
    rows = [row("lora", *figures, variant=str(number)) for number, figures in enumerate(rows)]
    found = recommend(pd.DataFrame(rows), mib * MIB, mflop * 1e6)
    fitting = [r for r in rows if r["peak_bytes"] <= mib * MIB and r["flops_per_step"] <= mflop * 1e6]
    shuffled = recommend(pd.DataFrame(order.sample(rows, len(rows))), mib * MIB, mflop * 1e6)
    assert (shuffled.method, shuffled.variant) == (found.method, found.variant)
    if not fitting:
        assert found.method is None
        return
    best = max(fitting, key=lambda r: (r["score_pct"], -r["peak_bytes"]))
    level = [
        r for r in fitting
        if best["score_pct"] - r["score_pct"]
        <= (best["score_pct_half_width"] or 0) + (r["score_pct_half_width"] or 0)
    ]  # fmt: skip
    assert found.variant == min(level, key=lambda r: r["peak_bytes"])["variant"]


def records() -> pd.DataFrame:
    rows = []
    for method, rank, accuracies in (
        ("lora", 4, [80, 82, 84]),
        ("lora", 8, [90, 91]),
        ("full", 8, [95, None]),
    ):
        for seed, accuracy in enumerate(accuracies):
            rows.append(
                {
                    "status": "ok" if accuracy else "oom", "phase": "training", "dataset": "digits",
                    "backbone": "demo_vit", "method": method, "checkpointing": "none",
                    "budget_bytes": 20971520,
                    "rank": rank, "batch_size": 64, "seed": seed, "n_classes": 10,
                    "test_top1_pct": accuracy, "train_peak_bytes": 10 * MIB, "train_seconds": 5.0 + seed,
                    "train_energy_joules": None, "energy_source": "none", "train_sha256": "a",
                    "test_sha256": "b", "env_hash": "e", "memory_source": "tracked_tensors",
                    "forward_flops_per_image": 1e6, "backward_flops_per_image": 2e6,
                    "recompute_flops_per_image": 0,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_ranking_averages_seeds_and_tells_variants_apart():
    frame = ranking(records())
    assert list(frame.method) == ["full", "lora", "lora"]
    assert list(frame.variant) == ["", "rank 8", "rank 4"]
    assert list(frame.n) == [1, 2, 3] and frame.score_pct[2] == 82
    assert frame.score_pct_half_width[2] == pytest.approx(
        4.303 * 2 / math.sqrt(3), rel=1e-3
    )  # Student's t, 2 degrees
    assert math.isnan(frame.score_pct_half_width[0]) and frame.adapt_seconds[2] == 6
    whole = 64 * 3e6 + frame.optimizer_flops_per_step
    assert frame.flops_per_step.tolist() == whole.tolist()
    # AdamW over all weights and over adapters and head alone.
    assert frame.optimizer_flops_per_step[0] > 5 * frame.optimizer_flops_per_step[1] > 0


def test_rows_without_a_traced_step_have_no_flops():
    assert ranking(records().assign(backward_flops_per_image=None)).flops_per_step.isna().all()
    assert len(ranking(records()[:0])) == 0 and len(ranking(records().assign(phase="inference"))) == 0


def test_the_ranking_is_written_by_environment_for_people_and_programs(tmp_path):
    for number, run in enumerate(records().to_dict("records")):
        known = Experiment.flat_types()
        config = Experiment.flat(**{name: run.pop(name) for name in known if name in run}).config
        run |= {"schema_version": SCHEMA_VERSION, "experiment_id": str(number)}
        run |= {"env_hash": "new" if config["options"].get("rank") == 4 else "old"}
        if math.isnan(run["test_top1_pct"]):
            run["test_top1_pct"] = None
        (tmp_path / str(number)).mkdir()
        whole = {group: {} for group in GROUPS} | {"run": run, "config": config}
        (tmp_path / str(number) / FILE_NAME).write_text(json.dumps(whole))
    table = write_ranking(tmp_path, tmp_path / "out" / "ranking")
    assert list(table.environment) == ["E1", "E1", "E2"]  # E1 has most runs
    written = pd.read_csv(tmp_path / "out" / "ranking.csv")
    assert sorted(written.score_pct) == [82, 90.5, 95] and set(written.peak_bytes) == {10 * MIB}
    assert "| lora |  | 3 |" in (tmp_path / "out" / "ranking.md").read_text()
    assert r"\toprule" in (tmp_path / "out" / "ranking.tex").read_text()


def test_writing_without_runs_says_how_to_get_some(tmp_path):
    with pytest.raises(InputError, match="sweep --preset edge"):
        write_ranking(tmp_path, tmp_path / "ranking")
