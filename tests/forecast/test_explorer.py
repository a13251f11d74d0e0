"""The budget explorer says what `plan` says, and does without a browser what it does in one."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from matplotlib import pyplot as plt
from papermill.iorw import read_yaml_file

import toolkit
from toolkit import plots
from toolkit.budget import STRATEGIES, format_bytes, plan
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.files import NOTEBOOKS
from toolkit.forecast import explorer as explorer_module
from toolkit.forecast import forecasts as forecast_module
from toolkit.forecast.explorer import FRAGMENTED, Explorer
from toolkit.forecast.forecasts import classes_of
from toolkit.methods import Hooks, set_train_mode
from toolkit.training.step import held_bytes
from toolkit.widgets import BudgetExplorer

EXPERIMENT = Experiment(
    backbone="small:vit_small", pretrained=False, method="bitfit", batch_size=4, lr=5e-5,
    device="cpu", budget="1 MiB", checkpointing="threshold", options={"tau": 0.7},
)  # fmt: skip


@pytest.fixture(scope="module")
def explorer(tmp_path_factory) -> Iterator[Explorer]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(explorer_module, "STOPS", 8)  # as many as the tests need
        yield Explorer(EXPERIMENT, 10, tmp_path_factory.mktemp("answers"))


@pytest.fixture
def shown(explorer, tmp_path) -> BudgetExplorer:
    return BudgetExplorer(explorer, tmp_path / "chosen.yaml")


def planned_anew(budget: int, strategy: str, images: int = 4, micro_batches: bool = True):
    """What `toolkit.plan` says of the same step."""
    model = toolkit.build_backbone(EXPERIMENT.backbone, 10, pretrained=False)
    model = toolkit.adapt(model, "bitfit", **EXPERIMENT.method_options)
    set_train_mode(model)
    batch = torch.zeros(images, 3, 32, 32), torch.zeros(images, dtype=torch.long)
    held = held_bytes(model, Hooks(), STRATEGIES[strategy].plans)
    return plan(model, budget, batch, strategy=strategy, micro_batches=micro_batches, held_bytes=held)


def test_the_range_is_feasible_and_tight(explorer):
    low, high = explorer.range()
    assert low < high == planned_anew(low, "none").peak_bytes
    assert explorer.plan(low).fits
    with pytest.raises(InputError, match="cannot be held"):
        explorer.plan(int(0.99 * low))


def test_one_sentence_says_whether_a_card_holds_the_step(explorer, monkeypatch):
    monkeypatch.setattr(explorer_module, "_context_bytes", lambda: (2**20, "measured"))
    low, high = explorer.range()

    def card(budget: float) -> str:
        return f"{int(2**20 + budget / (1 - FRAGMENTED))} B"

    assert "as it is: it takes" in explorer.on_card(card(1.01 * high))
    between = explorer.on_card(card((low + high) / 2))
    assert "by computing" in between and f"Budget: {format_bytes((low + high) / 2)}." in between
    assert "does not hold" in explorer.on_card(card(0.9 * low)) and "1.0 MiB are the CUDA context" in between
    assert classes_of("digits") == 10 and classes_of("cifar100") == 100


def test_stops_are_logarithmic(explorer):
    steps = np.diff(np.log(explorer.stops))
    assert (explorer.stops[0], explorer.stops[-1]) == explorer.range()
    assert steps.max() < 1.001 * steps.min()


def test_cards_within_the_range_are_stops(explorer, monkeypatch):
    low, high = explorer.range()
    inside = (low + high) // 2
    monkeypatch.setattr(explorer_module, "CARDS_BYTES", (low - 1, inside, high + 1))
    assert inside in explorer.stops and explorer.stops[0] == low and explorer.stops[-1] == high


def test_the_table_agrees_with_plan(explorer):
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
    assert middle.recompute_pct == alone.recompute_pct
    # `plan` does not look at the first step, in which the optimizer has no state and less is recomputed.
    assert alone.peak_bytes <= middle.peak_bytes < 1.1 * alone.peak_bytes
    assert rows.recompute_pct.is_monotonic_decreasing and rows.recompute_pct.nunique() > 2
    assert (rows.within_budget == (rows.peak_bytes <= rows.budget_bytes)).all()


def test_rule_rows_are_the_forecast(tmp_path, monkeypatch):
    monkeypatch.setattr(explorer_module, "STOPS", 2)
    # All parameters train: state and gradients are large, and in micro-batches the latter add up.
    e = EXPERIMENT.variant(method="full", batch_size=2, micro_batch_size=1)
    explorer = Explorer(e, 10, tmp_path)
    rows = explorer.table(explorer.stops[-1])[:3]
    asked = [e.variant(checkpointing=row.strategy, budget=row.budget_bytes) for row in rows.itertuples()]
    found = forecast_module.forecasts(asked, {e.dataset: 10}, tmp_path / "forecasts")
    for row, expected in zip(rows.itertuples(), found):
        assert (row.peak_bytes, row.recompute_pct) == (expected.peak_bytes, expected.recompute_pct)
        assert (row.step_seconds, row.micro_batch_size) == (expected.step_seconds, 1)
        assert row.within_budget == expected.fits


def test_written_parameters_are_the_experiment(explorer, tmp_path):
    path = tmp_path / "a folder" / "$(chosen) <b>.yaml"
    command = shlex.split(explorer.write("2 MiB", path))
    assert command == ["papermill", str(NOTEBOOKS / "1_finetune.ipynb"), str(path.with_suffix(".ipynb")),
                       "-f", str(path)]  # fmt: skip
    parameters = read_yaml_file(str(path))  # as papermill does
    assert Experiment(**parameters) == EXPERIMENT.variant(budget="2 MiB", checkpointing="planned")
    assert set(parameters) <= set(papermill.inspect_notebook(command[1]))


def test_answers_are_kept(explorer, monkeypatch, tmp_path):
    between = explorer.table("1.1 MiB")
    monkeypatch.setattr(forecast_module, "step_of", lambda *_: pytest.fail("it was profiled again"))
    again = Explorer(replace(EXPERIMENT, budget="1GB", lr=0.1, seed=1), 10, explorer.folder)
    assert (again.range(), again.stops) == (explorer.range(), explorer.stops)
    pd.testing.assert_frame_equal(again.curve("1.1 MiB"), explorer.curve("1.1 MiB"))
    pd.testing.assert_frame_equal(again.table("1.1 MiB"), between)
    for stop in again.stops[::3]:
        pd.testing.assert_frame_equal(again.table(stop), explorer.table(stop))
        assert again.picture(stop) == explorer.picture(stop)
    assert "papermill" in again.write(again.stops[2], tmp_path / "x.yaml")


def test_questions_hold_everything_that_answers_depend_on(explorer, monkeypatch):
    asked = []

    def kept(folder, question, make):
        asked.append(question)
        return {"found": explorer.range()}

    monkeypatch.setattr(explorer_module, "kept", kept)
    monkeypatch.setattr(Explorer, "_answer", lambda *_: None)
    for changes in (
        {}, {"backbone": "demo_vit"}, {"method": "norm"}, {"batch_size": 5}, {"micro_batch_size": 2},
        {"precision": "bf16"}, {"checkpointing": "threshold", "tau": 0.6}, {"method": "lora"},
        {"method": "lora", "rank": 2},
    ):  # fmt: skip
        Explorer(EXPERIMENT.variant(**changes), 10)
    Explorer(EXPERIMENT, 11)
    monkeypatch.setattr(forecast_module, "code_sha256", lambda: "other code")
    Explorer(EXPERIMENT, 10)
    assert len({json.dumps(question, sort_keys=True) for question in asked}) == len(asked) == 11


def test_batch_sizes_are_peaks_of_such_steps(explorer, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer_module, "CARDS_BYTES", (10**6,))  # that 8 images pass: none larger is needed
    monkeypatch.setattr(explorer, "folder", tmp_path)
    frame = explorer.batch_sizes()
    peaks = frame.set_index(["strategy", "images"]).peak_bytes
    assert sorted(set(frame.images)) == [1, 8]
    static = planned_anew(1 << 40, "static", 8)
    assert (peaks["none", 8], peaks["static", 8]) == (static.unplanned_peak_bytes, static.peak_bytes)
    assert peaks["planned", 8] == planned_anew(peaks["planned", 8], "planned", 8, False).budget_bytes
    assert (peaks["planned"] < peaks["static"]).all() and (peaks["static"] < peaks["none"]).all()
    monkeypatch.setattr(Explorer, "_peaks", lambda *_: pytest.fail("it ran again"))
    pd.testing.assert_frame_equal(explorer.batch_sizes(), frame)


def test_batch_sizes_reach_beyond_the_largest_card(explorer, tmp_path, monkeypatch):
    def peaks(self, images, bar):
        return [
            (name, images, 10**6 * rank * images)
            for rank, name in ((3, "none"), (2, "static"), (1, "planned"))
        ]

    monkeypatch.setattr(Explorer, "_peaks", peaks)
    monkeypatch.setattr(explorer, "folder", tmp_path)
    frame = explorer.batch_sizes()
    assert sorted(set(frame.images)) == [1, 8, 8080]
    fits = explorer.images_that_fit()
    assert list(fits.columns) == ["2 GB", "4 GB", "6 GB", "8 GB"]
    assert list(fits["6 GB"]) == [2000, 3000, 6000]


def test_images_that_fit_are_interpolated_from_the_peaks(explorer, monkeypatch):
    peaks = [(1, 3.0e9), (11, 5.0e9), (20, 5.9e9), (60, 9.9e9)]
    frame = pd.DataFrame([("none", *row) for row in peaks], columns=["strategy", "images", "peak_bytes"])
    monkeypatch.setattr(Explorer, "batch_sizes", lambda self: frame)
    assert list(explorer.images_that_fit().loc["none"]) == [0, 6, 21, 41]


def test_static_twin_shows_the_same(explorer):
    stop = explorer.stops[5]
    picture = explorer.picture(stop)
    figure = plots.step_figure(picture, explorer.kinds)
    above, below = figure.axes
    line = above.get_lines()[0].get_ydata() * 2**20
    assert line.max() == max(picture.memory_bytes) == explorer.plan(stop).peak_bytes
    heights = [bar.get_height() for bar in below.containers[0]]
    assert np.allclose(heights, [block.kept_bytes / 2**20 for block in picture.blocks])
    assert "this plan" in above.get_legend_handles_labels()[1]
    plt.close(figure)


def test_long_steps_keep_their_peaks():
    values = np.random.default_rng(0).integers(0, 10**9, 4001)
    few = explorer_module._few(values)
    assert len(few) <= 1500 and max(few) == values.max() and few[0] == values[:2].max()


def test_fields_are_profiled_in_place(shown):
    slider, before = shown.slider, shown.picture.value
    shown.method.value, shown.batch_size.value, shown.num_classes.value = "linear", 2, 7
    shown.profiler.click()
    e = shown.explorer.experiment
    assert (e.method, e.batch_size, shown.explorer.num_classes) == ("linear", 2, 7)
    assert e.lr == replace(EXPERIMENT, method="linear", lr=0).lr
    assert shown.message.value == "" and not shown.profiler.disabled
    assert shown.slider is slider and [size for _, size in slider.options] == shown.explorer.stops
    assert shown.picture.value != before and "linear on small:vit_small" in shown.title.value
    slider.index = 3
    assert shown.budget_bytes == shown.explorer.stops[3]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("backbone", "<b>vit</b>", "unknown backbone"),
        ("precision", "fp16", "fp16"),
        ("backbone", "", "unknown"),
    ],
)
def test_profiling_errors_are_shown_as_text(shown, field, value, said):
    explorer, before = shown.explorer, shown.picture.value
    getattr(shown, field).value = value
    shown.profiler.click()
    assert said in shown.message.value and "<" not in shown.message.value
    assert shown.explorer is explorer and shown.picture.value == before and not shown.profiler.disabled


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
    assert plt.get_fignums() == open_figures


def test_button_writes_what_is_shown(shown):
    shown.slider.value = shown.explorer.stops[3]
    shown.button.click()
    assert read_yaml_file(str(shown.path))["budget"] == shown.explorer.stops[3]
    assert "papermill" in shown.message.value


@pytest.mark.parametrize("budget", ["1 KiB", "<script>alert(1)</script>"])
def test_bad_budgets_are_shown_as_text(shown, budget):
    before = shown.picture.value
    shown.update(budget)
    assert shown.message.value and "<" not in shown.message.value
    assert shown.picture.value == before
    shown.update("2 MiB")
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
    assert shown.reaction_seconds(20) >= 0
    assert len(seen) >= 20 and all(one != other for one, other in itertools.pairwise(seen))
    assert shown.slider.index == start


def test_without_a_number_of_classes_it_is_that_of_the_data_set():
    assert Explorer(EXPERIMENT, 0).num_classes == 10
