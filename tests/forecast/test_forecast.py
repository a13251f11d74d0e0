"""Forecasts: right about what training then takes, kept on disk, and of use before a sweep."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch import dry_run as dry_run_module
from toolkit.batch.dry_run import dry_run, summary
from toolkit.batch.sweep import check_runnable
from toolkit.budget import plan
from toolkit.datasets import load_dataset
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast import forecasts as module
from toolkit.forecast.forecasts import Forecast, forecast, forecasts, what_fits
from toolkit.forecast.steps import Step, step_of
from toolkit.measure.environment import device_name
from toolkit.plots import smallest_budgets
from toolkit.training.loop import held_bytes
from toolkit.training.record import SCHEMA_VERSION, RunRecord, run_folder

STRATEGIES = ("none", "static", "threshold", "planned")
# Frozen but for the head: few operators need a gradient, so it is profiled in a moment.
EXPERIMENT = Experiment(method="linear", batch_size=4, lr=5e-5, device="cpu", budget="1 GB")
SMALL = replace(EXPERIMENT, backbone="small:vit_small", pretrained=False)
TIGHT = "2100 KiB"  # holds the weights, but no step


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder that many tests share, so that few have to profile."""
    return tmp_path_factory.mktemp("forecasts")


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The method of every step that is built from now on."""
    steps = []

    def counted(experiment, num_classes):
        steps.append(experiment.method)
        return step_of(experiment, num_classes)

    monkeypatch.setattr(module, "step_of", counted)
    return steps


def test_agrees_with_plan(kept):
    e = replace(SMALL, method="bitfit", batch_size=2, budget="960000")
    step = step_of(e, 10)
    asked = [replace(e, checkpointing=strategy) for strategy in ("static", "planned")]
    for found, strategy in zip(forecasts(asked, {e.dataset: 10}, kept), ("static", "planned")):
        expected = plan(
            step.model, e.budget, step.batch, strategy=strategy, micro_batches=True, loss=step.loss,
            held_bytes=held_bytes(step.model, step.hooks, plans=strategy == "planned"),
        )  # fmt: skip
        assert (found.peak_bytes, found.recompute_pct) == (expected.peak_bytes, expected.recompute_pct)
        assert (found.fits, found.micro_batch_size) == (expected.fits, expected.micro_batch_size)
        assert found.step_seconds > 0 and found.recompute_pct > 0


@pytest.mark.parametrize(
    "options, margin",
    [
        (
            {"checkpointing": "threshold", "options": {"tau": 0.4}},
            2e-3,
        ),  # the first step, without state, takes the most
        # Neither has that step the scores that AdaLoRA keeps.
        (
            {
                "backbone": "demo_vit",
                "method": "adalora",
                "checkpointing": "threshold",
                "options": {"tau": 0.55},
                "budget": "11.25 MiB",
            },
            2e-3,
        ),
        ({"method": "galore", "options": {"rank": 4, "tau": 0.4}, "checkpointing": "threshold"}, 2e-3),
        # Gradients of the slices before are counted as if those of this one came on top: a little high.
        ({"checkpointing": "none", "micro_batch_size": 8}, 0.1),
    ],
)
def test_no_less_than_training_then_takes(few_digits, tmp_path, options, margin):
    # Full fine-tuning, so that state and gradients are large.
    usual = {"method": "full", "batch_size": 32, "budget": "5MB", "epochs": 1}
    e = replace(SMALL, **usual | options)
    toolkit.seed_everything(0)
    model = toolkit.build_backbone(e.backbone, 10, pretrained=False)
    model = toolkit.adapt(model, e.method, **e.method_options)
    measured = toolkit.fit(model, few_digits, e).peak_bytes
    assert 0.999 * measured < forecast(e, 10, tmp_path).peak_bytes < (1 + margin) * measured


def test_only_planned_is_refused(kept):
    peak = forecast(replace(EXPERIMENT, checkpointing="static"), 10, kept).peak_bytes
    rule = forecast(replace(EXPERIMENT, checkpointing="static", budget=str(peak - 1)), 10, kept)
    assert not rule.fits and not rule.refused and "above the budget" in rule.reason
    tight = replace(EXPERIMENT, budget=TIGHT, micro_batch_size=4)
    refused = forecast(tight, 10, kept)
    assert refused.refused and not refused.fits and "cannot be held" in refused.reason
    assert "\n" not in refused.reason
    assert forecast(replace(tight, budget=str(refused.smallest_bytes)), 10, kept).fits
    assert forecast(replace(tight, budget=str(refused.smallest_bytes - 1000)), 10, kept).refused


def test_models_without_blocks_run_without_checkpointing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 10))
    batch = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(module, "step_of", lambda *_: Step(model, model, batch, F.cross_entropy, "adamw"))
    plain = forecast(replace(EXPERIMENT, checkpointing="none"), 10, tmp_path)
    assert plain.fits and plain.recompute_pct == 0
    static = forecast(replace(EXPERIMENT, checkpointing="static"), 10, tmp_path)
    assert static.refused and "use checkpointing 'none'" in static.reason


def test_smallest_budget_may_be_that_of_the_whole_batch(tmp_path):
    # Everything trains: gradients that stay from one micro-batch to the next outweigh one more image.
    e = replace(SMALL, method="full", batch_size=2, budget="1 MB")
    asked = [replace(e, micro_batch_size=size) for size in (0, 2, 1)]
    tight, whole, single = forecasts(asked, {e.dataset: 10}, tmp_path)
    assert tight.smallest_bytes == whole.smallest_bytes < single.smallest_bytes


def test_what_cannot_be_built_is_told_and_not_kept(tmp_path):
    wrong = forecast(replace(EXPERIMENT, backbone="vit_smal"), 10, tmp_path)
    assert wrong.refused and "Did you mean 'vit_small'" in wrong.reason
    small = forecast(replace(EXPERIMENT, budget="1 MiB", checkpointing="none"), 10, tmp_path)
    assert small.refused and "smaller than the weights" in small.reason
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="num_classes"):
        forecast(EXPERIMENT, 0, tmp_path)


def test_one_step_serves_strategies_budgets_and_seeds(tmp_path, built):
    asked = [
        replace(EXPERIMENT, precision=precision, checkpointing=strategy, budget=budget, seed=seed,
                lr=0.1 + seed, epochs=seed + 1)
        for seed in (0, 1)
        for precision in ("fp32", "bf16")
        for strategy in STRATEGIES
        for budget in ("2500 KiB", "1 GB")
    ]  # fmt: skip
    found = forecasts(asked, {"digits": 10}, tmp_path)
    assert len(built) == 2
    assert len(list(tmp_path.iterdir())) == len(asked) / 2  # seeds, rates and epochs share an answer
    assert [f.budget_bytes for f in found] == [e.budget_bytes for e in asked]
    assert forecasts(asked, lambda name: 10, tmp_path) == found and len(built) == 2


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 2}, {"precision": "bf16"}, {"backbone": "small:vit_small"}, {"checkpointing": "none"}],
)
def test_what_matters_is_asked_anew(kept, built, change):
    forecast(EXPERIMENT, 10, kept)
    built.clear()
    forecast(replace(EXPERIMENT, **change), 11, kept)
    assert len(built) == 1
    forecast(replace(EXPERIMENT, **change, seed=3), 11, kept)
    assert len(built) == 1


def test_other_code_is_asked_anew(kept, built, monkeypatch):
    forecast(EXPERIMENT, 10, kept)
    built.clear()
    forecast(EXPERIMENT, 10, kept)
    assert not built
    monkeypatch.setattr(module, "code_sha256", lambda: "changed")
    forecast(EXPERIMENT, 10, kept)
    assert built


def test_damaged_answers_are_made_anew(tmp_path, built):
    e = replace(EXPERIMENT, batch_size=1)
    first = forecast(e, 10, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="made again"):
        assert forecast(e, 10, tmp_path) == first
    assert len(built) == 2 and forecast(e, 10, tmp_path) == first and len(built) == 2


def test_a_folder_that_cannot_be_written_ends_no_work(tmp_path, kept):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    asked = [replace(EXPERIMENT, checkpointing=strategy) for strategy in ("none", "static")]
    with pytest.warns(UserWarning) as warned:
        found = forecasts(asked, {"digits": 10}, blocked / "forecasts")
    assert found == forecasts(asked, {"digits": 10}, kept)
    said = [str(warning.message) for warning in warned]
    assert len(set(said)) == 1 and f"not kept in {blocked / 'forecasts'}: " in said[0]  # shown once


@pytest.mark.parametrize("error", [KeyError("layer"), TypeError("forward() takes 1"), AttributeError("x")])
def test_what_foreign_models_raise_is_told_and_errors_of_ours_are_not_hidden(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    e = replace(SMALL, checkpointing="none")
    with monkeypatch.context() as patched:
        patched.setattr(module, "step_of", fail)
        wrong = forecast(e, 10, tmp_path)
        assert wrong.refused and type(error).__name__ in wrong.reason and error.args[0] in wrong.reason
    monkeypatch.setattr(module, "check_fits_weights", fail)
    with pytest.raises(type(error)):
        forecast(e, 10, tmp_path)


def _finish(e, runs: Path, seconds: float | None, train_seconds: float = 1.0, steps: int = 1, **changes):
    """A record of `e` as a finished run leaves it, with the executed notebook beside it."""
    train_sha256 = changes.pop("train_sha256", None) or load_dataset(e.dataset).hashes["train"]
    run = {"schema_version": SCHEMA_VERSION, "status": "ok", "phase": e.phase} | changes
    record = RunRecord(
        run=run, config=e.config, data={"n_classes": 10, "n_train": 1077, "train_sha256": train_sha256},
        env={"device_name": device_name("cpu")},
        time={"train_seconds": train_seconds, "steps": steps, "resumes": changes.get("resumes", 0)},
    )  # fmt: skip
    record.save(run_folder(e, runs))
    notebook = {"metadata": {"papermill": {"duration": seconds}}, "cells": []}
    (run_folder(e, runs) / f"{e.notebook}.ipynb").write_text(json.dumps(notebook))


def test_dry_run_tells_time_by_seeds_then_by_scale(tmp_path, kept):
    runs = tmp_path / "runs"
    none, small = replace(EXPERIMENT, checkpointing="none"), replace(EXPERIMENT, batch_size=2)
    baseline = BaselineExperiment(device="cpu")
    asked = [EXPERIMENT, replace(EXPERIMENT, seed=1), none, small, baseline]
    before = dry_run(asked, runs, kept)
    assert list(before.columns[:3]) == ["name", "what", "finished"] and not runs.exists()
    assert list(before.estimate_from[:4]) == ["planner"] * 4
    assert not before.finished.any() and list(before.name) == [e.name for e in asked]
    assert before.seconds[4:].isna().all() and "no such run is finished" in before.estimate_from[4]
    assert before.seconds[2] == pytest.approx(5 * -(-1077 // 4) * forecast(none, 10, kept).step_seconds)
    assert "at least" in summary(before) and "left with one worker" not in summary(before)

    planned = forecast(EXPERIMENT, 10, kept).step_seconds
    for seed, seconds in ((7, 20.0), (8, 30.0), (9, 40.0)):
        _finish(replace(EXPERIMENT, seed=seed), runs, seconds, train_seconds=100 * planned, steps=5)
    _finish(EXPERIMENT, runs, 30.0, train_seconds=100 * planned, steps=5)
    _finish(replace(baseline, image_size=64), runs, 99.0)  # another baseline run
    after = dry_run(asked, runs, kept)
    assert list(after.finished) == [True, False, False, False, False]
    assert list(after.estimate_from[:4]) == ["finished runs"] * 2 + ["scaled planner"] * 2
    assert after.seconds[1] == 30
    scale = 30 / before.seconds[0]  # of the finished runs that the sweep names
    assert after.seconds[3] == pytest.approx(scale * before.seconds[3])
    _finish(baseline, runs, 12.0)
    assert dry_run(asked, runs, kept).seconds[4] == 12
    words = summary(after)
    assert words.startswith("5 runs, 1 finished; ") and "1 from finished runs" in words
    assert "2 from scaled planner" in words and "1 without an estimate" in words


@pytest.mark.parametrize(
    "changes",
    [{"status": "oom"}, {"status": "failed"}, {"schema_version": 1}, {"resumes": 1}, {"by hand": 1}],
)
def test_runs_that_tell_no_time(tmp_path, kept, changes):
    _finish(replace(EXPERIMENT, seed=5), tmp_path, None if "by hand" in changes else 50.0, **changes)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "record.json").write_text("{")
    assert list(dry_run([EXPERIMENT], tmp_path, kept).estimate_from) == ["planner"]


def test_dry_run_names_what_would_be_refused(tmp_path, kept, monkeypatch):
    def no_download(name):
        raise AssertionError(f"{name} is loaded")

    asked = [
        replace(EXPERIMENT, dataset="folder:/nowhere"),
        replace(EXPERIMENT, budget=TIGHT, micro_batch_size=4),
        replace(EXPERIMENT, checkpointing="none"),
        BaselineExperiment(device="cpu", budget="100 KiB"),
    ]
    frame = dry_run(asked, tmp_path, kept)
    stops = "stops the sweep"
    assert list(frame.within_budget) == [stops, "refused", "yes", stops]
    assert frame.seconds.notna().tolist() == [False, False, True, False]
    assert frame.predicted_peak_bytes.isna().tolist() == [True, True, False, True]
    words = summary(frame)
    assert (
        "only without 2 of them" in words
        and "1 would be refused" in words
        and "there is no such folder" in words
    )
    assert all(e.name in words for e in (asked[0], asked[1], asked[3])) and asked[2].name not in words
    monkeypatch.setattr(dry_run_module, "load_dataset", no_download)
    e = replace(EXPERIMENT, dataset="dtd", checkpointing="none", epochs=1)
    row = dry_run([e], tmp_path, kept).iloc[0]
    assert row.seconds == pytest.approx(470 * forecast(e, 47, kept).step_seconds)
    assert dry_run([], tmp_path, kept).empty and summary(dry_run([], tmp_path, kept)) == "0 runs, 0 finished"


def test_a_finished_run_stops_a_sweep_too(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none", budget="1 MiB")  # less than the weights
    _finish(e, tmp_path, 10.0)
    frame = dry_run([e], tmp_path, kept)
    assert frame.finished[0] and "only without 1 of them" in summary(frame)
    with pytest.raises(InputError, match="smaller than the weights"):
        check_runnable([e], tmp_path)


def test_runs_on_other_data_are_to_be_done_again(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none")
    _finish(e, tmp_path, 10.0, train_sha256="0")
    assert not dry_run([e], tmp_path, kept).finished[0]
    _finish(e, tmp_path, 10.0)
    assert dry_run([e], tmp_path, kept).finished[0]


def test_batches_are_no_larger_than_the_data(tmp_path, monkeypatch, few_digits, kept):
    monkeypatch.setattr(dry_run_module, "load_dataset", lambda name: few_digits)
    e = replace(EXPERIMENT, checkpointing="none", batch_size=128, micro_batch_size=100)
    found = forecast(replace(e, batch_size=96, micro_batch_size=96), 10, kept)
    row = dry_run([e], tmp_path, kept).iloc[0]
    assert row.predicted_peak_bytes == found.peak_bytes
    assert row.seconds == pytest.approx(5 * found.step_seconds)


def test_summary_counts_what_breaks_its_budget(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none", budget=TIGHT)
    frame = dry_run([e], tmp_path, kept)
    assert list(frame.within_budget) == ["no"] and "above the budget" in frame.reason[0]
    assert "1 are predicted to exceed their budget" in summary(frame)


def test_what_fits_and_its_picture(kept, built):
    asked = {"backbones": ["demo_vit", "a$b$c"], "methods": ["linear"], "folder": kept}
    options = {"batch_size": 4, "precision": "fp32", "num_classes": 10}
    limits = {"0.001 GB": 1e6, "0.003 GB": 3e6, "1 GB": 1e9}
    frame = what_fits(["3MB", 10**6, "1GB", "1000MB"], **asked, **options)
    built.clear()
    assert what_fits(["3MB", 10**6, "1GB"], **asked, **options).equals(frame)
    assert len(built) == 1  # what cannot be built is tried again
    demo = frame[frame.backbone == "demo_vit"].set_index("strategy")
    plain, planned = demo.smallest_bytes["none"], demo.smallest_bytes["planned"]
    assert planned < plain == forecast(replace(EXPERIMENT, checkpointing="none"), 10, kept).peak_bytes
    assert forecast(replace(EXPERIMENT, budget=str(planned)), 10, kept).fits
    assert list(frame.card.cat.categories) == list(limits)
    for row in demo.itertuples():
        assert row.card == next(card for card, limit in limits.items() if row.smallest_bytes <= limit)
    wrong = frame[frame.backbone == "a$b$c"]
    assert wrong.smallest_bytes.isna().all() and wrong.reason.str.contains("unknown backbone").all()
    figure = smallest_budgets(frame)
    figure.canvas.draw()
    left, right = figure.axes
    words = [text.get_text() for text in right.texts]
    assert f"{planned / 1e9:.2g}" in words and words.count("–") == 1
    assert [label.get_text() for label in left.get_yticklabels()] == ["demo_vit", r"a\$b\$c"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [*limits, "more than 1 GB"]
    plt.close(figure)


def test_forecast_says_whether_it_fits():
    assert Forecast(10, peak_bytes=9).fits and not Forecast(10, peak_bytes=9).refused
    assert not Forecast(10, peak_bytes=11, reason="above").fits and Forecast(10, reason="no").refused
