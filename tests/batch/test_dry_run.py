"""Dry runs of sweeps: predicted time and memory, refusals, and what is finished already."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.__main__ import main
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch.dry_run import CPU_RATIO, START_SECONDS, dry_run, summary
from toolkit.batch.sweep import check_runnable
from toolkit.datasets import load_dataset
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast.forecasts import forecast
from toolkit.measure.environment import device_name
from toolkit.training.record import SCHEMA_VERSION, RunRecord, run_folder

EXPERIMENT = Experiment(method="linear", batch_size=4, lr=5e-5, device="cpu", budget="1 GB")
TIGHT = "2100 KiB"  # holds the weights, but no step
# By its name: `toolkit.batch.dry_run` is also a function.
MODULE = sys.modules["toolkit.batch.dry_run"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder that many tests share, so that few have to profile."""
    return tmp_path_factory.mktemp("forecasts")


def _finish(e, runs: Path, seconds: float | None, train_seconds: float = 1.0, steps: int = 1, **changes):
    """A record of `e` as a finished run leaves it, with the executed notebook beside it."""
    train_sha256 = changes.pop("train_sha256", None) or load_dataset(e.dataset).hashes["train"]
    run = {
        "schema_version": SCHEMA_VERSION,
        "experiment_id": e.id,
        "status": "ok",
        "phase": e.phase,
    } | changes
    record = RunRecord(
        run=run, config=e.config, data={"n_classes": 10, "n_train": 1077, "train_sha256": train_sha256},
        env={"device_name": device_name("cpu")},
        time={"train_seconds": train_seconds, "steps": steps, "resumes": changes.get("resumes", 0)},
    )  # fmt: skip
    record.save(run_folder(e, runs))
    notebook = {"metadata": {"papermill": {"duration": seconds}}, "cells": []}
    (run_folder(e, runs) / f"{e.notebook}.ipynb").write_text(json.dumps(notebook))


def test_time_is_estimated_from_other_seeds_then_by_scale(tmp_path, kept):
    runs = tmp_path / "runs"
    none, small = replace(EXPERIMENT, checkpointing="none"), replace(EXPERIMENT, batch_size=2)
    baseline = BaselineExperiment(device="cpu")
    asked = [EXPERIMENT, replace(EXPERIMENT, seed=1), none, small, baseline]
    before = dry_run(asked, runs, kept)
    assert list(before.columns[:3]) == ["name", "what", "finished"] and not runs.exists()
    assert list(before.estimate_from[:4]) == ["planner"] * 4
    assert not before.finished.any() and list(before.name) == [e.name for e in asked]
    assert before.seconds[4:].isna().all() and "no such run is finished" in before.estimate_from[4]
    steps = 5 * -(-1077 // 4)
    training = [steps * forecast(e, 10, kept).step_seconds for e in (EXPERIMENT, none)]
    assert before.seconds[2] == pytest.approx(START_SECONDS + CPU_RATIO * training[1])
    assert "roughly" in summary(before) and "left with one worker" not in summary(before)

    for seed, seconds in ((7, 20.0), (8, 30.0), (9, 40.0)):
        _finish(replace(EXPERIMENT, seed=seed), runs, seconds, train_seconds=18.0)
    _finish(EXPERIMENT, runs, 30.0, train_seconds=18.0)
    _finish(replace(baseline, image_size=64), runs, 99.0)  # another baseline run
    after = dry_run(asked, runs, kept)
    assert list(after.finished) == [True, False, False, False, False]
    assert list(after.estimate_from[:4]) == ["finished runs"] * 2 + ["scaled planner"] * 2
    assert after.seconds[1] == 30
    ratio = 18 / training[0]  # of the finished runs that the sweep names; the rest, 12 s, is no training
    assert after.seconds[2] == pytest.approx(12 + ratio * training[1])
    _finish(baseline, runs, 12.0)
    assert dry_run(asked, runs, kept).seconds[4] == 12
    words = summary(after)
    assert words.startswith("5 runs, 1 finished; ") and "1 from finished runs" in words
    assert "2 from scaled planner" in words and "1 without an estimate" in words


@pytest.mark.parametrize(
    "changes",
    [{"status": "oom"}, {"status": "failed"}, {"schema_version": 1}, {"resumes": 1}, {"by hand": 1}],
)
def test_runs_that_give_no_estimate_of_time(tmp_path, kept, changes):
    _finish(replace(EXPERIMENT, seed=5), tmp_path, None if "by hand" in changes else 50.0, **changes)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "record.json").write_text("{")
    assert list(dry_run([EXPERIMENT], tmp_path, kept).estimate_from) == ["planner"]


def test_refused_runs_are_named(tmp_path, kept, monkeypatch):
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
    monkeypatch.setattr(MODULE, "load_dataset", no_download)
    e = replace(EXPERIMENT, dataset="dtd", checkpointing="none", epochs=1)
    row = dry_run([e], tmp_path, kept).iloc[0]
    training = 470 * forecast(e, 47, kept).step_seconds
    assert row.seconds == pytest.approx(START_SECONDS + CPU_RATIO * training)
    assert dry_run([], tmp_path, kept).empty and summary(dry_run([], tmp_path, kept)) == "0 runs, 0 finished"


def test_a_finished_run_stops_a_sweep_too(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none", budget="1 MiB")  # less than the weights
    _finish(e, tmp_path, 10.0)
    frame = dry_run([e], tmp_path, kept)
    assert frame.finished[0] and "only without 1 of them" in summary(frame)
    with pytest.raises(InputError, match="smaller than the weights"):
        check_runnable([e], tmp_path)


def test_runs_on_other_data_are_not_finished(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none")
    _finish(e, tmp_path, 10.0, train_sha256="0")
    assert not dry_run([e], tmp_path, kept).finished[0]
    _finish(e, tmp_path, 10.0)
    assert dry_run([e], tmp_path, kept).finished[0]


def test_batches_are_no_larger_than_the_data(tmp_path, monkeypatch, few_digits, kept):
    monkeypatch.setattr(MODULE, "load_dataset", lambda name: few_digits)
    e = replace(EXPERIMENT, checkpointing="none", batch_size=128, micro_batch_size=100)
    found = forecast(replace(e, batch_size=96, micro_batch_size=96), 10, kept)
    row = dry_run([e], tmp_path, kept).iloc[0]
    assert row.predicted_peak_bytes == found.peak_bytes
    assert row.seconds == pytest.approx(START_SECONDS + CPU_RATIO * 5 * found.step_seconds)


def test_the_summary_counts_runs_that_exceed_their_budget(tmp_path, kept):
    e = replace(EXPERIMENT, checkpointing="none", budget=TIGHT)
    frame = dry_run([e], tmp_path, kept)
    assert list(frame.within_budget) == ["no"] and "above the budget" in frame.reason[0]
    assert "1 are predicted to exceed their budget" in summary(frame)


def test_runs_that_cannot_be_forecast_show_why(tmp_path, capsys):
    """Alone, too: a column without a number has no type of its own."""
    file = tmp_path / "sweep.yaml"
    file.write_text("runs: [{dataset: digit_scenes, checkpointing: none, method: linear, device: cpu}]")
    assert main(["sweep", str(file), "--dry-run", "--runs", str(tmp_path / "runs")]) == 0
    output = capsys.readouterr().out
    assert "unknown" in output and "detect" in output.split("unknown")[1]
