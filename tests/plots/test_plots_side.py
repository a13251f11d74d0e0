"""Figures of several methods: what they hold is what they were given."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import toolkit
from toolkit.forecast.step_memory import StepMemory
from toolkit.plots import side as plots_side

MIB = 2**20


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def step(kept: int, peak: int) -> StepMemory:
    return StepMemory(kept * MIB, peak * MIB, 10, [])


@pytest.mark.parametrize("name", ["lora", "$\\bad$", "<b>"])
def test_bars_are_as_long_as_peaks_and_kept_bytes(name):
    figure = plots_side.memory_bars({name: step(3, 8), "losa": step(1, 5)}, name)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [8, 5, 3, 1]
    assert [text.get_text() for text in axes.texts] == ["kept 3, peak 8", "kept 1, peak 5"]


def test_phases_stand_below_one_another():
    def trace(*phases) -> list[dict]:
        return [
            {"phase": phase, "block": None, "bytes": [mib * MIB for mib in mibs]} for phase, mibs in phases
        ]

    traces = {
        "lora": trace(("forward", [1, 2, 3]), ("forward", [4]), ("recompute", [6]), ("backward", [5, 1])),
        "losa": trace(("forward", [1, 2]), ("backward", [2, 1]), ("optimizer", [1])),
    }
    (axes,) = plots_side.memory_over_steps(traces).axes
    lora, losa = axes.lines[:2]
    assert list(lora.get_ydata()) == [1, 2, 3, 4, 6, 5, 1]
    assert np.allclose(lora.get_xdata(), [0, 1, 2, 3, 3, 4.5, 6])
    assert np.allclose(losa.get_xdata(), [0, 3, 3, 6, 6])
    assert lora.get_label() == "lora, peak 6"


def test_curves_of_runs_that_ended_early_are_left_out():
    history = [{"epoch": n, "train_loss": 3 - n, "val_loss": 1.0, "val_miou_pct": 20 * n} for n in (1, 2)]
    left, right = plots_side.curves_by_method({"e3va": history, "full": []}).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2, 1]]
    assert [list(line.get_ydata()) for line in right.lines] == [[20, 40]]
    assert right.get_ylabel() == "validation mean IoU (%)"


def test_scores_are_those_of_the_data_sets_task():
    def run(dataset: str, method: str, seed: int, **scores) -> dict:
        values = toolkit.Experiment(
            dataset=dataset, method=method, seed=seed, backbone="demo_swin", checkpointing="none"
        ).to_dict()
        return values | {"phase": "training", "status": "ok", "train_peak_bytes": 4 * MIB} | scores

    records = pd.DataFrame(
        [run("mosaics", "e3va", seed, test_miou_pct=40 + seed) for seed in (0, 2)]
        + [
            run("digit_scenes", "linear", 0, test_map_pct=7.0),
            run("digit_scenes", "full", 0, test_map_pct=None),
        ]
    )
    segmentation, detection = plots_side.scores_against_memory(records).axes
    assert segmentation.containers[0].lines[0].get_xydata().tolist() == [[4, 41]]
    assert [bars.get_label() for bars in detection.containers] == ["linear"]
    assert detection.get_ylabel() == "test box mAP (%)"


@pytest.mark.parametrize("dataset", ["mosaics", "digit_scenes"])
def test_examples_show_images_and_their_truth(dataset):
    splits = toolkit.load_dataset(dataset)
    figure = plots_side.examples(splits, 2)
    figure.canvas.draw()
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert len(pictures) == 4 and pictures[0].shape == (64, 64, 3)
    assert (pictures[0] == splits.train[0][0].permute(1, 2, 0).numpy()).all()
    assert pictures[2].reshape(-1, 3).std(1).max() > 0  # the truth is in colour
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    seen = set()
    for row in range(2):
        target = splits.train[row][1]
        seen |= set((target if dataset == "mosaics" else target["boxes"][:, 4]).int().unique().tolist())
    assert named == {splits.classes[label] for label in seen}
