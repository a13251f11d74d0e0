"""What steps keep for backward, and the tables of finished runs with side methods."""

import dataclasses

import pandas as pd
import pytest
import torch

from toolkit.experiment import Experiment
from toolkit.forecast import step_memory as side_costs
from toolkit.forecast.cnn_costs import step_costs

COMMON = {"checkpointing": "none", "batch_size": 4, "device": "cpu"}


def test_kept_tensors_are_counted_by_storage_and_known_ones_left_out():
    known = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    kept = side_costs.KeptTensors([known])
    with kept:
        y = x * x[:2].repeat(2, 1)  # x, whole, and the copy
        z = torch.sigmoid(y @ known) + torch.sigmoid(y @ known)  # y, and both sigmoids
    assert z.requires_grad and kept.nbytes == 5 * 4 * 8 * 4


def test_a_graph_that_is_let_go_keeps_nothing():
    x = torch.ones(4, 8, requires_grad=True)
    kept = side_costs.KeptTensors([])
    with kept:
        y = torch.sigmoid(x)
        assert kept.nbytes == 4 * 8 * 4
        y = torch.sigmoid(y.detach() + x)
    assert kept.nbytes == 4 * 8 * 4 and y.requires_grad


@pytest.mark.parametrize("method", ["lora", "losa"])
def test_peaks_are_those_that_are_counted_without_running(method):
    step = side_costs.step_memory(Experiment(method=method, **COMMON), 10)
    counted = step_costs("demo_vit", method, batch_size=4)
    assert step.peak_bytes == counted.peak_bytes and step.trained_parameters == counted.trainable
    assert step.peak_bytes == max(max(segment["bytes"]) for segment in step.trace)
    assert {segment["phase"] for segment in step.trace} == {"forward", "backward", "optimizer"}


def test_side_networks_keep_far_less_than_adapters_inside():
    variants = {
        "lora": {},
        "linear": {},
        "losa": {},
        "dtl": {},
        "dtl, no backprop": {"method": "dtl", "dtl_backprop": False},
    }
    steps = {
        name: side_costs.step_memory(Experiment(**{"method": name} | options, **COMMON), 10)
        for name, options in variants.items()
    }
    kept = {name: step.kept_bytes for name, step in steps.items()}
    assert kept["linear"] < kept["losa"] < kept["lora"] / 5
    assert kept["dtl, no backprop"] < kept["dtl"] < kept["lora"] / 2
    table = side_costs.memory_table(steps)
    assert list(table.index) == list(variants)
    assert table.loc["lora", "kept for backward (MiB)"] == kept["lora"] / 2**20


def test_a_batch_of_twice_the_images_keeps_twice_as_much():
    def kept(size: int) -> int:
        return side_costs.step_memory(
            Experiment(method="losa", **COMMON | {"batch_size": size}), 10
        ).kept_bytes

    small, middle, large = map(kept, (2, 4, 8))
    assert large - middle == 2 * (middle - small)


def run(top1: float = 80.0, seed: int = 0, status: str = "ok", **options) -> dict:
    experiment = Experiment(seed=seed, **{"device": "cpu", "checkpointing": "none"} | options)
    return experiment.to_dict() | {
        "phase": "training", "status": status, "test_top1_pct": top1, "train_peak_bytes": 2**20,
        "within_budget": True, "train_seconds": 3.0, "steps": 30, "params_trainable": 1234,
    }  # fmt: skip


def test_runs_of_other_experiments_are_left_out_whatever_the_device():
    records = pd.DataFrame([run(method="losa"), run(method="losa", side_rank=2), run(method="lst")])
    records = pd.concat([records.assign(device="cuda"), records.assign(phase="inference", lr=None)])
    wanted = [Experiment(method="losa", checkpointing="none"), Experiment(method="dtl", checkpointing="none")]
    found = side_costs.runs_of(records.reset_index(drop=True), wanted)
    assert list(found.index) == [0]
    assert list(side_costs.runs_of(records[:0], wanted).columns) == list(records.columns)


def test_an_ablation_changes_one_option_at_a_time():
    rows = [run(70 + seed, seed, method="losa", side_rank=4) for seed in (0, 1)]
    rows += [run(60 + seed, seed, method="losa", side_rank=4, losa_start="first") for seed in (0, 1)]
    rows += [run(50, method="losa", side_rank=4, losa_mixer="tokens"), run(90, method="lora")]
    rows += [run(10, method="losa", side_rank=2, losa_start="first")]  # two at once
    records = pd.DataFrame(rows)
    usual = side_costs.as_usual(records)
    assert set(usual.side_rank[usual.method == "losa"]) == {4} and len(usual) == 3
    changes = side_costs.ablations(records)
    assert list(zip(changes.option, changes.value)) == [
        ("losa_start", "first"), ("losa_start", "last"), ("losa_mixer", "both"), ("losa_mixer", "tokens"),
    ]  # fmt: skip
    assert list(changes["test top-1 %"])[2:] == ["70.50 ± 6.35", "50.00"]
    assert side_costs.ablations(usual).empty


def test_among_equally_frequent_values_the_default_is_usual():
    records = pd.DataFrame([run(method="losa"), run(method="losa", losa_start="first")])
    assert list(side_costs.as_usual(records).losa_start) == ["last"]


def test_tables_tell_the_time_of_a_step_and_what_went_wrong():
    table = side_costs.run_table(pd.DataFrame([run(method="losa"), run(method="lst", status="oom")]))
    assert list(table["step ms"]) == ["100.0", "–"] and list(table["not ok"]) == ["", "oom"]
    assert "dataset" not in table and "adapt J" not in table


def test_fields_of_an_experiment_are_numbers_or_text():
    """`runs_of` compares them as such."""
    assert {field.type for field in dataclasses.fields(Experiment)} <= {"str", "int", "float", "bool"}
