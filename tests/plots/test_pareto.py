"""The front against its definition, and the picture: whole, told without colour, and text only as text."""

import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import InputError
from toolkit.plots.pareto import front, printable, svg

SVG = "{http://www.w3.org/2000/svg}"


def runs(**columns) -> pd.DataFrame:
    """Four fine-tuned runs, the third dominated by the second, and a baseline."""
    frame = pd.DataFrame(
        {
            "phase": ["training"] * 4 + ["inference"], "status": "ok", "dataset": "digits",
            "backbone": ["demo_vit"] * 4 + ["clip"],
            "method": ["linear", "lora", "lora", "full", "zero_shot"],
            "checkpointing": ["none", "planned", "none", "static", "none"], "seed": 3, "budget": "20971520",
            "test_top1_pct": [90.0, 95.0, 94.0, 97.0, 70.0],
            "train_peak_bytes": [5 * 2**20, 10 * 2**20, 12 * 2**20, 24 * 2**20, None],
            "train_seconds": [10.0, 40.0, 30.0, 60.0, None], "prepare_seconds": [None] * 4 + [1.0],
            "prepare_peak_bytes": [None] * 4 + [2**20], "test_peak_bytes": [2**20] * 4 + [2 * 2**20],
            "train_energy_joules": [50.0, None, 70.0, 90.0, None], "energy_source": "nvml_counter",
        }
    )  # fmt: skip
    return frame.assign(**columns)


def points(text: str) -> dict[str, ElementTree.Element]:
    """Tooltip -> its point."""
    return {g.find(f"{SVG}title").text: g for g in ElementTree.fromstring(text).iter(f"{SVG}g")}


def legend(text: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(text).findall(f"{SVG}text")]


def test_front_of_each_cost():
    frame = runs().set_axis([7, 7, 3, 1, 0])  # any index
    memory = front(frame, "memory")
    assert memory.dtype == bool
    assert list(memory.index) == [7, 7, 3, 1, 0] and list(memory) == [True, True, False, True, True]
    assert list(front(frame, "time")) == [True, True, True, True, True]
    assert list(front(frame, "energy")) == [True, False, True, True, False]  # two were not measured


figure = st.one_of(st.none(), st.integers(0, 4))


@settings(max_examples=60)
@given(st.lists(st.tuples(figure, figure, st.sampled_from(["digits", "textures"])), max_size=12))
def test_front_is_its_definition(rows):
    frame = pd.DataFrame(rows, columns=["test_top1_pct", "train_peak_bytes", "dataset"])
    expected = [
        a is not None
        and c is not None
        and not any(
            (b >= a and d <= c) and (b > a or d < c)
            for b, d, other in rows
            if other == data and b is not None and d is not None
        )
        for a, c, data in rows
    ]
    assert list(front(frame, "memory")) == expected


def test_simulated_energy_is_none():
    frame = runs(energy_source=["fake", "nvml_counter", "fake", "fake", "none"])
    assert not front(frame, "energy").any()
    assert "5 of 5 runs are not shown" in svg(frame, "energy")


def test_unknown_cost_names_the_costs():
    for function in (front, svg):
        with pytest.raises(InputError, match=r"unknown cost 'speed'.*memory, time, energy"):
            function(runs(), "speed")


def test_tooltips_tell_the_run():
    tips = points(svg(runs(), "memory"))
    assert len(tips) == 5
    assert (
        "lora on demo_vit, digits\ncheckpointing planned, budget 20.0 MiB, seed 3\n"
        "accuracy 95.00 %, peak memory 10.0 MiB\non the Pareto front"
    ) in tips
    (dominated,) = (tip for tip in tips if "94.00 %" in tip)
    assert "Pareto" not in dominated
    assert any("95.00 %, time to adapt 40.0 s" in tip for tip in points(svg(runs(), "time")))


def test_points_are_told_apart_without_colour():
    """By the number of the method and the shape of the strategy; a baseline has its own."""
    seen = {
        (point.find(f"{SVG}text").text, point.find(f"{SVG}path").get("d"))
        for point in points(svg(runs(), "memory")).values()
    }
    assert len(seen) == 5
    lora = [point for tip, point in points(svg(runs(), "memory")).items() if tip.startswith("lora")]
    assert len({point.find(f"{SVG}text").text for point in lora}) == 1
    shown = legend(svg(runs(), "memory"))
    assert {"linear", "lora", "full", "clip zero_shot", "planned", "baseline", "Pareto front"} <= set(shown)


def test_a_method_keeps_its_number_and_colour():
    """Whatever else is in the picture."""

    def symbols(frame):
        return {
            tip.split()[0]: (point.find(f"{SVG}text").text, point.find(f"{SVG}path").get("stroke"))
            for tip, point in points(svg(frame, "memory")).items()
        }

    together = symbols(runs())
    assert len(together) == len({colour for _, colour in together.values()}) == 4
    assert symbols(runs()[3:4]) == {"full": together["full"]}


def test_places_follow_the_figures():
    """Higher accuracy is higher up, more cost further to the right."""
    places = {}
    for tip, point in points(svg(runs(), "memory")).items():
        x, y = point.get("transform").removeprefix("translate(").removesuffix(")").split()
        accuracy, cost = re.search(r"accuracy (\S+) %, peak memory (\S+) MiB", tip).groups()
        places[float(accuracy), float(cost)] = float(x), -float(y)
    accuracy, cost = np.transpose(list(places))
    x, up = np.transpose(list(places.values()))
    assert list(np.argsort(x)) == list(np.argsort(cost)) and list(np.argsort(up)) == list(
        np.argsort(accuracy)
    )


def test_points_at_one_place_share_their_tooltip():
    """Strategies with the same accuracy and peak: the upper symbol hides the lower."""
    frame = pd.concat([runs()[:1]] * 2).assign(checkpointing=["none", "static"])
    (tip,) = points(svg(frame, "memory"))
    assert "checkpointing none" in tip and "checkpointing static" in tip


def test_budget_line_only_where_there_is_one_budget():
    assert "budget 20.0 MiB" in legend(svg(runs(), "memory"))
    for frame, cost in (
        (runs(), "time"),
        (runs(budget=["1", "2", "3", "4", "5"]), "memory"),
        (runs(budget=str(2**40)), "memory"),  # far outside
        (runs().drop(columns="budget"), "memory"),
    ):
        assert not any(line.startswith("budget") for line in legend(svg(frame, cost)))


def test_a_front_for_each_data_set():
    frame = runs(dataset=["digits", "digits", "textures", "textures", "digits"])
    fronts = [line for line in legend(svg(frame, "memory")) if line.startswith("Pareto")]
    assert fronts == ["Pareto front, digits", "Pareto front, textures"]
    twins = runs(test_sha256=["a", "a", "b", "b", "a"])  # one name, two data sets
    fronts = [line for line in legend(svg(twins, "memory")) if line.startswith("Pareto")]
    assert fronts == ["Pareto front, digits (data 0)", "Pareto front, digits (data 1)"]


@pytest.mark.parametrize("frame", [pd.DataFrame(), runs()[:0], runs(test_top1_pct=None)])
def test_nothing_to_show_is_said(frame):
    text = svg(frame, "memory")
    assert f"{len(frame)} of {len(frame)} runs are not shown" in text and not points(text)
    assert not front(frame, "memory").any()


def test_text_is_text_and_the_picture_stands_alone():
    count = len(HOSTILE)
    frame = pd.concat([runs()[1:2]] * count).assign(
        method=HOSTILE, backbone=HOSTILE, dataset=HOSTILE, checkpointing=HOSTILE, seed=HOSTILE,
        test_top1_pct=np.arange(count),
    )  # fmt: skip
    frame["budget"] = HOSTILE[0]
    text = svg(frame, "memory")
    assert len(points(text)) == count
    tags = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(text).iter()}
    assert tags == {"svg", "rect", "path", "text", "g", "title"}
    attributes = {name for element in ElementTree.fromstring(text).iter() for name in element.attrib}
    assert not any(name == "id" or name.startswith("on") or "href" in name for name in attributes)
    named = {tip.partition(", budget")[0] for tip in points(text)}
    assert named == {printable(f"{t} on {t}, {t}\ncheckpointing {t}").replace("\r\n", "\n") for t in HOSTILE}
    assert text.encode()


def test_same_runs_same_bytes():
    assert svg(runs(), "memory") == svg(runs(), "memory")
