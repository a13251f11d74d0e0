"""Trackers get what the record of a finished run holds: stand-ins note it, real packages read it back."""

import json
import sys
from types import ModuleType

import pytest

import toolkit
from toolkit.__main__ import main
from toolkit.batch import sweep
from toolkit.batch.track import TRACKERS, tracker
from toolkit.errors import InputError
from toolkit.training.record import RunRecord, run_fields

EXPERIMENT = toolkit.Experiment(method="linear", budget="18 MiB")
HISTORY = [{"epoch": 1, "train_loss": 2.5, "val_top1_pct": 40.0}, {"epoch": 2, "train_loss": 1.5}]
TRACE = [{"phase": "forward", "block": None, "bytes": [2**20, 2**21]}]


@pytest.fixture
def folder(tmp_path):
    """The folder of a finished run of two epochs."""
    record = RunRecord(
        run=run_fields(EXPERIMENT, "ok", None),
        config=EXPERIMENT.config,
        quality={"test_top1_pct": 90.0, "metric": "top1_pct"},
        memory={"train_peak_bytes": 2**21, "context_bytes": None, "within_budget": True},
        curves={"history": HISTORY, "memory_trace_bytes": TRACE},
    )
    folder = toolkit.run_folder(EXPERIMENT, tmp_path)
    folder.mkdir()
    record.save(folder)
    return folder


class StandIn(ModuleType):
    """A package whose every function notes its call, returns the package and is a context manager."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*positional, **named):
            self.calls.append((name, *positional, named))
            return self

        return call

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def logged(self, *names) -> list[tuple]:
        return [call for call in self.calls if call[0] in names]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    def use(name):
        module = StandIn(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "server"))
    return use


FIGURES = {"test_top1_pct": 90.0, "train_peak_bytes": 2.0**21, "within_budget": 1.0}
ROWS = [{"epoch": 1.0, "train_loss": 2.5, "val_top1_pct": 40.0}, {"epoch": 2.0, "train_loss": 1.5}]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_parameters_curves_figures_record_and_picture(stand_in, folder, name):
    module = stand_in(name)
    tracker(name)(folder)
    (begun,) = module.logged("init")
    assert begun[-1] == {"project": "toolkit", "name": folder.name, "config": EXPERIMENT.config}
    assert module.logged("Image")[0][1].endswith("memory_over_step.png")
    figures = FIGURES | {"memory_over_step": module}
    rows = [("log", row, {"step": step}) for step, row in enumerate([figures, *ROWS])]
    assert module.logged("log") == rows
    assert module.logged("log_artifact")[0][1] == str(folder / "record.json")
    assert module.calls[-1] == ("finish", {})


def test_mlflow_gets_parameters_curves_figures_record_and_picture(stand_in, folder):
    module = stand_in("mlflow")
    tracker("mlflow")(folder)
    assert module.logged("log_params")[0][1] == EXPERIMENT.config
    rows = [("log_metrics", row, {"step": step}) for step, row in enumerate([FIGURES, *ROWS])]
    assert module.logged("log_metrics") == rows
    names = [call[1].rsplit("/", 1)[1] for call in module.logged("log_artifact")]
    assert names == ["record.json", "memory_over_step.png"]
    assert not module.logged("set_tracking_uri"), "the user's server is used"


def test_tensorboard_reads_back_what_was_logged(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker("tensorboard")(folder)
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("curves/train_loss")] == [(1, 2.5), (2, 1.5)]
    assert [e.value for e in events.Scalars("figures/train_peak_bytes")] == [2**21]
    assert events.Tags()["images"] == ["memory_over_step"]
    record = events.Tensors("record/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(record)["config"] == EXPERIMENT.config


def test_mlflow_reads_back_what_was_logged(folder, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    tracker("mlflow")(folder)
    (run,) = mlflow.MlflowClient().search_runs(mlflow.get_experiment_by_name("toolkit").experiment_id)
    assert run.data.params["method"] == "linear" and run.data.metrics["train_peak_bytes"] == 2**21
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train_loss")
    assert [(row.step, row.value) for row in history] == [(1, 2.5), (2, 1.5)]
    names = [file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)]
    assert sorted(names) == ["memory_over_step.png", "record.json"]
    assert not (folder / "mlruns").exists() and (folder.parent / "mlflow").is_dir()


def test_trackio_reads_back_what_was_logged(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    tracker("trackio")(folder)
    (run,) = [run for run in trackio.Api().runs("toolkit") if run.name == folder.name]
    assert run.config["method"] == "linear"
    rows = trackio.SQLiteStorage.get_logs("toolkit", folder.name)
    assert [row["train_loss"] for row in rows if "train_loss" in row] == [2.5, 1.5]
    assert rows[0]["train_peak_bytes"] == 2**21 and "memory_over_step" in rows[0]


def test_a_run_is_logged_once_even_by_later_calls(stand_in, folder):
    module = stand_in("wandb")
    for _ in range(2):
        tracker("wandb")(folder)
    assert len(module.logged("init")) == 1
    RunRecord(run=run_fields(EXPERIMENT, "ok", None), config=EXPERIMENT.config).save(folder)  # it ran again
    tracker("wandb")(folder)
    assert len(module.logged("init")) == 2


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_missing_is_one_line(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)
    assert main(["run", "--track", name, "--runs", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"pip install {name}" in error and not any(tmp_path.iterdir())
    with pytest.raises(InputError, match="Did you mean 'mlflow'"):
        tracker("mlfow")


def test_a_tracker_that_fails_costs_no_run(stand_in, folder, monkeypatch, capsys, few_digits):
    monkeypatch.setattr(sweep, "load_dataset", lambda name: few_digits)
    monkeypatch.setattr(sweep, "finished_folder", lambda *_: folder)
    module = stand_in("wandb")
    monkeypatch.setattr(module, "init", lambda **_: 1 / 0, raising=False)
    assert sweep.run_experiments([EXPERIMENT], folder.parent, track="wandb") == []
    assert "not tracked" in "".join(capsys.readouterr())
    monkeypatch.delattr(module, "init")
    assert sweep.run_experiments([EXPERIMENT], folder.parent, track="wandb") == []
    assert len(module.logged("init")) == 1
