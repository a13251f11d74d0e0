import json
import math

import pytest
import torch
from simulated_gpu import SimulatedGpu, VirtualClock, meter_of

import toolkit
from toolkit.files import write_atomically
from toolkit.measure.environment import environment
from toolkit.training.loop import FitResult
from toolkit.training.record import RunRecord, is_finished, load_curves


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
        toolkit.Experiment.flat(
            **{
                name: row[name].item() if hasattr(row[name], "item") else row[name]
                for name in experiment.flat_dict()
            }
        )
        == experiment
    )
    assert load_curves(folder)["history"] == result.history
    assert row.ns_m_inference == toolkit.netscore(
        "NS-M", evaluation.top1_pct, peak_mib=evaluation.peak_bytes / 2**20
    )
    assert row.inference_macs_per_image == toolkit.flops(finished_model(), torch.zeros(1, 3, 32, 32)).macs
    assert row.forward_flops_per_image > 2 * row.inference_macs_per_image


def finished_model():
    return toolkit.adapt(toolkit.build_backbone("demo_vit", 10, False), "lora")


def test_snapshots_go_when_the_record_stands(finished):
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


def test_what_was_not_measured_is_null_with_a_reason(demo_model, few_digits, tmp_path):
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


def test_a_run_on_other_data_is_not_this_one(finished):
    record, folder, *_ = finished
    record.save(folder)
    assert is_finished(folder, record.data["train_sha256"])
    assert not is_finished(folder, "of other data")


def test_a_record_of_an_older_schema_is_repeated(finished):
    record, folder, *_ = finished
    record.run["schema_version"] -= 1
    record.save(folder)
    assert not is_finished(folder)


def test_energy_of_a_simulated_gpu_stays_marked(demo_model, few_digits):
    """From the sensor to what people read; each null with the reason of its own window."""
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


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
        lambda patch: patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True),
        lambda patch: patch.setattr(torch.backends.cudnn, "benchmark", True),
        lambda patch: patch.setattr("toolkit.measure.environment.code_sha256", lambda: "edited"),
        lambda patch: patch.setattr("toolkit.measure.environment._version", lambda name: "0"),
    ],
)
def test_what_makes_runs_incomparable_changes_their_environment(monkeypatch, change):
    before = environment("cpu")
    assert environment("cpu") == before
    with monkeypatch.context() as patch:
        change(patch)
        assert environment("cpu")["env_hash"] != before["env_hash"]


def test_a_new_commit_of_the_same_code_does_not(monkeypatch):
    before = environment("cpu")["env_hash"]
    monkeypatch.setattr("toolkit.measure.environment._git", lambda: {"git_sha": "new", "git_dirty": True})
    assert environment("cpu")["env_hash"] == before


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


def test_older_runs_have_the_defaults_of_parameters_that_came_later(finished, tmp_path):
    record, *_ = finished
    path = record.save(tmp_path / "old")
    content = json.loads(path.read_text())
    del content["config"]["batch_norm"], content["config"]["options"]
    content["config"] |= {"method": "galore", "lora_rank": 4, "galore_rank": 16, "budget": "1000"}
    path.write_text(json.dumps(content))
    (row,) = toolkit.load_records(tmp_path).to_dict("records")
    assert (row["batch_norm"], row["method"], row["rank"], row["gap"]) == ("auto", "galore", 16, 50)
    assert row["budget"] == 1000 and "lora_rank" not in row and "options" not in row


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
