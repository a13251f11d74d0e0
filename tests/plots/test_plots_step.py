"""Figures of steps hold what they were given."""

import matplotlib
import numpy as np
import pandas as pd

from toolkit import plots
from toolkit.forecast.explorer import BlockUse, StepPicture
from toolkit.plots import step
from toolkit.plots.step import StepFigure

MIB = 2**20


def trace(*phases) -> list[dict]:
    return [{"phase": phase, "block": None, "bytes": [mib * MIB for mib in mibs]} for phase, mibs in phases]


def test_figures_leave_the_theme_of_the_user_alone():
    before = dict(matplotlib.rcParams)
    figure = plots.memory_over_step(trace(("forward", [1, 2])))
    assert matplotlib.rcParams == before
    assert figure.axes[0].lines[0].get_color() != before["axes.prop_cycle"].by_key()["color"][0]


def test_phases_of_several_steps_are_aligned():
    traces = {
        "lora": trace(("forward", [1, 2, 3]), ("forward", [4]), ("recompute", [6]), ("backward", [5, 1])),
        "losa": trace(("forward", [1, 2]), ("backward", [2, 1]), ("optimizer", [1])),
    }
    (axes,) = plots.memory_over_step(traces).axes
    lora, losa = axes.lines[:2]
    assert list(lora.get_ydata()) == [1, 2, 3, 4, 6, 5, 1]
    assert np.allclose(lora.get_xdata(), [0, 1 / 3, 2 / 3, 1, 1, 1.5, 2])
    assert np.allclose(losa.get_xdata(), [0, 1, 1, 2, 2])
    assert lora.get_label() == "lora, peak 6"


def test_one_step_has_its_budget_and_peak():
    (axes,) = plots.memory_over_step(trace(("forward", [1, 2])), 4 * MIB, 3 * MIB).axes
    levels = {line.get_label(): line.get_ydata()[0] for line in axes.lines[1:3]}
    assert levels == {"budget": 4, "peak of all steps": 3}


def test_a_budget_far_above_the_memory_is_named_at_the_edge():
    (axes,) = plots.memory_over_step(trace(("forward", [1, 2])), 2**40).axes
    assert axes.get_ylim()[1] < 3 and "budget 1,024.00 GiB" in axes.texts[0].get_text()


def picture(budget: int, kept: int) -> StepPicture:
    blocks = (
        BlockUse("blocks.0", "keep", kept * MIB, 0.0, 1),
        BlockUse("blocks.1", "recompute", MIB, 50.0, 2),
    )
    memory = [MIB, (kept + 2) * MIB, MIB]
    return StepPicture(budget * MIB, MIB, memory, [2 * size for size in memory], list(blocks))


def test_a_step_figure_shows_one_picture_after_the_other():
    figure = StepFigure(matplotlib.figure.Figure(layout="constrained"), picture(8, 3), ["keep", "recompute"])
    above, below = figure.figure.axes
    first = figure.png(picture(8, 3))
    assert above.lines[0].get_ydata().max() == 5 and above.lines[1].get_ydata()[0] == 8
    assert [bar.get_height() for bar in below.patches] == [3, 1]
    assert [text.get_text() for text in below.texts] == ["", "50 %\n2 slices"]
    assert figure.png(picture(400, 6)) != first and first.startswith(b"\x89PNG")
    assert not above.lines[1].get_visible(), "a budget that is far away would dwarf the memory"
    assert figure.png(picture(8, 3)) == figure.png(picture(8, 3))


def test_module_names_in_pictures_are_short_and_text():
    assert step._short(["a.blocks.0", "a.blocks.1"]) == ["0", "1"]
    assert step._short(["s.1.blocks.0", "s.2.blocks.0"]) == ["1.blocks.0", "2.blocks.0"]
    assert step._short(["$x$"]) == [r"\$x\$"]


def test_a_broken_budget_has_a_cross():
    rows = [("none", 4, 10, 0), ("threshold", 4, 6, 50), ("planned", 4, 4, 30), ("planned", 8, 8, 10)]
    frame = pd.DataFrame(rows, columns=["strategy", "budget_bytes", "peak_bytes", "recompute_pct"])
    frame[["budget_bytes", "peak_bytes"]] *= MIB
    axes = plots.recompute_against_budget(frame).axes[0]
    points = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert points["planned"] == [[4, 30], [8, 10]] and points["threshold"] == [[6, 50]]
    assert points["its budget, broken"] == [[4, 50]]
    assert [x for x, _ in points["budget"]] == [4, 4]
    frame.loc[frame.strategy != "planned", "budget_bytes"] = 2**40
    axes = plots.recompute_against_budget(frame).axes[0]
    assert "budget" not in [line.get_label() for line in axes.lines] and axes.get_xlim()[1] < 12
    assert "1,024.00 GiB" in axes.texts[0].get_text()
