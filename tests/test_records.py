import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import toolkit
from toolkit.files import write_atomically
from toolkit.records import RunRecord, is_finished, load_curves
from toolkit.statistics import compare, mean_and_interval
from toolkit.training import FitResult


@pytest.fixture
def finished(demo_model, few_digits, tmp_path):
    """Record and folder of one short run."""
    experiment = toolkit.Experiment(epochs=1, batch_size=32, method="lora", device="cpu")
    folder = toolkit.run_folder(experiment, tmp_path)
    model = demo_model("lora")
    result = toolkit.fit(model, few_digits, experiment, folder=folder)
    evaluation = toolkit.evaluate_split(model, few_digits, "test", experiment)
    record = RunRecord.of_run(experiment, few_digits, model, result, evaluation)
    return record, folder, experiment, result, evaluation


def test_record_round_trip(finished, tmp_path):
    record, folder, experiment, result, evaluation = finished
    record.save(folder)
    frame = toolkit.load_records(tmp_path)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row.experiment_id == experiment.id and row.status == "ok"
    assert row.test_top1_pct == evaluation.top1_pct
    assert row.train_peak_bytes == result.peak_bytes
    assert row.train_seconds == result.train_seconds
    assert (
        toolkit.Experiment(
            **{
                name: row[name].item() if hasattr(row[name], "item") else row[name]
                for name in experiment.to_dict()
            }
        )
        == experiment
    )
    assert load_curves(folder)["history"] == result.history


def test_snapshots_go_when_the_record_stands(finished):
    record, folder, *_ = finished
    assert list((folder / "snapshots").iterdir())
    record.save(folder)
    assert not (folder / "snapshots").exists()
    assert is_finished(folder)


def test_provenance_is_complete(finished):
    record = finished[0]
    for name in (
        "device_name",
        "threads",
        "python",
        "version_torch",
        "version_toolkit",
        "git_sha",
        "git_dirty",
    ):
        assert name in record.env
    assert record.data["train_sha256"] != record.data["test_sha256"]
    assert record.energy["energy_joules"] is None and record.missing["energy_joules"]


def test_what_was_not_measured_is_null_with_a_reason(demo_model, few_digits, tmp_path):
    experiment = toolkit.Experiment(device="cpu")
    record = RunRecord.of_run(
        experiment, few_digits, demo_model(), FitResult(status="oom", error="CUDA out of memory"), None
    )
    nulls = {
        name
        for group in ("quality", "time", "energy", "memory")
        for name, value in getattr(record, group).items()
        if value is None
    }
    assert nulls == set(record.missing)
    record.save(tmp_path / "run")
    assert is_finished(tmp_path / "run"), "out of memory is a result"


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_unfinished_runs_are_repeated(demo_model, few_digits, tmp_path, status):
    experiment = toolkit.Experiment(device="cpu")
    (tmp_path / "snapshots").mkdir()
    RunRecord.of_run(experiment, few_digits, demo_model(), FitResult(status=status), None).save(tmp_path)
    assert not is_finished(tmp_path)
    assert (tmp_path / "snapshots").exists(), "the state to go on from is kept"


def test_a_finished_record_is_not_replaced_by_an_unfinished_one(finished, demo_model, few_digits):
    record, folder, experiment, *_ = finished
    record.save(folder)
    before = (folder / "record.json").read_bytes()
    RunRecord.of_run(experiment, few_digits, demo_model(), FitResult(status="interrupted"), None).save(folder)
    RunRecord.of_failure(experiment, "Boom").save(folder)
    assert (folder / "record.json").read_bytes() == before


def test_a_run_on_other_data_is_not_this_one(finished):
    record, folder, *_ = finished
    record.save(folder)
    assert is_finished(folder, record.data["train_sha256"])
    assert not is_finished(folder, "of other data")


def test_nan_cannot_enter_a_record(finished):
    record, folder, *_ = finished
    record.quality["test_loss"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        record.save(folder)
    assert not (folder / "record.json").exists()


def test_no_record_is_left_out_with_a_warning(finished, tmp_path):
    record, folder, *_ = finished
    record.save(folder)
    for name, text in {"empty": "", "list": "[]", "half": '{"run": {'}.items():
        write_atomically(tmp_path / name / "record.json", text.encode())
        assert not is_finished(tmp_path / name)
    with pytest.warns(UserWarning, match="is no record") as caught:
        assert len(toolkit.load_records(tmp_path)) == 1
    assert len(caught) == 3


def test_no_records_is_an_empty_frame(tmp_path):
    assert toolkit.load_records(tmp_path / "nowhere").empty


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.files.os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_interval_against_a_textbook_value():
    """n = 3, sd = 1: t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4841."""
    mean, half, n = mean_and_interval(pd.Series([1.0, 2.0, 3.0]))
    assert (mean, n) == (2.0, 3) and half == pytest.approx(2.4841, abs=1e-4)


def test_one_value_has_no_interval_and_missing_is_never_zero():
    assert mean_and_interval(pd.Series([5.0])) == (5.0, None, 1)
    assert mean_and_interval(pd.Series([], dtype=float)) == (None, None, 0)
    mean, _, n = mean_and_interval(pd.Series([100, None, 100]))
    assert (mean, n) == (100.0, 2)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20), st.floats(-100, 100), st.floats(0.1, 10))
def test_law_interval_moves_with_shift_and_scale(values, shift, scale):
    mean, half, n = mean_and_interval(pd.Series(values))
    moved_mean, moved_half, _ = mean_and_interval(pd.Series(values) * scale + shift)
    assert n == len(values)
    assert moved_mean == pytest.approx(mean * scale + shift, rel=1e-6, abs=1e-3)
    assert moved_half == pytest.approx(half * scale, rel=1e-6, abs=1e-3)


def test_comparison_table():
    frame = pd.DataFrame(
        {
            "method": ["lora"] * 3 + ["full"] * 2,
            "checkpointing": "none",
            "status": ["ok", "ok", "oom", "ok", "nan"],
            "test_top1_pct": [90.0, 92.0, np.nan, 95.0, np.nan],
            "train_peak_bytes": [2**20, 2**20, 2**22, 2**21, 2**21],
            "within_budget": [True, False, False, True, True],
            "train_seconds": [1.0, 3.0, 0.0, 2.0, 2.0],
            "params_trainable": [1234, 1234, 1234, 99, 99],
            "dataset": "digits",
            "backbone": "demo_vit",
        }
    )
    table = compare(frame).set_index("method")
    assert list(table.columns[:3]) == ["dataset", "backbone", "checkpointing"]
    assert table.loc["lora", "test top-1 %"] == "91.00 ± 12.71"
    assert table.loc["lora", "n"] == 2 and table.loc["lora", "not ok"] == "oom"
    assert table.loc["lora", "in budget"] == "no"
    assert table.loc["full", "test top-1 %"] == "95.00", "one seed, no interval"
    assert table.loc["full", "peak MiB"] == "2.00"


@pytest.mark.parametrize("name", ["lr", "budget", "test_sha256", "device_name"])
def test_only_runs_that_differ_in_nothing_but_the_seed_are_averaged(name):
    frame = pd.DataFrame(
        {
            "dataset": "digits", "backbone": "demo_vit", "method": "lora", "checkpointing": "none",
            "seed": [0, 1, 0, 1], name: ["a", "a", "b", "b"], "status": "ok",
            "test_top1_pct": [1.0, 3.0, 7.0, 9.0],
            "train_peak_bytes": 2**20, "within_budget": True, "train_seconds": 1.0, "params_trainable": 1,
        }
    )  # fmt: skip
    table = compare(frame)
    assert table[name].tolist() == ["a", "b"] and table.n.tolist() == [2, 2]
    assert [text.split(" ")[0] for text in table["test top-1 %"]] == ["2.00", "8.00"]
