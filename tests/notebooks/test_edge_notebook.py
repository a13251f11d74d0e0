"""The presets that make the runs of `5_small_devices.ipynb`."""

from toolkit.batch.sweep_file import check_count, preset
from toolkit.methods import METHODS


def test_the_preset_runs_every_method_that_convolutions_allow():
    runs = preset("edge")
    methods = {run.method for run in runs if run.dataset == "digits-c:mixed:5"}
    assert methods == {name for name, m in METHODS.items() if not m.frozen_backbone} - {"qlora"}
    assert {run.seed for run in runs} == {0, 1, 2} and len(runs) == len(set(runs)) <= 140
    ranks = {run.options["rank"] for run in runs if run.method == "lora" and run.batch_size == 64}
    assert ranks == {1, 4, 8, 16, 64}
    galore = [run for run in runs if run.method == "galore" and run.batch_size == 64]
    assert {run.options["rank"] for run in galore} == {1, 4, 16, 32, 64}
    assert {run.options["gap"] for run in galore if run.options["rank"] == 32} == {1, 5, 20, 50}


def test_the_papers_preset_needs_no_leave():
    runs = preset("edge_paper")
    check_count(runs)
    assert {run.backbone for run in runs} == {
        "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"
    }  # fmt: skip
