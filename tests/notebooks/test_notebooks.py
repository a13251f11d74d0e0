"""Notebooks are committed clean, and each runs once from top to bottom."""

import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest

import toolkit
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.batch import execute_notebook, run_experiments
from toolkit.files import NOTEBOOKS, ROOT
from toolkit.training.record import is_finished, load_curves

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
SMALL = {
    "2_plan": {
        "batch_size": 16, "micro_batch_size": 16, "map_backbones": "demo_vit", "map_methods": "linear",
    },
    "3_methods": {
        "methods": "linear", "strategies": "planned", "tuned_methods": "linear", "lrs": "0.01",
        "tuned_epochs": 1,  # the same run
    },
    "4_side_and_dense": {
        "methods": "lora,losa", "batch_size": 8, "epochs": 1, "dense_methods": "e3va", "dense_epochs": 1,
    },
    "on_your_photos": {"backbone": "demo_cnn", "resolution": 0, "budget": "32 MiB"},
    "5_small_devices": {"published_claims": False, "methods": "norm", "batch_sizes": "1"},
}  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_notebooks_are_clean_and_show_calls_only(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert all(len(cell.source.splitlines()) <= 12 for cell in code if cell is not parameters)
    assert not any(re.search(r"^\s*(def|class|while) ", cell.source, re.M) for cell in code)
    first = notebook.cells[0].source
    assert first.startswith("# ") and "**Question.**" in first and "**Expect**" in first


def test_a_run_and_a_baseline_are_read_by_the_results_notebook(tmp_path):
    experiments = [toolkit.Experiment(epochs=2, budget="18 MiB"), BaselineExperiment(protocol="knn")]
    assert run_experiments(experiments, tmp_path) == []
    execute_notebook("7_results", tmp_path / "results.ipynb", {"runs": str(tmp_path)})
    records = toolkit.load_records(tmp_path).set_index("phase")
    assert list(records.status) == ["ok", "ok"] and set(records.index) == {"training", "inference"}
    assert records.test_top1_pct["training"] > 60 and records.test_top1_pct["inference"] > 85


@pytest.mark.parametrize("name", SMALL)
def test_notebook_runs_at_small_size(tmp_path, name):
    if name == "2_plan" and CHROMIUM:
        pytest.skip("test_browser.py runs it")
    folders = {"2_plan": {"chosen": str(tmp_path / "chosen.yaml")}}
    execute_notebook(name, tmp_path / "out.ipynb", SMALL[name] | folders.get(name, {"runs": str(tmp_path)}))


def test_the_audit_passes_nbval_with_its_own_parameters():
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-n", "0"]
    command += ["-p", "no:cacheprovider", "notebooks/8_audit.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("backbone", "sources"), [pytest.param("demo_vit", "", marks=pytest.mark.long), ("demo_cnn", "digits")]
)
def test_pretraining_runs_at_toy_size(tmp_path, backbone, sources):
    execute_notebook(
        "extras/pretrain_demo_backbone", tmp_path / "out.ipynb",
        {
            "backbone": backbone, "classes": "2,2,2", "images_per_class": 16,
            "epochs": 1, "folder": str(tmp_path), "sources": sources, "source_epochs": 1,
            "transfer_methods": "linear", "transfer_seeds": 1, "transfer_epochs": 1,
        },
    )  # fmt: skip
    weights = {path.stem: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert set(weights) == {backbone, *(f"{backbone}_{name}" for name in sources.split(",") if name)}
    assert all(500_000 < size < 2_000_000 for size in weights.values())
    if sources:  # these weights include a head
        assert weights[f"{backbone}_{sources}"] > weights[backbone]


@pytest.mark.long  # test_sweep_processes.py kills sweeps, test_training.py kills training
def test_a_run_killed_in_the_middle_resumes_to_the_losses_of_an_unbroken_one(tmp_path, digits):
    """The kernel of the killed command ends, and the next sweep resumes."""
    experiment = toolkit.Experiment(method="lora", epochs=2, options={"dropout": 0.1})
    flags = ["--method", "lora", "--epochs", "2", "--dropout", "0.1"]

    folder = toolkit.run_folder(experiment, tmp_path / "runs")
    killed = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "run", "--runs", str(tmp_path / "runs"), *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 1200
    while not list((folder / "snapshots").glob("*.json")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not is_finished(folder)
    assert run_experiments([experiment], tmp_path / "runs") == []

    toolkit.seed_everything(experiment.seed)
    model = toolkit.build_backbone("demo_vit", 10)
    model = toolkit.adapt(model, "lora", **experiment.method_options)
    unbroken = toolkit.fit(model, digits, experiment)
    (record,) = toolkit.load_records(tmp_path / "runs").itertuples()
    assert record.resumes == 1
    assert record.train_peak_bytes == unbroken.peak_bytes
    assert record.test_loss == toolkit.evaluate_split(model, digits, "test", experiment).loss
    curves = load_curves(folder)
    assert curves["history"] == unbroken.history
    assert curves["memory_trace_bytes"] == unbroken.memory_trace
