"""What steps keep for backward."""

import pytest
import torch

from toolkit.experiment import Experiment
from toolkit.forecast.cnn_costs import step_costs
from toolkit.forecast.step import memory_table, step_memory
from toolkit.measure.memory import KeptTensors

COMMON = {"checkpointing": "none", "batch_size": 4, "device": "cpu"}


def test_kept_tensors_are_counted_by_storage_and_known_ones_left_out():
    known = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8, requires_grad=True)
    kept = KeptTensors([known])
    with kept:
        y = x * x[:2].repeat(2, 1)  # x, whole, and the copy
        z = torch.sigmoid(y @ known) + torch.sigmoid(y @ known)  # y, and both sigmoids
    assert z.requires_grad and kept.nbytes == 5 * 4 * 8 * 4


def test_a_freed_graph_keeps_nothing():
    x = torch.ones(4, 8, requires_grad=True)
    kept = KeptTensors([])
    with kept:
        y = torch.sigmoid(x)
        assert kept.nbytes == 4 * 8 * 4
        y = torch.sigmoid(y.detach() + x)
    assert kept.nbytes == 4 * 8 * 4 and y.requires_grad


@pytest.mark.parametrize("method", ["lora", "losa"])
def test_peaks_equal_those_counted_on_fake_tensors(method):
    step = step_memory(Experiment(method=method, **COMMON), 10)
    counted = step_costs("demo_vit", method, batch_size=4)
    assert step.peak_bytes == counted.peak_bytes and step.trained_parameters == counted.trainable
    assert step.peak_bytes == max(max(segment["bytes"]) for segment in step.trace)
    phases = {"forward", "backward", "optimizer"} | ({"recompute"} if method == "losa" else set())
    assert {segment["phase"] for segment in step.trace} == phases


def test_side_networks_keep_far_less_than_adapters_inside():
    methods = ["lora", "linear", "losa", "dtl"]
    steps = {m: step_memory(Experiment(method=m, **COMMON), 10) for m in methods}
    kept = {name: step.kept_bytes for name, step in steps.items()}
    assert kept["linear"] < kept["losa"] < kept["lora"] / 5
    assert kept["losa"] < kept["dtl"] < kept["lora"] / 2
    table = memory_table(steps)
    assert list(table.index) == methods
    assert table.loc["lora", "kept for backward (MiB)"] == kept["lora"] / 2**20


def test_a_batch_of_twice_the_images_keeps_twice_as_much():
    def kept(size: int) -> int:
        return step_memory(Experiment(method="losa", **COMMON | {"batch_size": size}), 10).kept_bytes

    small, middle, large = map(kept, (2, 4, 8))
    assert large - middle == 2 * (middle - small)
