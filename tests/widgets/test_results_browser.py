"""The results browser without a browser: widgets are set as a person sets them, and records may be bad."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hostile import HOSTILE
from matplotlib import pyplot as plt

from toolkit.errors import InputError
from toolkit.plots.pareto import printable
from toolkit.training.record import SCHEMA_VERSION
from toolkit.widgets.results import FILTERS, HINT, NO_RUNS, ResultsBrowser, over_seeds, read, table

METHODS = {"linear": 90.0, "lora": 95.0, "full": 97.0}
CHANCE = [0.0, 0.4, -0.4]  # of the seeds, the same for all methods
EXTRA = {"linear": [0.0, 0.0, 0.0], "lora": [0.1, 0.0, -0.1], "full": [0.2, 0.3, 0.1]}  # and their own


def record(method: str = "lora", seed: int = 0, **changes: dict) -> dict:
    accuracy = METHODS.get(method, 50.0) + CHANCE[seed] + EXTRA.get(method, [0, 0, 0])[seed]
    whole = {
        "run": {"schema_version": SCHEMA_VERSION, "experiment_id": f"{method}{seed}", "status": "ok",
                "error": None, "phase": "training"},
        "config": {"dataset": "digits", "backbone": "demo_vit", "method": method, "checkpointing": "none",
                   "budget": "20971520", "seed": seed, "epochs": 2, "lr": 0.001 * len(method)},
        "data": {"train_sha256": "a", "test_sha256": "b"},
        "quality": {"test_top1_pct": accuracy, "params_trainable": 10},
        "time": {"train_seconds": 10.0 + seed},
        "energy": {"train_energy_joules": None, "energy_source": "none"},
        "memory": {"train_peak_bytes": len(method) * 2**20, "within_budget": True,
                   "memory_source": "tracked_tensors", "budget_mode": "simulated"},
        "flops": {}, "scores": {}, "env": {"env_hash": "e", "alloc_conf": None}, "packages": {},
        "curves": {
            "history": [{"epoch": epoch, "train_loss": 1.0, "val_loss": 1.2, "train_top1_pct": 50.0,
                         "val_top1_pct": 40.0} for epoch in (1, 2)],
            "memory_trace_bytes": [{"phase": "forward", "block": "0", "bytes": [1, 2**20]}],
        },
        "missing": {"train_energy_joules": "the CPU has no energy counter"},
    }  # fmt: skip
    for group, values in changes.items():
        whole[group] = whole[group] | values
    return whole


def write(folder, *records):
    for number, one in enumerate(records):
        (folder / f"run-{number:02d}").mkdir(parents=True)
        (folder / f"run-{number:02d}" / "record.json").write_text(json.dumps(one))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three methods with three seeds each; `full` ran out of memory in seed 2, and there is a baseline."""
    runs = [record(method, seed) for method in METHODS for seed in range(3)]
    runs[-1] = record(
        "full", 2, quality={"test_top1_pct": None}, run={"status": "oom", "error": "no room <b>"}
    )
    baseline = record(
        "zero_shot", 0, run={"phase": "inference"}, curves={"history": [], "memory_trace_bytes": []}
    )
    baseline["time"] = {"prepare_seconds": 1.0}
    baseline["memory"] |= {"prepare_peak_bytes": 2**20, "test_peak_bytes": 2**19, "train_peak_bytes": None}
    return write(tmp_path_factory.mktemp("runs"), *runs, baseline)


@pytest.fixture
def browser(folder):
    return ResultsBrowser(folder)


def listed(browser) -> list[str]:
    """Methods of the list, from the top."""
    return [browser.records.method[row] for _, row in browser.runs.options]


def tags(page: str) -> set[str]:
    """Names of the elements of `page`, as a browser would read it."""
    found = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.add(tag)
    parser.feed(page)
    return found


def row_of(browser, method: str, seed: int = 0) -> int:
    records = browser.records
    return int(records.index[(records.method == method) & (records.seed == seed)][0])


def choose(browser, *runs: tuple[str, int]) -> None:
    browser.runs.value = [row_of(browser, *run) for run in runs]


def plain(text: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", text).split())


def test_all_runs_at_first_the_most_accurate_on_top(browser):
    assert browser.count.value == "10 of 10 runs"
    shown = browser.records.test_top1_pct[[row for _, row in browser.runs.options]]
    assert shown.dropna().is_monotonic_decreasing and pd.isna(shown.iloc[-1])
    assert browser.message.value == HINT and "<svg" in browser.front.value


def test_filters_narrow_list_and_picture(browser):
    browser.filters["method"].value = ("lora", "full")
    assert set(listed(browser)) == {"lora", "full"} and browser.count.value == "6 of 10 runs"
    assert "linear" not in browser.front.value and "lora on demo_vit" in browser.front.value
    browser.filters["status"].value = ("oom",)
    assert listed(browser) == ["full"]
    browser.filters["phase"].value = ("inference",)
    assert listed(browser) == [] and "0 of 0 runs are not shown" in browser.front.value
    for widget in browser.filters.values():
        widget.value = ()
    assert browser.count.value == "10 of 10 runs"


def test_any_column_sorts_both_ways_and_is_in_the_list(browser):
    for _, column in browser.sort.options:
        browser.sort.value = column
        assert len(browser.runs.options) == 10 and browser.count.value == "10 of 10 runs"
    browser.sort.value = "train_peak_bytes"
    browser.order.value = "ascending"
    peaks = browser.records.train_peak_bytes[[row for _, row in browser.runs.options]]
    assert peaks.dropna().is_monotonic_increasing and pd.isna(peaks.iloc[-1])
    browser.sort.value = "experiment_id"
    assert "experiment_id" in browser.heads.value and "full0" in browser.runs.options[0][0]
    assert listed(browser) == sorted(listed(browser))


def test_rows_of_the_list_are_aligned_under_their_heads(browser):
    lengths = {len(label) for label, _ in browser.runs.options} | {len(browser.heads.value)}
    assert len(lengths) == 1


def test_one_run_shows_curves_and_figures_with_reasons(browser):
    open_figures = plt.get_fignums()
    choose(browser, ("lora", 0))
    assert browser.message.value == "" and browser.tabs.selected_index == 1
    for picture in (browser.curves, browser.memory):
        assert bytes(picture.value).startswith(b"\x89PNG") and picture.layout.display is None
    text = plain(browser.details.value)
    assert "test_top1_pct 95.10" in text and "train_energy_joules – the CPU has no energy counter" in text
    before = browser.memory.value
    choose(browser, ("linear", 1))
    assert browser.memory.value != before
    assert plt.get_fignums() == open_figures
    browser.runs.value = ()
    assert browser.message.value == HINT and browser.curves.layout.display == "none"


def test_missing_curves_have_a_reason(browser):
    choose(browser, ("zero_shot", 0))
    assert browser.curves.layout.display == browser.memory.layout.display == "none"
    text = plain(browser.details.value)
    assert "No loss and accuracy by epoch: a baseline does not train." in text and "No memory" in text
    choose(browser, ("full", 2))
    assert "oom: no room &lt;b&gt;" in browser.details.value


def test_what_was_chosen_stays_while_the_filters_let_it(browser):
    choose(browser, ("lora", 0))
    details = browser.details.value
    browser.filters["method"].value = ("lora",)
    browser.order.value = "ascending"
    assert browser.runs.value == (row_of(browser, "lora"),) and browser.details.value == details
    browser.filters["method"].value = ("full",)
    assert browser.runs.value == () and browser.message.value == HINT


def test_two_runs_differ_by_what_their_seeds_say(browser):
    """Student's t for pairs, from scipy; full has no seed 2."""
    choose(browser, ("linear", 0), ("lora", 1))
    text = plain(browser.details.value)
    assert "method linear lora" in text and "seed 0 1" in text and "dataset" not in text
    lora = np.add(95, EXTRA["lora"])
    interval = scipy.stats.ttest_1samp(lora - 90, 0).confidence_interval()
    assert f"test accuracy (points) +5.00 {interval.low:+.2f} to {interval.high:+.2f} 3 differs" in text
    assert "training time (s) +0.0 +0.0 to +0.0 3 tied" in text
    assert "training energy (J) – – 0 no seed has it in both" in text
    choose(browser, ("full", 0), ("lora", 0))
    assert re.search(r"test accuracy \(points\) -2\.20 \S+ to \S+ 2 differs", plain(browser.details.value))


def test_pairs_are_of_the_two_experiments_only(folder):
    """Runs under other parameters do not get into the differences."""
    records, _ = read(folder)
    other = records.assign(epochs=9, test_top1_pct=1.0)
    both = pd.concat([records, other], ignore_index=True)
    first, second = records.loc[0], records.loc[3]
    assert over_seeds(both, first, second).equals(over_seeds(records, first, second))


@pytest.mark.parametrize(
    "pair, changes, message",
    [
        ((0, 1), {}, "differ in their seed only"),
        ((0, 9), {}, "a baseline's seed"),
        ((0, 3), {"test_sha256": ["b"] * 3 + ["c"] * 7}, "different data"),
        ((0, 3), {"epochs": [2] * 3 + [None] * 7}, "does not tell its epochs"),
        ((0, 3), {"env_hash": ["e"] * 3 + ["f"] * 7}, "differ in env_hash"),
    ],
)
def test_runs_that_cannot_be_paired_are_refused_with_the_reason(folder, pair, changes, message):
    records = read(folder)[0].assign(**changes)
    with pytest.raises(InputError, match=message):
        over_seeds(records, *(records.loc[row] for row in pair))
    browser = ResultsBrowser(records)
    browser.runs.value = pair
    assert re.search(message, browser.message.value.replace("&#x27;", "'"))
    assert "<th>second</th>" in browser.details.value  # side by side all the same


def test_one_seed_has_no_interval(folder):
    records = read(folder)[0].loc[[0, 3]]
    row = over_seeds(records, *(records.loc[i] for i in (0, 3))).set_index("").loc["test accuracy (points)"]
    assert list(row) == ["+5.10", "–", "1", "one seed says nothing about chance"]


def test_points_that_were_not_measured_alike_are_said(folder, tmp_path):
    assert "Not all of these points" not in ResultsBrowser(folder).front.value
    browser = ResultsBrowser(write(tmp_path, record(), record("full", env={"env_hash": "other"})))
    assert "Not all of these points can be compared: runs of dataset digits" in browser.front.value
    browser.filters["method"].value = ("lora",)
    assert "Not all of these points" not in browser.front.value


def test_bad_records_are_named_and_the_others_shown(tmp_path):
    write(
        tmp_path,
        record(),
        record(run={"schema_version": 2}),
        record(config={"method": ["lora"]}),
        record(quality={"test_top1_pct": "95<b>"}),
        record(quality={"test_top1_pct": 10**400}),
    )
    for name, text in {"cut": json.dumps(record())[:300], "empty": "", "list": "[]", "zip": "PK\3\4"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    browser = ResultsBrowser(tmp_path)
    assert browser.count.value == "3 of 3 runs"
    for name in ("cut", "empty", "list", "zip", "run-01", "run-02", "run-03", "run-04"):
        assert sum(name in problem for problem in browser.problems) == 1, name
    assert not any("run-00" in problem for problem in browser.problems)
    remarks = browser.children[0].value
    assert "Remarks on records: 8" in remarks and "95&lt;b&gt;" in remarks and "schema 2" in remarks


@pytest.mark.parametrize(
    "changes",
    [
        {"curves": {"history": [{"epoch": 1}]}},
        {"curves": {"memory_trace_bytes": [{"phase": "sleep", "block": "0", "bytes": [1]}]}},
        {"memory": {"train_peak_bytes": "<b>"}},
        {"config": {"budget": "lots"}},
    ],
)
def test_a_damaged_record_is_a_message_and_the_next_is_shown(tmp_path, changes):
    browser = ResultsBrowser(write(tmp_path, record(), record("full", **changes)))
    open_figures = plt.get_fignums()
    browser.runs.value = (1,)
    assert browser.curves.layout.display == "none" and "run-01" in browser.details.value
    assert browser.message.value.startswith("this cannot be shown: ") and "<" not in browser.message.value
    assert plt.get_fignums() == open_figures
    browser.runs.value = (0,)
    assert browser.message.value == "" and browser.curves.layout.display is None


def test_a_record_that_has_gone_is_a_message(tmp_path):
    browser = ResultsBrowser(write(tmp_path, record()))
    (tmp_path / "run-00" / "record.json").unlink()
    browser.runs.value = (0,)
    assert "No such file" in browser.message.value and "run-00/record.json" in browser.message.value


@pytest.mark.parametrize("nothing", ["folder", "no folder", pd.DataFrame()])
def test_no_runs_says_what_to_do(tmp_path, nothing):
    browser = ResultsBrowser(tmp_path / nothing if isinstance(nothing, str) else nothing)
    assert browser.count.value == NO_RUNS and not browser.runs.options
    assert browser.reaction_seconds(2) > 0
    assert table(browser.records).empty


def test_strings_from_records_are_shown_as_text(tmp_path):
    """Names, errors, reasons and unknown fields; what no page can hold is replaced."""
    runs = []
    for text in HOSTILE:
        names = {"dataset": text, "backbone": text, "method": text, "checkpointing": text, text: text}
        run = {"error": text, "status": text, "experiment_id": text}
        runs.append(
            record(config=names, run=run, missing={"train_energy_joules": text}, env={"env_hash": text})
            | {"curves": {}}
        )
    browser = ResultsBrowser(write(tmp_path, *runs))
    assert set(browser.filters["method"].options) == {printable(text) for text in HOSTILE}
    browser.sort.value = HOSTILE[0]  # a foreign column
    assert HOSTILE[0] in html.unescape(browser.heads.value)
    pages = []
    for row, text in enumerate(HOSTILE):
        browser.runs.value = (row,)
        pages.append(browser.details.value)
        assert browser.message.value == ""
        assert f"{printable(text)}: {printable(text)}" in html.unescape(pages[-1])
    for row in range(1, len(HOSTILE), 2):
        browser.runs.value = (row - 1, row)
        pages += [browser.details.value, browser.message.value]
    assert tags("".join(pages)) == {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert tags(browser.front.value) <= {"svg", "rect", "path", "text", "g", "title", "p"}
    assert tags(browser.children[0].value) <= {"style", "details", "summary", "ul", "li"}
    assert tags(browser.heads.value) == set()
    labels = [label for label, _ in (*browser.runs.options, *browser.sort.options)]
    assert "".join([*labels, browser.front.value, browser.children[0].value, *browser.problems]).encode()


def test_simulated_energy_is_no_figure(tmp_path):
    fake = {"energy": {"train_energy_joules": 5.0, "energy_source": "fake"}}
    records, _ = read(write(tmp_path, record(**fake), record("full", **fake)))
    assert set(table(records)["adapt J"]) == {"simulated"}
    energy = over_seeds(records, records.loc[0], records.loc[1]).set_index("").loc["training energy (J)"]
    assert energy.seeds == "0"


def test_table_marks_what_is_missing(folder):
    shown = table(read(folder)[0]).set_index("method")
    assert set(FILTERS) - {"method"} < set(shown.columns)
    assert list(shown.loc["zero_shot", ["peak MiB", "adapt s", "adapt J"]]) == ["1.0", "1.0", "–"]
    assert shown.loc["full", "top-1 %"].iloc[2] == "–"
