import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from simulated_gpu import SimulatedGpu, VirtualClock, meter_of

import toolkit
from toolkit import analysis
from toolkit.batch import sweep
from toolkit.files import write_atomically
from toolkit.training.loop import FitResult
from toolkit.training.record import RunRecord, finished_folder, is_finished, load_curves


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


def test_a_record_is_read_as_it_was_written(finished, tmp_path):
    record, folder, experiment, result, evaluation = finished
    record.save(folder)
    frame = toolkit.load_records(tmp_path)
    assert len(frame) == 1
    row = frame.iloc[0]
    assert row.experiment_id == experiment.id and row.status == "ok"
    assert row.test_top1_pct == evaluation.top1_pct
    assert row.train_peak_bytes == result.peak_bytes
    assert row.train_seconds == result.train_seconds
    assert toolkit.Experiment(**record.config) == experiment
    assert row.budget_bytes == experiment.budget_bytes and row["rank"] == experiment.options["rank"]
    assert load_curves(folder)["history"] == result.history
    assert row.ns_m_inference == toolkit.netscore(
        "NS-M", evaluation.top1_pct, peak_mib=evaluation.peak_bytes / 2**20
    )
    assert row.inference_macs_per_image == toolkit.flops(finished_model(), torch.zeros(1, 3, 32, 32)).macs
    assert row.forward_flops_per_image > 2 * row.inference_macs_per_image


def finished_model():
    return toolkit.adapt(toolkit.build_backbone("demo_vit", 10, False), "lora")


def test_snapshots_are_removed_when_the_record_is_written(finished):
    record, folder, *_ = finished
    assert list((folder / "snapshots").iterdir())
    record.save(folder)
    assert not (folder / "snapshots").exists()
    assert is_finished(folder)


def test_provenance_is_complete(finished):
    record = finished[0]
    for name in (
        "device_name", "driver", "power_limit_watts", "cuda", "cudnn", "alloc_conf", "threads", "python",
        "version_torch", "version_toolkit", "git_sha", "git_dirty", "env_hash", "deterministic",
    ):  # fmt: skip
        assert name in record.env
    assert record.packages["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record.run["schema_version"] == 6 and record.config["seed"] == 0
    assert len(record.quality["weights_sha256"]) == 64 and record.memory["memory_source"]
    assert record.data["train_sha256"] != record.data["test_sha256"]
    assert record.energy["energy_joules"] is None and "no GPU" in record.missing["energy_joules"]
    assert record.energy["energy_source"] == "none" and record.memory["budget_mode"] == "simulated"


def test_values_that_were_not_measured_are_null_with_a_reason(demo_model, few_digits, tmp_path):
    experiment = toolkit.Experiment(device="cpu")
    record = RunRecord.of_run(
        experiment, few_digits, demo_model(), FitResult(status="oom", error="CUDA out of memory"), None
    )
    nulls = {
        name
        for group in ("quality", "time", "energy", "memory", "flops", "scores", "env")
        for name, value in getattr(record, group).items()
        if value is None
    }
    assert nulls == set(record.missing)
    assert all(isinstance(reason, str) and reason for reason in record.missing.values())
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


def test_a_run_on_other_data_is_repeated(finished, tmp_path):
    record, folder, experiment, *_ = finished
    record.save(folder)
    assert finished_folder(experiment, tmp_path, record.data["train_sha256"]) == folder
    assert finished_folder(experiment, tmp_path, "of other data") is None


def test_a_record_of_an_unknown_schema_is_repeated(finished, tmp_path):
    record, folder, experiment, *_ = finished
    record.run["schema_version"] = 4
    record.save(folder)
    assert not is_finished(folder) and finished_folder(experiment, tmp_path) is None
    with pytest.warns(UserWarning, match="schema version 4"):
        assert toolkit.load_records(tmp_path).empty


OLD_RUNS = {  # records that the previous schema wrote, by the folder that it gave them
    "schema_5_planned": "digits-demo_vit-lora-planned-s0-f3a27fd7b3dd",
    "schema_5_threshold": "digits-demo_vit-lora-threshold-s0-41a11f7f79c2",
}


@pytest.fixture
def old_runs(tmp_path):
    """A folder of runs of the previous schema."""
    for name, folder in OLD_RUNS.items():
        (tmp_path / folder).mkdir()
        shutil.copy(Path(__file__).parent / "data" / f"{name}.json", tmp_path / folder / "record.json")
    return tmp_path


def test_runs_of_the_previous_schema_are_listed_under_todays_names(old_runs, recwarn):
    frame = toolkit.load_records(old_runs).set_index("checkpointing")
    assert not recwarn and frame.attrs["left_out"] == {}
    assert frame.loc["planned", "test_top1_pct"] == pytest.approx(97.78, abs=0.01)
    assert (frame.budget_bytes == 18 * 2**20).all() and (frame["rank"] == 8).all()
    assert frame.loc["threshold", "tau"] == 0.55 and frame.feature_cache.tolist() == [0, 0]
    assert not {"lora_rank", "threshold", "galore_rank", "options"} & set(frame)


@pytest.mark.parametrize("checkpointing", ["planned", "threshold"])
def test_finished_runs_of_the_previous_schema_are_not_repeated(old_runs, monkeypatch, checkpointing):
    parameters = {"method": "lora", "checkpointing": checkpointing, "budget": "18 MiB", "device": "cpu"}
    experiment = toolkit.Experiment(**parameters)
    assert experiment.id in set(toolkit.load_records(old_runs).experiment_id)
    folder = finished_folder(experiment, old_runs)
    assert folder.name == OLD_RUNS[f"schema_5_{checkpointing}"] != experiment.name
    monkeypatch.setattr(sweep, "execute_notebook", lambda *_: pytest.fail("the run is repeated"))
    assert sweep.run_experiments([experiment], old_runs) == []
    other = toolkit.Experiment(**parameters, options={"rank": 4})
    assert finished_folder(other, old_runs) is None


def test_energy_of_a_simulated_gpu_stays_marked(demo_model, few_digits):
    """From the sensor to the overview; each null has the reason of its own window."""
    clock = VirtualClock()
    gpu = SimulatedGpu(clock, [(0, 100.0)])
    meter = meter_of(gpu)
    experiment = toolkit.Experiment(epochs=1, batch_size=32, device="cpu")
    model = demo_model("lora")
    tick = torch.nn.Module.__call__

    def slow(module, *arguments, **options):
        if module is model:
            clock.sleep(10)
        return tick(module, *arguments, **options)

    torch.nn.Module.__call__ = slow
    try:
        result = toolkit.fit(model, few_digits, experiment, meter=meter)
    finally:
        torch.nn.Module.__call__ = tick
    evaluation = toolkit.test(model, few_digits, experiment, result, meter)  # takes no virtual time
    record = RunRecord.of_run(experiment, few_digits, model, result, evaluation)
    assert record.energy["energy_source"] == "fake" and "simulated" in record.energy["train_energy_flags"]
    assert record.energy["train_energy_joules"] == pytest.approx(100 * record.time["train_seconds"], rel=0.05)
    assert record.energy["test_energy_joules"] is None
    assert "did not move" in record.missing["test_energy_joules"]
    overview = record.overview().value
    assert overview["train_energy_joules"] == overview["ns_e_training"] == "simulated"
    assert record.curves["windows"]["train"]["samples"] > 100


def test_operators_without_a_formula_are_named(finished, few_digits, tmp_path):
    class Spectrum(torch.nn.Module):  # a Fourier transform of images, for which there is no formula
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 10)

        def forward(self, x):
            return self.fc(torch.fft.rfft2(x).abs().mean((2, 3)))

    experiment = toolkit.Experiment(
        epochs=1, batch_size=32, method="full", backbone="mine", device="cpu", checkpointing="none"
    )
    model = toolkit.adapt(Spectrum(), "full")
    result = toolkit.fit(model, few_digits, experiment)
    evaluation = toolkit.test(model, few_digits, experiment, result)
    record = RunRecord.of_run(experiment, few_digits, model, result, evaluation)
    record.save(tmp_path / "mine")
    finished[0].save(finished[1])
    records = toolkit.load_records(tmp_path).set_index("backbone")
    assert records.uncounted_operators.to_dict() == {"mine": "aten._fft_r2c", "demo_vit": ""}
    noted = analysis.missing(analysis.read(tmp_path)[0]).set_index("figure")["missing because"]
    assert noted["part of the FLOPs"] == "no formula for aten._fft_r2c"
    assert "aten._fft_r2c" in analysis.overview(record).caption


def test_nan_cannot_enter_a_record(finished):
    record, folder, *_ = finished
    record.quality["test_loss"] = math.nan
    with pytest.raises(ValueError, match="JSON"):
        record.save(folder)
    assert not (folder / "record.json").exists()


def test_a_file_that_is_not_a_record_is_left_out_with_its_reason(finished, tmp_path):
    record, folder, *_ = finished
    record.save(folder)
    for name, text in {"empty": "", "list": "[]", "half": '{"run": {'}.items():
        write_atomically(tmp_path / name / "record.json", text.encode())
        assert not is_finished(tmp_path / name)
    with pytest.warns(UserWarning, match="was left out: not a record") as caught:
        frame = toolkit.load_records(tmp_path)
    assert len(frame) == 1 and len(caught) == 3
    assert {Path(path).parent.name for path in frame.attrs["left_out"]} == {"empty", "list", "half"}


def test_parameters_added_later_have_their_defaults_in_earlier_records(finished, tmp_path):
    record, *_ = finished
    path = record.save(tmp_path / "old")
    content = json.loads(path.read_text())
    del content["config"]["batch_norm"], content["sha256"]
    path.write_text(json.dumps(content))
    assert toolkit.load_records(tmp_path).batch_norm.tolist() == ["auto"]


def test_options_that_a_run_does_not_have_leave_the_others_integers(finished, tmp_path):
    record, *_ = finished
    record.save(tmp_path / "lora")
    record.config = toolkit.Experiment(method="linear", device="cpu").to_dict()
    record.save(tmp_path / "linear")
    ranks = dict(toolkit.load_records(tmp_path)[["method", "rank"]].to_numpy())
    assert ranks["lora"] == 8 and isinstance(ranks["lora"], int)


def test_a_folder_without_records_is_an_empty_frame(tmp_path):
    assert toolkit.load_records(tmp_path / "nowhere").empty


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.files.os.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
