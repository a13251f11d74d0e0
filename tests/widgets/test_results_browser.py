"""The results browser and the method chooser without a browser: widgets are set as a person sets them."""

import json

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from hostile import HOSTILE
from matplotlib import pyplot as plt

from toolkit import analysis
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.training.record import SCHEMA_VERSION
from toolkit.widgets.results import HINT, NO_RUNS, MethodChooser, ResultsBrowser

MIB = 2**20
ACCURACY = {"linear": [90.0, 90.4, 89.6], "lora": [95.1, 95.4, 94.5], "full": [97.2, 97.7, 96.7]}
HISTORY = [{"epoch": n, "train_loss": 1.0, "val_loss": 1.2, "val_top1_pct": 40.0} for n in (1, 2)]


def record(method: str = "lora", seed: int = 0, **changes: dict) -> dict:
    experiment = Experiment(method=method, seed=seed, checkpointing="none", budget="20MiB", device="cpu")
    whole = {
        "run": {"schema_version": SCHEMA_VERSION, "experiment_id": f"{method}{seed}", "status": "ok",
                "error": None, "phase": "training"},
        "config": experiment.config,
        "data": {"train_sha256": "a", "test_sha256": "b"},
        "quality": {"test_top1_pct": ACCURACY[method][seed], "params_trainable": 10},
        "time": {"train_seconds": 10.0 + seed},
        "energy": {"train_energy_joules": None, "energy_source": "none"},
        "memory": {"train_peak_bytes": len(method) * MIB, "within_budget": True,
                   "memory_source": "tracked_tensors", "budget_mode": "simulated"},
        "flops": {}, "scores": {}, "env": {"env_hash": "e", "alloc_conf": None}, "packages": {},
        "curves": {
            "history": HISTORY,
            "memory_trace_bytes": [{"phase": "forward", "block": "0", "bytes": [1, MIB]}],
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


def browse(folder) -> ResultsBrowser:
    return ResultsBrowser(analysis.read(folder)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three methods with three seeds each; the last ran out of memory and has no curves."""
    runs = [record(method, seed) for method in ACCURACY for seed in range(3)]
    failed = {"run": {"status": "oom", "error": "no room <b>"}, "quality": {"test_top1_pct": None}}
    runs[-1] = record("full", 2, **failed) | {"curves": {}}
    return write(tmp_path_factory.mktemp("runs"), *runs)


@pytest.fixture
def browser(folder):
    return browse(folder)


def listed(browser) -> list[str]:
    """Methods of the list, from the top."""
    return [browser.records.method[row] for _, row in browser.runs.options]


def choose(browser, *runs: tuple[str, int]) -> None:
    records = browser.records
    browser.runs.value = [
        int(records.index[(records.method == method) & (records.seed == seed)][0]) for method, seed in runs
    ]


def text(widget) -> str:
    return " ".join(BeautifulSoup(widget.value, "html.parser").get_text(" ").split())


def test_all_runs_at_first_the_most_accurate_on_top(browser):
    assert browser.count.value == "9 of 9 runs"
    shown = browser.records.score_pct[[row for _, row in browser.runs.options]]
    assert shown.dropna().is_monotonic_decreasing and pd.isna(shown.iloc[-1])
    assert browser.message.value == HINT and bytes(browser.front.value).startswith(b"\x89PNG")


def test_filters_narrow_list_and_picture(browser):
    before = browser.front.value
    browser.filters["method"].value = ("lora", "full")
    assert set(listed(browser)) == {"lora", "full"} and browser.count.value == "6 of 9 runs"
    assert browser.front.value != before
    browser.filters["status"].value = ("oom",)
    assert listed(browser) == ["full"] and browser.front.layout.display == "none"
    browser.filters["method"].value = browser.filters["status"].value = ()
    assert browser.count.value == "9 of 9 runs" and browser.front.layout.display is None


def test_any_column_sorts_both_ways_and_is_in_the_list(browser):
    for column in browser.sort.options:
        browser.sort.value = column
        assert len(browser.runs.options) == 9 and browser.message.value == HINT
    browser.sort.value, browser.order.value = "train_peak_bytes", "ascending"
    peaks = browser.records.train_peak_bytes[[row for _, row in browser.runs.options]]
    assert peaks.is_monotonic_increasing
    browser.sort.value = "experiment_id"
    first, row = browser.runs.options[0]
    assert "experiment" in browser.heads.value and browser.records.experiment_id[row] in first
    assert len({len(label) for label, _ in browser.runs.options} | {len(browser.heads.value)}) == 1


def test_one_run_shows_curves_and_figures_with_reasons(browser):
    open_figures = plt.get_fignums()
    choose(browser, ("lora", 0))
    assert browser.message.value == "" and browser.tabs.selected_index == 1
    for picture in (browser.curves, browser.memory):
        assert bytes(picture.value).startswith(b"\x89PNG") and picture.layout.display is None
    assert "95.10" in text(browser.details) and "the CPU has no energy counter" in text(browser.details)
    assert plt.get_fignums() == open_figures
    choose(browser, ("full", 2))
    assert browser.curves.layout.display == browser.memory.layout.display == "none"
    assert "oom, no room <b>" in text(browser.details)


def test_a_chosen_run_stays_chosen_while_it_passes_the_filters(browser):
    choose(browser, ("lora", 0))
    chosen, details = browser.runs.value, browser.details.value
    browser.filters["method"].value = ("lora",)
    browser.order.value = "ascending"
    assert browser.runs.value == chosen and browser.details.value == details
    browser.filters["method"].value = ("full",)
    assert browser.runs.value == () and browser.message.value == HINT


def test_two_runs_are_compared(browser):
    choose(browser, ("linear", 0), ("lora", 1))
    shown = text(browser.details)
    assert "method linear lora" in shown and "seed 0 1" in shown and "dataset" not in shown
    assert "test score (%) 90.00 95.40" in shown


def test_damaged_and_missing_files_become_messages(tmp_path):
    browser = browse(write(tmp_path, record(), record("full", curves={"history": [{"epoch": 1, "a": "b"}]})))
    (tmp_path / "run-00" / "record.json").unlink()
    browser.runs.value = (0,)
    assert "No such file" in browser.message.value
    browser.runs.value = (1,)
    assert "full" in browser.records.method[1]


def test_no_runs_says_what_to_do(tmp_path):
    browser = browse(tmp_path)
    assert browser.count.value == NO_RUNS and not browser.runs.options


def test_text_of_records_stays_text(tmp_path):
    runs = [record(run={"error": text, "experiment_id": text}, config={"backbone": text}) for text in HOSTILE]
    browser = browse(write(tmp_path, *runs))
    pages = []
    for row in browser.records.index:
        browser.runs.value = (row,)
        pages.append(browser.details.value)
        browser.runs.value = (row, (row + 1) % len(runs))
        pages += [browser.details.value, browser.message.value]
    page = BeautifulSoup("".join(pages) + browser.heads.value, "html.parser")
    assert not page.find_all(["script", "b", "a"])
    assert not any("onmouseover" in tag.attrs for tag in page.find_all())
    assert set(HOSTILE) <= {cell.get_text() for cell in page.find_all("td")}


def row(method: str, score: float, mib: float, mflop: float, **more) -> dict:
    known = {"dataset": "digits-c:mixed:5", "environment": "E1", "backbone": "demo_cnn_digits", "variant": ""}
    figures = {"n": 3, "score_pct": score, "score_pct_half_width": 1.0, "score_pct_n": 3}
    costs = {"peak_bytes": mib * MIB, "flops_per_step": mflop * 1e6, "optimizer_flops_per_step": 1e6}
    return known | figures | costs | {"method": method} | more


FRAME = pd.DataFrame(
    [
        row("full", 93, 20, 300), row("linear", 60, 4, 50), row("ia3", 58, 6, 90),
        row("lora", 80, 10, 200, variant="rank 8"), row("lora", 75, 9, 190, variant="rank 2"),
    ]
)  # fmt: skip


def test_moving_the_sliders_changes_the_answer():
    chooser = MethodChooser(FRAME)
    assert "full is the best within" in chooser.answer.value  # the highest limits first
    chooser.memory.value = 10 * MIB
    assert "lora (rank 8) is" in chooser.answer.value and "no: memory" in chooser.table.value
    chooser.flops.value = 50e6
    assert "linear is" in chooser.answer.value
    chooser.memory.index = 0
    assert "nothing fits" in chooser.answer.value
    assert chooser.table.value.count("<tr") == 1 + len(FRAME)


def test_another_data_set_brings_its_own_stops():
    other = pd.DataFrame([row("norm", 70, 7, 70, dataset="textures-c:mixed:5")])
    chooser = MethodChooser(pd.concat([FRAME, other], ignore_index=True))
    chooser.dataset.value = "textures-c:mixed:5"
    assert [label for label, _ in chooser.memory.options] == ["below 7.0 MiB", "7.0 MiB"]
    assert "norm is" in chooser.answer.value and chooser.table.value.count("<tr") == 2


def test_a_chooser_needs_a_row_with_all_figures():
    for frame in (FRAME.assign(peak_bytes=np.nan), FRAME[:0]):
        with pytest.raises(InputError, match="nothing to choose from"):
            MethodChooser(frame)
