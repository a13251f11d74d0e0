"""What `edge_cnn.ipynb` shows: pictures that hold the figures they are made of, sliders, and the presets."""

import numpy as np
import pandas as pd
import pytest
from hostile import HOSTILE
from matplotlib import pyplot as plt

from toolkit.batch.sweep_file import check_count, preset
from toolkit.errors import InputError
from toolkit.methods import DENSE_METHODS, METHODS, SIDE_METHODS
from toolkit.plots import edge as plots_edge
from toolkit.widgets.edge import MethodChooser

MIB = 2**20


def row(method: str, accuracy: float, mib: float, mflop: float, **more) -> dict:
    known = {"dataset": "digits-c:mixed:5", "backbone": "demo_cnn_digits", "variant": "", "n": 3}
    known |= {"half_width": 1.0, "lora_rank": 8, "galore_rank": 32, "galore_gap": 50, "batch_size": 64}
    figures = {"accuracy_pct": accuracy, "peak_bytes": mib * MIB, "flops_per_step": mflop * 1e6}
    return known | {"method": method, "optimizer_flops_per_step": 1e6} | figures | more


FRAME = pd.DataFrame(
    [
        row("full", 93, 20, 300),
        row("linear", 60, 4, 50),
        row("ia3", 58, 6, 90),
        row("lora", 80, 10, 200, variant="rank 8"),
        row("lora", 75, 9, 190, variant="rank 2", lora_rank=2),
        row("lora", 85, 12, 210, variant="rank 32", lora_rank=32),
        row("lora", 99, 30, 999, variant="rank 16, batch 16", lora_rank=16, batch_size=16),
        row("galore", 88, 18, 310, variant="gap 50"),
        row("galore", 89, 18, 900, variant="gap 5", galore_gap=5, half_width=np.nan),
    ]
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def points(axes) -> dict[str, np.ndarray]:
    """Name in the legend -> x and y of the markers with intervals."""
    return {bars.get_label(): bars.lines[0].get_xydata() for bars in axes.containers}


def test_accuracy_is_drawn_over_both_costs_with_the_front():
    figure = plots_edge.accuracy_against_costs(FRAME)
    memory, flops = figure.axes
    assert points(memory)["full"].tolist() == [[20, 93]] and points(flops)["full"].tolist() == [[300, 93]]
    assert points(memory)["galore"].tolist() == [[18, 88], [18, 89]]
    on_front = [text.get_text() for text in memory.texts]
    assert on_front == [
        "linear", "lora (rank 2)", "lora (rank 8)", "lora (rank 32)", "galore (gap 5)", "full",
        "lora (rank 16, batch 16)",
    ]  # fmt: skip


def test_rows_without_a_cost_are_counted():
    figure = plots_edge.accuracy_against_costs(FRAME.assign(flops_per_step=np.nan))
    assert [axes.get_title() for axes in figure.axes] == ["", "9 rows without figures"]


def test_a_curve_is_of_rows_that_differ_in_nothing_else():
    assert list(plots_edge.curve(FRAME, "lora", "lora_rank").lora_rank) == [2, 8, 32]
    assert list(plots_edge.curve(FRAME, "galore", "galore_gap").accuracy_pct) == [89, 88]
    assert plots_edge.curve(FRAME, "full", "lora_rank").empty
    assert plots_edge.curve(FRAME, "galore", "no_column").empty


def test_curves_have_full_fine_tuning_beside_them():
    drawn = plots_edge.curves(FRAME)
    (axes,) = drawn["edge_rank"].axes
    names = axes.get_legend_handles_labels()[1]
    assert sorted(names) == ["full", "lora"]
    left, right = drawn["edge_gap"].axes
    assert "galore" in left.get_legend_handles_labels()[1]
    assert sorted(right.get_legend_handles_labels()[1]) == ["forward and backward", "full", "optimizer"]
    assert plots_edge.curves(FRAME[FRAME.method == "linear"]) == {}


def test_every_backbone_has_ranks_of_its_own():
    other = FRAME.assign(backbone="resnet18", accuracy_pct=FRAME.accuracy_pct - 30)
    one, two = plots_edge.rank_curves(pd.concat([FRAME, other], ignore_index=True)).axes
    assert (one.get_title(), two.get_title()) == ("demo_cnn_digits", "resnet18")
    assert points(two)["lora"][:, 1].tolist() == [45, 50, 55]
    (full,) = (line for line in two.lines if line.get_label() == "full")
    assert set(full.get_ydata()) == {63}


def test_costs_are_shares_of_full_fine_tuning_in_stock_torch():
    rows = [("full", 1, 100, 120), ("lora", 1, 50, 90), ("full", 16, 400, 480), ("lora", 16, 300, 240)]
    stock = pd.DataFrame(rows, columns=["method", "batch_size", "peak_bytes", "published_bytes"])
    stock["backbone"] = "resnet18"
    lean = stock.assign(peak_bytes=stock.peak_bytes // 2)
    panels = plots_edge.costs_by_batch(stock, lean).axes
    lora = [next(line for line in axes.lines if line.get_label() == "lora") for axes in panels]
    assert [line.get_ydata().tolist() for line in lora] == [[75, 50], [50, 75], [25, 37.5]]
    assert lora[0].get_xdata().tolist() == [1, 16]


@pytest.mark.parametrize("name", ["$\\bad$", "<b>"])
def test_names_in_pictures_are_text(name):
    frame = pd.concat([FRAME, pd.DataFrame([row(name, 95, 3, 3, variant=name)])], ignore_index=True)
    plots_edge.accuracy_against_costs(frame).canvas.draw()


def test_every_method_has_a_look_of_its_own():
    looks = {(str(look["color"]), look["marker"]) for look in map(plots_edge._style, METHODS)}
    markers = {marker for _, marker in looks}
    assert len(looks) == len(markers) == len(METHODS)


def test_moving_the_sliders_changes_the_answer():
    chooser = MethodChooser(FRAME[FRAME.batch_size == 64])
    assert "full: 93.0 ± 1.0 %" in chooser.answer.value  # the highest limits first
    chooser.memory.value = 10 * MIB
    assert "lora (rank 8): 80.0" in chooser.answer.value and "do not fit" in chooser.answer.value
    chooser.flops.value = 50e6
    assert "linear: 60.0" in chooser.answer.value
    chooser.memory.index = 0
    assert "nothing fits" in chooser.answer.value and "linear" in chooser.answer.value
    assert chooser.table.value.count("<tr") == 1 + 8


def test_another_data_set_brings_its_own_stops():
    other = pd.DataFrame([row("norm", 70, 7, 70, dataset="textures-c:mixed:5")])
    chooser = MethodChooser(pd.concat([FRAME, other], ignore_index=True))
    chooser.dataset.value = "textures-c:mixed:5"
    assert [label for label, _ in chooser.memory.options] == ["below 7.0 MiB", "7.0 MiB"]
    assert "norm: 70.0" in chooser.answer.value and chooser.table.value.count("<tr") == 2


def test_a_chooser_needs_a_row_with_all_figures():
    with pytest.raises(InputError, match="nothing to choose from"):
        MethodChooser(FRAME.assign(peak_bytes=np.nan))
    with pytest.raises(InputError, match="nothing to choose from"):
        MethodChooser(FRAME[:0])


@pytest.mark.parametrize("text", HOSTILE)
def test_names_of_others_stay_text(text):
    chooser = MethodChooser(pd.DataFrame([row("lora", 80, 10, 200, dataset=text, variant=text)]))
    shown = chooser.answer.value + chooser.table.value
    assert text not in shown or not set(text) & set("<>\x00\x1b\u202e")


def test_the_preset_runs_every_method_that_convolutions_allow():
    runs = preset("edge")
    methods = {run.method for run in runs if run.dataset == "digits-c:mixed:5"}
    assert methods == set(METHODS) - {"qlora", *SIDE_METHODS, *DENSE_METHODS}
    assert {run.seed for run in runs} == {0, 1, 2} and len(runs) == len(set(runs)) <= 140
    ranks = {run.lora_rank for run in runs if run.method == "lora" and run.batch_size == 64}
    assert ranks == {1, 4, 8, 16, 64}
    galore = [run for run in runs if run.method == "galore" and run.batch_size == 64]
    assert {run.galore_rank for run in galore} == {1, 4, 16, 32, 64}
    assert {run.galore_gap for run in galore if run.galore_rank == 32} == {1, 5, 20, 50}


def test_the_papers_preset_needs_no_leave():
    runs = preset("edge_paper")
    check_count(runs)
    assert {run.backbone for run in runs} == {
        "resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"
    }  # fmt: skip
