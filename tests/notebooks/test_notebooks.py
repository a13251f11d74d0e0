"""Notebooks run from top to bottom, and are committed clean."""

import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

import toolkit
from toolkit.batch.sweep import execute_notebook, run_experiments
from toolkit.files import NOTEBOOKS, ROOT
from toolkit.training.record import is_finished, load_curves

ALL = sorted(NOTEBOOKS.rglob("*.ipynb"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert len(notebook.cells) <= 25
    assert notebook.cells[0].source.startswith("# ") and "**Question.**" in notebook.cells[0].source


def nbval(folder, *names, timeout=600):
    """Run notebooks with their default parameters, cell by cell, their runs below `folder`."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider",
            "-n", "0", *(f"notebooks/{name}.ipynb" for name in names),
        ],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TOOLKIT_RUNS": str(folder)},
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_finetune_baselines_and_results_pass_nbval(tmp_path):
    """Results are those of the records that the others left."""
    nbval(tmp_path, "finetune", "foundation_baselines", "7_results")
    records = toolkit.load_records(tmp_path).set_index("phase")
    assert list(records.status) == ["ok", "ok"] and set(records.index) == {"training", "inference"}
    assert records.test_top1_pct["training"] > 85 and records.test_top1_pct["inference"] > 85


def test_audit_passes_nbval(tmp_path):
    nbval(tmp_path, "8_audit", timeout=180)


def test_checkpointing_runs_on_the_demo_backbone(tmp_path):
    execute_notebook(
        "checkpointing",
        tmp_path / "checkpointing.ipynb",
        {"backbone": "demo_vit", "num_classes": 10, "image_size": 32, "precision": "fp32", "budget": "16MiB"},
    )


def test_budget_explorer_runs_headless(tmp_path):
    chosen = tmp_path / "chosen.yaml"
    parameters = {"batch_size": 4, "budget": "4 MiB", "chosen": str(chosen), "method": "bitfit"}
    parameters |= {"map_backbones": "demo_vit"}
    execute_notebook("budget_explorer", tmp_path / "explorer.ipynb", parameters)


def test_grid_and_search_run_small(tmp_path):
    runs = {"runs": str(tmp_path / "runs"), "epochs": 1}
    execute_notebook(
        "method_grid", tmp_path / "grid.ipynb", {**runs, "methods": "bitfit", "strategies": "planned"}
    )
    (record,) = toolkit.load_records(tmp_path / "runs").itertuples()
    assert (record.status, record.method, record.checkpointing) == ("ok", "bitfit", "planned")
    # Its one run is the one above.
    execute_notebook(
        "tune", tmp_path / "tune.ipynb", {**runs, "methods": "bitfit", "lrs": "0.005", "budget": "18 MiB"}
    )
    assert len(toolkit.load_records(tmp_path / "runs")) == 1


def test_small_devices_runs_without_any_finished_run(tmp_path):
    parameters = {"published_claims": False, "methods": "norm", "batch_sizes": "1", "runs": str(tmp_path)}
    execute_notebook("5_small_devices", tmp_path / "edge.ipynb", parameters)


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
    if sources:  # which has a head too
        assert weights[f"{backbone}_{sources}"] > weights[backbone]


@pytest.mark.long  # test_sweep_processes.py kills sweeps, test_training.py what trains
def test_kill_dash_nine_in_the_middle_of_a_run(tmp_path, digits):
    """The killed command's kernel goes away; the next sweep resumes to the losses of an unbroken run."""
    experiment = toolkit.Experiment(method="lora", epochs=2, lora_dropout=0.1)
    flags = ["--method", "lora", "--epochs", "2", "--lora-dropout", "0.1"]

    folder = toolkit.run_folder(experiment, tmp_path / "runs")
    killed = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "run", "--runs", str(tmp_path / "runs"), *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
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
