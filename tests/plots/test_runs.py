"""Figures of runs hold the figures of their frames, and the front is the Pareto front."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from scipy.spatial.distance import pdist

from toolkit import analysis, plots
from toolkit.budget import STRATEGIES
from toolkit.methods import METHODS
from toolkit.plots.runs import front_of
from toolkit.plots.style import PALETTE, method_look

MIB = 2**20


def row(method: str, score: float, mib: float, mflop: float = 1.0, **more) -> dict:
    known = {
        "dataset": "digits",
        "environment": "E1",
        "backbone": "demo_vit",
        "checkpointing": "none",
        "n": 3,
    }
    figures = {"score_pct": score, "score_pct_half_width": 1.0, "peak_bytes": mib * MIB}
    return known | {"method": method, "variant": "", "flops_per_step": mflop * 1e6} | figures | more


FRAME = pd.DataFrame(
    [
        row("full", 93, 20, 300),
        row("linear", 60, 4, 50),
        row("ia3", 58, 6, 90),
        row("lora", 80, 10, 200, variant="rank 8", rank=8),
        row("lora", 75, 9, 190, variant="rank 2", rank=2),
        row("lora", 85, 12, 210, variant="rank 32", rank=32, score_pct_half_width=np.nan),
        row("zero_shot", 50, 2, np.nan, backbone="clip"),
    ]
)  # fmt: skip


def points(axes) -> list[tuple[str, float, float]]:
    """Label, x and y of every point."""
    return [(bars.get_label(), *bars.lines[0].get_xydata()[0]) for bars in axes.containers]


def test_scores_are_drawn_over_each_cost_with_the_front():
    memory, flops = plots.accuracy_against(FRAME, "memory", "flops_per_step").axes
    assert ("full", 20, 93) in points(memory) and ("full", 300, 93) in points(flops)
    assert ("clip zero_shot", 2, 50) in points(memory) and len(points(flops)) == len(FRAME) - 1
    named = [text.get_text() for text in memory.texts]
    assert named == ["zero_shot", "linear", "lora (rank 2)", "lora (rank 8)", "lora (rank 32)", "full"]
    assert memory.get_xlabel() == "peak memory (MiB)" and memory.get_ylabel() == "test score (%)"


def test_strategies_have_markers_and_methods_colours():
    frame = pd.DataFrame([row("lora", 80, 10 + n, checkpointing=name) for n, name in enumerate(STRATEGIES)])
    (axes,) = plots.accuracy_against(frame, "memory").axes
    drawn = [bars.lines[0] for bars in axes.containers]
    assert [line.get_marker() for line in drawn] == [strategy.marker for strategy in STRATEGIES.values()]
    assert {(line.get_color(), line.get_fillstyle()) for line in drawn} == {(*method_look("lora").values(),)}
    assert len({(*method_look(method).values(),) for method in METHODS}) == len(METHODS)


# Machado et al. 2009, severity 1: linear RGB as seen without the cones for red, or for green
SEEN = {
    "all cones": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
}
XYZ = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]  # of linear sRGB


def smallest_difference(colours, seen) -> float:
    """The smallest distance in CIE Lab of any two colours; 2.3 can just be seen side by side."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = (np.clip(linear @ np.transpose(seen), 0, 1) @ np.transpose(XYZ) / np.sum(XYZ, axis=1)).T
    f = [np.where(v > 216 / 24389, np.cbrt(v), (24389 / 27 * v + 16) / 116) for v in (x, y, z)]
    lab = np.transpose([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    return pdist(lab).min()


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_colours_differ_for_eyes_without_red_or_green(seen):
    assert smallest_difference(PALETTE, seen) > 15
    assert smallest_difference(["#ffffff", "#000000"], seen) == pytest.approx(100, abs=0.5)
    if seen is not SEEN["all cones"]:
        assert smallest_difference(matplotlib.color_sequences["tab10"], seen) < 15


def test_the_budget_is_drawn_if_it_is_near_and_the_same_for_all():
    def budget_lines(frame) -> list[float]:
        (axes,) = plots.accuracy_against(frame, "memory").axes
        return [line.get_xdata()[0] for line in axes.lines if line.get_label() == "budget"]

    assert budget_lines(FRAME.assign(budget_bytes=18 * MIB)) == [18]
    assert budget_lines(FRAME.assign(budget_bytes=2**40)) == []
    assert budget_lines(FRAME.assign(budget_bytes=range(len(FRAME)))) == []


def test_every_data_set_and_environment_has_panels_of_its_own():
    frame = pd.concat(
        [FRAME, FRAME.assign(dataset="a $b$"), FRAME.assign(environment="E2")], ignore_index=True
    )
    figure = plots.accuracy_against(frame, "memory")
    figure.canvas.draw()
    assert [axes.get_title() for axes in figure.axes] == ["digits, E1", r"a \$b\$, E1", "digits, E2"]


def test_nothing_to_draw_is_said():
    figure = plots.accuracy_against(pd.DataFrame(), "memory")
    assert figure.axes[0].texts[0].get_text().startswith("no ")


number = st.one_of(st.none(), st.integers(0, 4))


@settings(max_examples=60)
@given(st.lists(st.tuples(number, number), max_size=12))
def test_front_is_its_definition(rows):
    frame = pd.DataFrame(rows, columns=["score_pct", "peak_bytes"], dtype=float)
    known = [(a, c) for a, c in rows if a is not None and c is not None]
    expected = [
        (a, c) in known and not any(b >= a and d <= c and (b > a or d < c) for b, d in known) for a, c in rows
    ]
    assert list(front_of(frame, "peak_bytes")) == expected


def test_costs_are_shares_of_full_fine_tuning_in_stock_torch():
    rows = [("full", 1, 100, 120), ("lora", 1, 50, 90), ("full", 16, 400, 480), ("lora", 16, 300, 240)]
    stock = pd.DataFrame(rows, columns=["method", "batch_size", "peak_bytes", "published_bytes"])
    stock["backbone"] = "resnet18"
    panels = plots.costs_by_batch(stock, stock.assign(peak_bytes=stock.peak_bytes // 2)).axes
    lora = [axes.lines[1] for axes in panels]
    assert [list(line.get_ydata()) for line in lora] == [[75, 50], [50, 75], [25, 37.5]]
    assert lora[0].get_xdata().tolist() == [1, 16]


HISTORY = [{"epoch": n, "train_loss": 3.0 - n, "val_loss": 1.0, "val_miou_pct": 20.0 * n} for n in (1, 2)]


@pytest.mark.parametrize("histories", [HISTORY, {"e3va": HISTORY, "full": []}])
def test_learning_curves_of_one_run_and_of_several(histories):
    left, right = plots.learning_curves(histories).axes
    assert [list(line.get_ydata()) for line in left.lines if len(line.get_ydata())] == [[2, 1], [1, 1]]
    assert [list(line.get_ydata()) for line in right.lines if len(line.get_ydata())] == [[20, 40]]
    assert (left.get_title(), right.get_title()) == ("loss", "mean IoU (%)")


def test_scores_are_those_of_the_data_sets_task():
    runs = [
        {"dataset": "mosaics", "method": "e3va", "seed": seed, "test_miou_pct": 40.0 + seed}
        for seed in (0, 2)
    ]
    runs.append({"dataset": "digit_scenes", "method": "linear", "seed": 0, "test_map_pct": 7.0})
    common = {"backbone": "demo_swin", "checkpointing": "none", "status": "ok", "phase": "training"}
    records = pd.DataFrame([common | {"train_peak_bytes": 4 * MIB} | run for run in runs])
    axes = {axes.get_title(): axes for axes in plots.accuracy_against(analysis.means(records), "memory").axes}
    assert points(axes["mosaics"]) == [("e3va", 4, 41)]
    assert points(axes["digit_scenes"]) == [("linear", 4, 7)]
    assert axes["digit_scenes"].get_ylabel() == "test box mAP (%)"
