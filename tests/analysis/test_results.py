"""Tables of finished runs: figures that can be counted by hand, and text that stays text in every format."""

import csv
import io
import itertools
import json
import random
import re
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from hostile import HOSTILE
from matplotlib import pyplot as plt

from toolkit import analysis, plots
from toolkit.analysis import claims_checkpointing
from toolkit.analysis.results import side_by_side
from toolkit.analysis.tables import markdown
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.training.record import GROUPS, SCHEMA_VERSION

NEW = {
    "run": {"schema_version": SCHEMA_VERSION, "status": "ok", "error": None, "phase": "training"},
    "data": {"n_train": 1077, "n_test": 450, "train_sha256": "a" * 64, "test_sha256": "b" * 64},
    "quality": {"test_top1_pct": 90.0, "params_trainable": 100, "metric": "top1_pct"},
    "time": {"train_seconds": 10.0},
    "energy": {"train_energy_joules": None, "energy_source": "none"},
    "memory": {
        "train_peak_bytes": 2**23, "memory_source": "tracked_tensors", "budget_mode": "simulated",
        "within_budget": True, "predicted_peak_bytes": None, "checkpointed_blocks": 0,
    },
    "scores": {"ns_m_training": 70.0}, "env": {"env_hash": "one", "threads": 2},
    "missing": {"train_energy_joules": "the CPU has no energy counter"},
}  # fmt: skip


def write(runs, name, method="lora", checkpointing="none", seed=0, **changes):
    """A record below `runs` that differs from `NEW` in these fields."""
    experiment = Experiment(
        method=method, checkpointing=checkpointing, seed=seed, budget="16MiB", device="cpu"
    )
    record = {group: dict(NEW.get(group, {})) for group in (*GROUPS, "missing")}
    record["run"]["experiment_id"], record["config"] = name, experiment.config
    for field, value in changes.items():
        groups = [group for group, values in record.items() if field in values]
        record[groups[0] if groups else "run"][field] = value
    path = runs / name / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path.parent


def write_runs(folder):
    """lora and full, none and threshold, seeds 0, 1, 2: 90, 92, 94 % and 91, 93.1, 94.9 %, peaks in MiB."""
    for method, accuracies in (("lora", (90.0, 92.0, 94.0)), ("full", (91.0, 93.1, 94.9))):
        for strategy, mib in (("none", 20), ("threshold", 12)):
            for seed, accuracy in enumerate(accuracies):
                write(
                    folder, f"{method}-{strategy}-{seed}", method, strategy, seed, test_top1_pct=accuracy,
                    train_peak_bytes=mib * 2**20, within_budget=mib <= 16, checkpointed_blocks=2,
                    train_seconds=10.0 + seed + (method == "full"),
                )  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    write_runs(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def records(runs):
    return analysis.read(runs)[0]


def row_of(table, **where):
    """The one row of a table that has these values."""
    chosen = table[(table[list(where)] == pd.Series(where)).all(axis=1)]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_means_and_intervals_of_the_results(records):
    table = analysis.means(records)
    row = row_of(analysis.as_text(table), method="lora", checkpointing="none")
    assert row["test accuracy (%)"] == "92.00 ± 4.97", "sd 2, t(0.975, 2) 4.3027: 2 · 4.3027 / sqrt(3)"
    assert row["peak memory (MiB)"] == "20.00 ± 0.00" and row["time (s)"] == "11.0 ± 2.5"
    assert (row.n, row["energy (J)"], row["within budget"]) == ("3", "–", "no")
    assert list(table.method) == ["lora", "lora", "full", "full"], "as METHODS has them"
    assert row_of(table, method="lora", checkpointing="none").peak_bytes == 20 * 2**20


def test_the_comparison_leaves_out_empty_and_constant_columns(records):
    table = analysis.compare(records)
    assert "energy (J)" not in table and "environment" not in table and "budget" not in table
    assert row_of(table, method="full", checkpointing="threshold")["test accuracy (%)"] == "93.00 ± 4.85"
    assert analysis.compare(records[:0]).empty


def test_reasons_for_missing_figures_come_from_the_records(records):
    table = analysis.missing(records)
    assert table.to_numpy().tolist() == [["training energy", "the CPU has no energy counter", 12]]


def test_a_simulated_gpu_measures_nothing(tmp_path):
    write(tmp_path, "one", energy_source="fake", train_energy_joules=5.0)
    records, _ = analysis.read(tmp_path)
    assert analysis.means(records).adapt_joules.isna().all()
    assert analysis.environments(records).energy_source.tolist() == ["fake"]


def test_a_figure_that_one_run_lacks_has_its_own_n(runs):
    write(runs, "lora-none-3", seed=3, train_seconds=None, train_peak_bytes=20 * 2**20)
    table = analysis.as_text(analysis.means(analysis.read(runs)[0]))
    row = row_of(table, method="lora", checkpointing="none")
    assert row["time (s)"].endswith("(n = 3)") and row.n == "4"


def test_runs_of_two_environments_are_kept_apart(runs):
    for seed, accuracy in enumerate((50.0, 52.0, 54.0)):
        write(runs, f"other-{seed}", seed=seed, test_top1_pct=accuracy, env_hash="two")
    records, _ = analysis.read(runs)
    assert analysis.environments(records).runs.tolist() == [12, 3]
    lora = analysis.compare(records).query("method == 'lora' and checkpointing == 'none'")
    accuracies = dict(zip(lora.environment, lora["test accuracy (%)"]))
    assert accuracies == {"E1": "92.00 ± 4.97", "E2": "52.00 ± 4.97"}
    assert set(analysis.effects(records, "method").environment) == {"E1"}


def test_thread_counts_separate_times_but_not_scores_and_bytes(runs):
    for seed, accuracy in enumerate((90.0, 92.0, 94.0)):  # the same three runs on four threads, and a fourth
        again = {"test_top1_pct": accuracy, "train_peak_bytes": 20 * 2**20, "train_seconds": 5.0}
        write(runs, f"other-{seed}", seed=seed, env_hash="two", threads=4, **again)
    write(runs, "other-3", seed=3, env_hash="two", threads=4, **again | {"test_top1_pct": 96.0})
    records, _ = analysis.read(runs)
    table = analysis.means(records).query("method == 'lora' and checkpointing == 'none'")
    assert table.score_pct.tolist() == [93.0, 93.0] and table.n.tolist() == [4, 4]
    assert table.adapt_seconds.tolist() == [11.0, 5.0] and table.adapt_seconds_n.tolist() == [3, 4]
    shown = analysis.compare(records)
    assert set(shown.environment) == {"E1: 2 threads", "E2: 4 threads"}, "what differs, in words"
    scores = analysis.effects(records, "method").query("quantity == 'score_pct'")
    assert set(scores.environment) == {"E1"} and scores.n.tolist() == [3, 3]


def test_two_environments_of_which_one_has_two_budgets(tmp_path):
    """Three records: a table whose rows differ in what tells them apart stays a table."""
    write(tmp_path, "one", seed=0)
    write(tmp_path, "two", seed=0, budget=2**26)
    write(tmp_path, "three", seed=0, env_hash="two", threads=4)
    records, _ = analysis.read(tmp_path)
    assert len(analysis.compare(records)) == 3
    for table in (analysis.standing(records), analysis.budgets(records), analysis.ranking(records)):
        analysis.show(table).to_html()


def test_a_run_without_a_meter_stays_with_those_that_had_one(runs):
    for path in runs.glob("lora-*/record.json"):
        record = json.loads(path.read_text())
        record["energy"] = {"train_energy_joules": 7.0, "energy_source": "nvml_counter"}
        path.write_text(json.dumps(record))
    assert set(analysis.read(runs)[0].environment) == {"E1"}


def test_effects_are_paired_and_corrected(records):
    tests = analysis.effects(records, "method")
    row = row_of(analysis.effects_table(tests), checkpointing="none")
    assert row.method == "lora" and row["score (points)"].startswith("−1.00 [")
    assert row["peak memory (%)"] == "0.0 [=]" and "energy (%)" not in row and row.n == "3"
    scores = tests.query("quantity == 'score_pct'")
    assert scores.p_holm.tolist() == pytest.approx((2 * scores.p).tolist()), "two tests of this quantity"
    strategies = analysis.effects(records, "checkpointing")
    assert strategies.query("quantity == 'peak_bytes'").change.tolist() == pytest.approx([-40, -40])


def test_a_clear_difference_has_a_star(runs):
    for path in runs.glob("full-*/record.json"):
        record = json.loads(path.read_text())
        record["time"]["train_seconds"] *= 3
        path.write_text(json.dumps(record))
    tests = analysis.effects(analysis.read(runs)[0], "method")
    row = row_of(analysis.effects_table(tests), checkpointing="none")
    assert row["time (%)"].endswith(" *") and "*" not in row["peak memory (%)"]


def test_the_budget_table_counts_runs_within_the_budget(runs):
    predicted = {"train_peak_bytes": 15 * 2**20, "predicted_peak_bytes": int(15 * 2**20 / 0.99)}
    for seed in range(3):
        write(runs, f"planned-{seed}", checkpointing="planned", seed=seed, **predicted)
    write(runs, "planned-3", checkpointing="planned", seed=3, status="oom", test_top1_pct=None)
    table = analysis.budgets(analysis.read(runs)[0])
    planned, none = row_of(table, checkpointing="planned"), row_of(table, checkpointing="none")
    assert (planned.kept_budget, planned.ended_ok, planned.out_of_memory) == (3, 3, 1)
    assert planned.lowest_error_of_prediction_pct == pytest.approx(-1.0, abs=1e-3)
    assert (none.kept_budget, none.ended_ok, none.highest_use_of_budget_pct) == (0, 6, 125.0)


def test_failures_name_their_notebook(runs):
    failed = write(runs, "broken", status="failed", error="ValueError: no", seed=7)
    (failed / "finetune.ipynb").write_text("{}")
    table = analysis.failures(analysis.read(runs)[0])
    assert table[["error", "notebook"]].to_numpy().tolist() == [["ValueError: no", "broken/finetune.ipynb"]]


def test_damaged_records_and_copies_are_named(runs):
    (runs / "half").mkdir()
    (runs / "half" / "record.json").write_text('{"run": {')
    write(runs, "again", experiment_id="lora-none-0")
    records, left_out = analysis.read(runs)
    assert len(records) == 12
    first, second = left_out["left out"]
    assert ("half" in first and "again" in first + second) or "lora-none-0" in second
    with pytest.raises(InputError, match="is a file"):
        analysis.read(runs / "half" / "record.json")


def test_runs_are_selected_by_experiment_on_any_device(runs):
    records = analysis.read(runs)[0].assign(device="cuda")
    wanted = [Experiment(method="lora", checkpointing="none", seed=1, budget="16MiB")]
    assert [Path(folder).name for folder in analysis.runs_of(records, wanted).folder] == ["lora-none-1"]
    assert analysis.runs_of(records[:0], wanted).empty


def test_two_runs_side_by_side(records):
    index = pd.Index([Path(folder).name for folder in records.folder])
    first, second = index.get_loc("full-none-0"), index.get_loc("lora-none-1")
    changed = side_by_side(analysis.adaptation(records), first, second).set_index("parameter")
    assert changed.loc["method"].tolist() == ["full", "lora"] and "dataset" not in changed.index
    assert changed.loc["test score (%)"].tolist() == ["91.00", "92.00"]


@pytest.mark.parametrize("function", [
    analysis.what_ran, analysis.environments, analysis.data_sets, analysis.means, analysis.missing,
    analysis.standing, analysis.budgets, analysis.failures,
    lambda records: analysis.effects_table(analysis.effects(records, "method")),
])  # fmt: skip
def test_without_records_every_table_is_empty(tmp_path, function):
    records, _ = analysis.read(tmp_path)
    table = function(records)
    assert table.empty
    analysis.show(table).to_html()
    analysis.write_table(table, tmp_path / "table")


def latex_rows(latex: str) -> list[list[str]]:
    """The cells of a table in LaTeX; fails on what would not compile or not be the same text."""
    opened = []
    for command, name in re.findall(r"\\(begin|end)\{(\w+)\}", latex):
        opened.append(name) if command == "begin" else opened.remove(opened[-1:] == [name] and name)
    assert not opened
    rules = [latex.index(f"\\{rule}rule\n") for rule in ("top", "mid", "bottom")]
    assert rules == sorted(rules) and latex.count("rule\n") == 3
    body = [line for line in latex[rules[0] : rules[2]].splitlines() if not line.endswith("rule")]
    caption = re.search(r"^\\caption\{(.*)\}$", latex, re.MULTILINE)
    assert all(line.endswith(r" \\") for line in body)
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in body]
    alignment = re.search(r"\\begin\{tabular\}\{([lr]+)\}", latex)[1]
    assert {len(row) for row in rows} == {len(alignment)}
    for text in (*itertools.chain(*rows), caption[1] if caption else ""):
        left = re.sub(
            r"\\[&%$#_{}]|\\(textbackslash|textasciitilde|textasciicircum|space|bfseries)\b", "", text
        )
        assert not re.search(r"[&%$#_{}~^\\]", left), text
    return [[cell.strip() for cell in row] for row in rows]


def test_a_table_that_latex_would_misread_is_seen(tmp_path):
    frame = pd.DataFrame({"method": ["a_b & 5 %", "lora"], "peak_bytes": [1.0, 2.0]})
    analysis.write_table(frame, tmp_path / "table", caption="5 % & a_b.")
    latex = (tmp_path / "table.tex").read_text()
    assert latex_rows(latex)[1:] == [[r"a\_b \& 5 \%", "0.00"], ["lora", "0.00"]]
    for right in (r"\_", r"\%", r"\&", r"\midrule", r"\end{tabular}", r" \\", r"\begin{table}"):
        for place in (latex.index(right), latex.rindex(right)):  # in the caption, in a cell
            with pytest.raises((AssertionError, ValueError)):
                latex_rows(latex[:place] + latex[place + 1 :])


def test_names_stay_text_in_every_format(tmp_path):
    frame = pd.DataFrame({"method": HOSTILE, HOSTILE[0]: HOSTILE, "peak_bytes": 2.0**20})
    analysis.write_table(frame, tmp_path / "table")
    rows = list(csv.reader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [row[0] for row in rows[1:]] == HOSTILE and rows[1][2] == "1048576.0"
    page = BeautifulSoup(analysis.show(frame).to_html(), "html.parser")
    assert not page.find_all(["script", "b"]) and not any(
        "onmouseover" in tag.attrs for tag in page.find_all()
    )
    assert [row.td.get_text() for row in page.tbody.find_all("tr")] == HOSTILE
    latex = (tmp_path / "table.tex").read_text()
    assert r"\textbackslash input\{x\}" in latex and len(latex_rows(latex)) == 1 + len(HOSTILE)
    lines = markdown(analysis.as_text(frame)).splitlines()
    assert len(lines) == len(HOSTILE) + 2 and all(line.replace(r"\|", "").count("|") == 4 for line in lines)


def test_tables_are_ready_to_print(records, tmp_path):
    means = analysis.means(records)
    page = BeautifulSoup(analysis.show(means, "Means.").to_html(), "html.parser")
    heads = [head.get_text() for head in page.thead.find_all("th")]
    assert heads[:2] == ["method", "checkpointing"] and "test score (%)" not in heads
    caption = "Means. In all rows: dataset digits, backbone demo_vit, environment E1, budget 16.0 MiB, n 3."
    assert page.caption.get_text().strip() == f"{caption} Not measured: energy (J)."
    analysis.write_table(means, tmp_path / "table", caption="Means.", label="tab:means")
    latex = (tmp_path / "table.tex").read_text()
    assert len(latex_rows(latex)) == 1 + len(means)
    assert r"\caption{Means. In all rows: dataset digits, backbone demo\_vit" in latex
    assert r"\label{tab:means}" in latex and r"\bfseries 93.00 ± 4.85" in latex
    assert r"\bfseries 92.00" not in latex and r"\bfseries 12.00 ± 0.00" in latex
    assert repr(float(means.adapt_seconds_half_width[0])) in (tmp_path / "table.csv").read_text()


def test_one_quantity_by_strategy(records, tmp_path):
    table = analysis.by_strategy(analysis.means(records), "peak_bytes")
    assert table.method.tolist() == ["lora", "full"]
    assert table[["none", "threshold"]].to_numpy().tolist() == [["20.00 ± 0.00", "12.00 ± 0.00"]] * 2
    analysis.write_table(table, tmp_path / "table")
    rows = latex_rows((tmp_path / "table.tex").read_text())
    assert rows == [
        ["method", "none", "threshold"],
        *table[["method", "none", "threshold"]].to_numpy().tolist(),
    ]


def test_equal_records_give_equal_tables(runs, tmp_path):
    for name in ("first", "second"):
        analysis.write_table(analysis.means(analysis.read(runs)[0]), tmp_path / name)
    for ending in (".csv", ".tex", ".md"):
        assert (tmp_path / f"first{ending}").read_bytes() == (tmp_path / f"second{ending}").read_bytes()


def write_anything(runs, draw):
    """Up to ten records of up to three environments and budgets, with fields missing here and there."""
    environments = draw.sample(("one", "two", "three"), draw.choice((1, 2, 3)))
    budgets = draw.sample((2**24, 2**25, 2**30), draw.choice((1, 1, 2, 3)))
    for number in range(draw.choice((0, 1, 2, 3, 5, 10))):
        method, strategy = (
            draw.choice(("lora", "full", "linear")),
            draw.choice(("none", "planned", "threshold")),
        )
        status = draw.choice(("ok", "ok", "ok", "oom", "nan", "interrupted", "failed"))
        ended = status == "ok"
        folder = write(
            runs, str(number), method, strategy, draw.choice((0, 1, 2)), status=status, n_classes=10,
            dataset=draw.choice(("digits", "textures")), budget=draw.choice(budgets),
            phase=draw.choice(("training", "training", "inference")), lr=draw.choice((0.001, 0.003)),
            env_hash=draw.choice(environments), threads=draw.choice((1, 2)),
            energy_source=draw.choice(("none", "nvml_counter", "fake")), train_energy_joules=2.0,
            memory_source=draw.choice(("none", "tracked_tensors")), predicted_peak_bytes=2**24,
            test_top1_pct=draw.uniform(0, 100) if ended else None, train_sha256=draw.choice(("a", "b")),
            train_peak_bytes=draw.randint(1, 2**25) if ended else None, metric="top1_pct",
        )  # fmt: skip
        record = json.loads((folder / "record.json").read_text())
        for group in ("data", "quality", "time", "energy", "memory", "scores", "env", "missing"):
            for field in list(record[group]):
                fate = draw.random()
                if fate < 0.08:
                    del record[group][field]
                elif fate < 0.16:
                    record[group][field] = None
            if draw.random() < 0.04:
                record[group] = {}
        text = json.dumps(record)
        (folder / "record.json").write_text(text[: draw.choice((None, None, None, None, None, 9))])


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(4, 200, 4))])
def test_no_folder_stops_the_report(tmp_path, first):
    for seed in range(first, first + 4):
        runs = tmp_path / str(seed)
        runs.mkdir()
        write_anything(runs, random.Random(seed))
        records, left_out = analysis.read(runs)
        tables = [left_out, analysis.means(records), analysis.standing(records), analysis.missing(records)]
        tables += [function(records) for function in (analysis.what_ran, analysis.environments)]
        tables += [
            function(records) for function in (analysis.data_sets, analysis.budgets, analysis.failures)
        ]
        tables += [
            analysis.effects_table(analysis.effects(records, of)) for of in ("method", "checkpointing")
        ]
        tables += [claims_checkpointing.findings(records), analysis.ranking_table(analysis.ranking(records))]
        for number, table in enumerate(tables):
            analysis.show(table).to_html()
            analysis.write_table(table, runs / f"table-{number}")
        assert len(tables[1]) >= len(analysis.compare(records)), seed
        plots.accuracy_against(tables[1], "memory", "time")
        plt.close("all")
