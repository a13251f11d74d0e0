"""The budget explorer says what `plan` says, and does without a browser what it does in one."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from matplotlib import pyplot as plt
from papermill.iorw import read_yaml_file

import toolkit
from toolkit import explorer as explorer_module
from toolkit.budget import plan
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.explorer import Explorer
from toolkit.methods import set_train_mode
from toolkit.paths import NOTEBOOKS
from toolkit.training import held_bytes
from toolkit.widgets import BudgetExplorer

EXPERIMENT = Experiment(method="bitfit", batch_size=4, threshold=0.7, lr=5e-5, device="cpu", budget="3 MiB")


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer(EXPERIMENT, 10)


@pytest.fixture
def shown(explorer, tmp_path) -> BudgetExplorer:
    return BudgetExplorer(explorer, tmp_path / "chosen.yaml")


def planned_anew(budget: int, strategy: str):
    """What `toolkit.plan` says of the same step."""
    model = toolkit.build_backbone("demo_vit", 10, pretrained=False)
    model = toolkit.adapt(model, "bitfit", **EXPERIMENT.method_options)
    set_train_mode(model)
    batch = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    held = held_bytes(model, strategy)
    return plan(model, budget, batch, strategy=strategy, micro_batches=True, held_bytes=held)


def test_range_is_feasible_and_tight(explorer):
    low, high = explorer.range()
    assert low < high == planned_anew(low, "none").peak_bytes
    assert explorer.plan(low).fits
    with pytest.raises(InputError, match="cannot be held"):
        explorer.plan(int(0.99 * low))


def test_stops_are_logarithmic(explorer):
    steps = np.diff(np.log(explorer.stops))
    assert (explorer.stops[0], explorer.stops[-1]) == explorer.range()
    assert steps.max() < 1.001 * steps.min()


def test_marks_are_the_cards_within_the_range(explorer, monkeypatch):
    low, high = explorer.range()
    inside = (low + high) // 2
    monkeypatch.setattr(explorer_module, "MARKS", (low - 1, inside, high + 1))
    assert explorer.marks == [inside] and inside in explorer.stops


def test_table_is_what_plan_says(explorer):
    budget = sum(explorer.range()) // 2
    table = explorer.table(budget).set_index("strategy")
    assert list(table.index) == ["none", "static", "threshold", "planned"]
    for strategy in ("none", "static", "planned"):
        expected, row = planned_anew(budget, strategy), table.loc[strategy]
        assert (row.peak_bytes, row.recompute_pct) == (expected.peak_bytes, expected.recompute_pct)
        assert row.within_budget == (row.peak_bytes <= budget) == expected.fits
    assert table.step_seconds["none"] < table.step_seconds["static"]
    assert table.step_seconds["none"] <= table.step_seconds["planned"]


def test_threshold_row_is_the_rule_with_this_threshold(explorer):
    rows = pd.concat([explorer.table(stop)[2:3] for stop in explorer.stops])
    middle = rows[rows.recompute_pct.between(1, 90)].iloc[0]  # some blocks, not all
    alone = planned_anew(round(0.7 * middle.budget_bytes / 0.55), "threshold")  # 0.55 is what `plan` takes
    assert (middle.peak_bytes, middle.recompute_pct) == (alone.peak_bytes, alone.recompute_pct)
    assert rows.recompute_pct.is_monotonic_decreasing and rows.recompute_pct.nunique() > 2
    assert (rows.within_budget == (rows.peak_bytes <= rows.budget_bytes)).all()


def test_written_parameters_are_the_experiment(explorer, tmp_path):
    path = tmp_path / "a folder" / "$(chosen) <b>.yaml"
    command = shlex.split(explorer.write("4 MiB", path))
    assert command == ["papermill", str(NOTEBOOKS / "finetune.ipynb"), str(path.with_suffix(".ipynb")),
                       "-f", str(path)]  # fmt: skip
    parameters = read_yaml_file(str(path))  # as papermill does
    assert Experiment(**parameters) == replace(EXPERIMENT, budget="4 MiB", checkpointing="planned")
    assert set(parameters) <= set(papermill.inspect_notebook(command[1]))


def test_slider_changes_picture_and_table(shown):
    stops, open_figures = shown.explorer.stops, plt.get_fignums()
    assert abs(np.log(shown.slider.value / EXPERIMENT.budget_bytes)) < np.diff(np.log(stops)).max()
    before = shown.picture.value, shown.table.value
    assert bytes(before[0]).startswith(b"\x89PNG")
    shown.slider.value = stops[0]
    assert shown.picture.value != before[0] and shown.table.value != before[1]
    first = shown.picture.value
    shown.update(stops[-1])
    shown.update(stops[0])
    assert shown.picture.value == first
    assert "this plan" in shown.legend.value and "recompute" in shown.legend.value
    assert plt.get_fignums() == open_figures


def test_button_writes_what_is_shown(shown):
    shown.slider.value = shown.explorer.stops[3]
    shown.button.click()
    assert read_yaml_file(str(shown.path))["budget"] == str(shown.explorer.stops[3])
    assert "papermill" in shown.message.value


@pytest.mark.parametrize("budget", ["1 KiB", "<script>alert(1)</script>"])
def test_bad_budget_is_a_message_as_text(shown, budget):
    before = shown.picture.value
    shown.update(budget)
    assert "budget" in shown.message.value and "<" not in shown.message.value
    assert shown.picture.value == before
    shown.update("4 MiB")
    assert shown.message.value == ""


def test_names_are_shown_as_text(shown, explorer, tmp_path):
    folder = tmp_path / "<b>&"
    hostile = BudgetExplorer(explorer, folder / "x.yaml")
    hostile.write()
    assert "&lt;b&gt;&amp;" in hostile.message.value
    folder_itself = BudgetExplorer(explorer, folder)
    folder_itself.write()
    assert "it is a folder" in folder_itself.message.value and "<b>" not in folder_itself.message.value


def test_reaction_is_the_time_of_updates(shown, monkeypatch):
    seen = []
    monkeypatch.setattr(BudgetExplorer, "update", lambda self, budget: seen.append(budget))
    start = shown.slider.index
    assert 0 <= shown.reaction_seconds(20) < 1
    assert len(set(seen)) >= 20 and shown.slider.index == start


def test_no_classes_are_refused():
    with pytest.raises(InputError, match="num_classes"):
        Explorer(EXPERIMENT, 0)
