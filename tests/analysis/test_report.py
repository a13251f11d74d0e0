"""The report: figures that can be counted by hand, text that stays text, and folders with little in them."""

import collections
import csv
import html.parser
import io
import json
import re
import urllib.parse
from unittest import mock

import mistune
import pandas as pd
import pytest
from hostile import HOSTILE

from toolkit.analysis import report
from toolkit.analysis.report import read_runs, write_report
from toolkit.analysis.tables import Table, visible
from toolkit.errors import InputError

NEW = {
    "run": {"schema_version": 5, "status": "ok", "error": None, "phase": "training"},
    "config": {
        "dataset": "digits", "backbone": "demo_vit", "method": "lora", "checkpointing": "none",
        "budget": str(2**24), "seed": 0,
    },
    "data": {"n_train": 1077, "n_test": 450, "train_sha256": "a" * 64, "test_sha256": "b" * 64},
    "quality": {"test_top1_pct": 90.0, "params_trainable": 100},
    "time": {"train_seconds": 10.0},
    "energy": {"train_energy_joules": None, "energy_source": "none"},
    "memory": {
        "train_peak_bytes": 2**23, "memory_source": "tracked_tensors", "budget_mode": "simulated",
        "within_budget": True, "predicted_peak_bytes": None, "checkpointed_blocks": 0,
    },
    "flops": {}, "scores": {"ns_m_training": 70.0}, "env": {"env_hash": "one", "threads": 2},
    "missing": {"train_energy_joules": "the CPU has no energy counter"},
}  # fmt: skip


def write(runs, name, **changes):
    """A record below `runs` that differs from `NEW` in these fields."""
    record = {group: dict(values) for group, values in NEW.items()}
    record["run"]["experiment_id"] = name
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
                    folder, f"{method}-{strategy}-{seed}", method=method, checkpointing=strategy, seed=seed,
                    test_top1_pct=accuracy, train_peak_bytes=mib * 2**20, within_budget=mib <= 16,
                    checkpointed_blocks=2, train_seconds=10.0 + seed + (method == "full"),
                )  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    write_runs(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report on those runs and a failed one, whose notebook has a name that a link must quote."""
    runs = tmp_path_factory.mktemp("written") / "runs"
    write_runs(runs)
    failed = write(runs, "a #1 %41 run", status="failed", error="ValueError: no", seed=7)
    (failed / "finetune.ipynb").write_text("{}")
    return write_report(runs, runs.parent / "out" / "report.html")


class Page(html.parser.HTMLParser):
    """Elements with their attributes, and the text of a page; refuses elements that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.parts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = "".join(self.parts)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.parts.append(data)


def cells(table, **where):
    """The one row of a table's text that has these values."""
    chosen = table.text[(table.text[list(where)] == pd.Series(where)).all(axis=1)]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_figures_of_the_table_of_results(runs):
    table = report.results(read_runs(runs))
    row = cells(table, method="lora", checkpointing="none")
    assert row["accuracy (%)"] == "92.00 ± 4.97", "sd 2, t(0.975, 2) 4.3027: 2 · 4.3027 / sqrt(3)"
    assert row["peak memory (MiB)"] == "20.00 ± 0.00" and row["time (s)"] == "11.0 ± 2.5"
    assert (row.n, row.ended, row.budget) == ("3", "3 ok", "16.0 MiB")
    assert row["energy (J)"] == "– [a]" and table.lines == ["[a] the CPU has no energy counter"]
    assert list(table.text.method) == ["lora", "lora", "full", "full"], "as METHODS has them"
    numbers = table.values.set_index(["method", "checkpointing"]).loc[("lora", "none")]
    assert numbers.peak_bytes_mean == 20 * 2**20 and numbers.adapt_joules_n == 0


def test_one_run_has_no_interval_and_simulated_joules_are_no_figures(tmp_path):
    write(tmp_path / "runs", "one", energy_source="fake", train_energy_joules=5.0)
    table = report.results(read_runs(tmp_path / "runs"))
    assert table.text["accuracy (%)"].tolist() == ["90.00"] and table.text.n.tolist() == ["1"]
    assert table.lines == ["[a] simulated GPU: its joules are no measurement"]
    source = report.environments(read_runs(tmp_path / "runs")).text["energy from"]
    assert source.tolist() == ["simulated GPU, no measurement"]


def test_a_figure_that_one_run_lacks_has_its_own_n(runs):
    write(runs, "lora-none-3", seed=3, train_seconds=None, train_peak_bytes=20 * 2**20)
    row = cells(report.results(read_runs(runs)), method="lora", checkpointing="none")
    assert row["time (s)"].endswith("(n = 3)") and row.n == "4"


def test_runs_of_two_environments_are_kept_apart(runs):
    for seed, accuracy in enumerate((50.0, 52.0, 54.0)):
        write(runs, f"other-{seed}", seed=seed, test_top1_pct=accuracy, env_hash="two")
    read = read_runs(runs)
    assert report.environments(read).text.runs.tolist() == ["12", "3"]
    lora = report.results(read).text.query("method == 'lora' and checkpointing == 'none'")
    assert dict(zip(lora.environment, lora["accuracy (%)"])) == {"E1": "92.00 ± 4.97", "E2": "52.00 ± 4.97"}
    assert set(report.effects(read, "method").values.environment) == {"E1"}


def test_a_run_without_a_meter_stays_with_those_that_had_one(runs):
    for path in runs.glob("lora-*"):
        record = json.loads((path / "record.json").read_text())
        record["energy"] = {"train_energy_joules": 7.0, "energy_source": "nvml_counter"}
        (path / "record.json").write_text(json.dumps(record))
    assert set(read_runs(runs).frame.environment) == {"E1"}


def test_effects_are_paired_and_corrected(runs):
    methods = report.effects(read_runs(runs), "method")
    row = cells(methods, checkpointing="none")
    assert row.method == "lora" and row["accuracy (points)"].startswith("−1.00 [")
    assert row["peak memory (%)"] == "0.0 [=]" and row["energy (%)"] == "–" and row.n == "3"
    tests = methods.values.query("quantity == 'accuracy'")
    assert tests.p_holm.tolist() == pytest.approx((2 * tests.p).tolist()), "two tests in this column"
    strategies = report.effects(read_runs(runs), "checkpointing")
    assert cells(strategies, method="full")["peak memory (%)"] == "−40.0 [=]"
    assert strategies.values.query("quantity == 'peak memory'").change.tolist() == pytest.approx([-40, -40])


def test_a_clear_difference_has_a_star(runs):
    for path in runs.glob("full-*"):
        record = json.loads((path / "record.json").read_text())
        record["time"]["train_seconds"] *= 3
        (path / "record.json").write_text(json.dumps(record))
    row = cells(report.effects(read_runs(runs), "method"), checkpointing="none")
    assert row["time (%)"].endswith(" *") and "*" not in row["peak memory (%)"]


def test_what_the_budget_did(runs):
    for seed in range(3):
        write(
            runs, f"planned-{seed}", checkpointing="planned", seed=seed, train_peak_bytes=15 * 2**20,
            predicted_peak_bytes=int(15 * 2**20 / 0.99),
        )  # fmt: skip
    write(runs, "planned-3", checkpointing="planned", seed=3, status="oom", test_top1_pct=None)
    table = report.budgets(read_runs(runs))
    planned, none = cells(table, checkpointing="planned"), cells(table, checkpointing="none")
    assert planned["within budget"] == "3 of 3" and planned["out of memory"] == "1"
    assert planned["measured less predicted (%)"] == "−1.00 to −1.00 (n = 3)"
    assert none["within budget"] == "0 of 6" and none["highest peak (% of budget)"] == "125.0"
    assert none["measured less predicted (%)"] == "–"


def test_the_page_is_whole_and_loads_nothing(written):
    page = Page(written.read_text())
    names = [name for name, _ in page.elements]
    assert "script" not in names and names.count("svg") == 2, "memory and time; no energy was measured"
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert not any("src" in attributes for _, attributes in page.elements)
    targets = [attributes["href"] for name, attributes in page.elements if name == "a"]
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert len(targets) > 20
    for target in targets:
        found = urllib.parse.unquote(target)
        assert target[1:] in ids if target[0] == "#" else (written.parent / found).is_file(), target
    assert "../runs/a%20%231%20%2541%20run/finetune.ipynb" in targets
    assert "digits, environment E1: the highest mean accuracy is 93.00 ± 4.85 %, full" in page.text


def test_the_same_records_give_the_same_bytes(written):
    again = write_report(written.parents[1] / "runs", written.parent / "again" / "report.html")
    assert again.read_text() == written.read_text().replace('href="../runs', 'href="../../runs')
    tables = sorted((written.parent / "report_tables").iterdir())
    pictures = written.read_text().count("<svg")
    counts = collections.Counter(path.suffix for path in tables)
    assert counts == {".csv": 12, ".tex": 12, ".md": 12, ".svg": pictures} and pictures
    for path in tables:
        assert path.read_bytes() == (again.parent / "report_tables" / path.name).read_bytes()


def test_claims_about_cnns_are_shown_where_there_are_such_runs(runs, tmp_path):
    subject = "arXiv 2507.23536"
    assert subject not in write_report(runs, tmp_path / "report.html").read_text()
    write(runs, "cnn", backbone="demo_cnn_digits", dataset="digits-c:mixed:5")
    with mock.patch("toolkit.analysis.claims_cnns._of_costs", list):  # which take seconds
        page = Page(write_report(runs, tmp_path / "report.html").read_text())
    assert f"then what {subject} says of CNNs" in page.text
    assert "GaLore's accuracy is the closest" in page.text and "no finished run of full" in page.text


@pytest.mark.parametrize("content", ["nothing", "missing", "failures"])
def test_a_folder_with_nothing_to_compare_makes_a_report_that_says_so(tmp_path, content):
    folder = tmp_path / "runs"
    if content == "nothing":
        folder.mkdir()
    if content == "failures":
        write(folder, "one", status="failed", error="Boom: it broke")
        record = json.loads((folder / "one" / "record.json").read_text())
        empty = {group: {} for group in ("data", "quality", "time", "energy", "memory", "flops", "scores")}
        (folder / "one" / "record.json").write_text(json.dumps(record | empty))
    page = Page(write_report(folder, tmp_path / "report.html").read_text())
    assert "No run ended well" in page.text and "no run ended ok" in page.text
    assert ("Boom: it broke" in page.text) == (content == "failures")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("half", '{"run": {', "JSONDecodeError"),
        ("list", "[]", "no record"),
        ("foreign", '{"a": 1}', "KeyError"),
        ("older", {"schema_version": 4}, "schema version 4"),
        ("newer", {"schema_version": "6"}, "schema version '6'"),
        ("text", {"test_top1_pct": "high"}, "test_top1_pct is 'high', not one number"),
        ("flag", {"train_seconds": True}, "train_seconds is True, not one number"),
        ("endless", {"train_seconds": float("inf")}, "train_seconds is inf"),
        ("nested", {"method": ["lora"]}, "method is ['lora'], not text"),
        ("budget", {"budget": "2GB"}, "budget is '2GB', not a number of bytes"),
        ("seedless", {"seed": None}, "no seed"),
        ("again", {"experiment_id": "lora-none-0"}, "a second record of the experiment in"),
    ],
)
def test_what_is_no_record_is_named(runs, name, content, why):
    if isinstance(content, dict):
        write(runs, name, **content)
    else:
        (runs / name).mkdir()
        (runs / name / "record.json").write_text(content)
    read = read_runs(runs)
    assert len(read.frame) == 12
    (row,) = report.left_out(read).text.itertuples()
    assert why in row.why and row.file.endswith("/record.json")


def test_bad_paths_are_refused(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_report(tmp_path / "file", tmp_path / "report.html")
    with pytest.raises(InputError, match="is a folder"):
        write_report(runs, tmp_path)


# --- hostile text ---

OURS = {  # what the template and the figures consist of
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "ul", "ol", "li", "nav", "a",
    "em", "strong", "code", "figure", "figcaption", "span", "div", "table", "thead", "tbody", "tr", "th",
    "td", "bdi", "svg", "g", "rect", "path", "text",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "class", "id", "scope", "href", "aria-label",
    "xmlns", "role", "width", "height", "viewbox", "font-family", "font-size", "font-weight", "fill", "style",
    "x", "y", "d", "stroke", "stroke-width", "stroke-dasharray", "transform", "text-anchor",
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report on runs whose names and errors are the hostile strings, three each."""
    runs = tmp_path_factory.mktemp("hostile")
    for number, text in enumerate(HOSTILE):
        names = {"backbone": text, "method": text, "phase": "inference", "device_name": text}
        write(runs, f"ok-{number}", **names)
        write(runs, f"failed-{number}", status="failed", dataset=text, checkpointing=text, error=text)
        write(runs, f"skipped-{number}", schema_version=4, status=text)
    return write_report(runs, runs / "out" / "report.html")


def test_hostile_text_makes_no_element_and_no_attribute(hostile):
    page = Page(hostile.read_text())
    assert {name for name, _ in page.elements} <= OURS
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    for name, attributes in page.elements:
        if name == "a":
            assert re.match(r"#[a-z]+$|report_tables/[a-z_]+\.(csv|tex|md)$", attributes["href"])
    for text in HOSTILE:
        assert visible(text) in page.text


def test_hostile_text_in_csv_is_text(hostile):
    folder = hostile.parent / "report_tables"
    rows = list(csv.DictReader(io.StringIO((folder / "failures.csv").read_bytes().decode())))
    found = {row["error"] for row in rows}
    for text in map(visible, HOSTILE):
        assert text in found or f"'{text}" in found
    files = [io.StringIO(path.read_bytes().decode(), newline="") for path in folder.glob("*.csv")]
    every = [cell for file in files for row in csv.reader(file) for cell in row]
    assert not any(re.match(r"[=@＝＋－＠]|[+-](?!\d+(\.\d+)?(e[+-]?\d+)?$)", cell) for cell in every)


def test_hostile_text_in_latex_is_text(hostile):
    text = (hostile.parent / "report_tables" / "failures.tex").read_text()
    known = r"\\(begin|end)\{tabular\}|\\(top|mid|bottom)rule|\\\\$|\\textasciitilde |\\textasciicircum "
    known += r"|\\textbackslash |\\space |\\[&%$#_{}]"
    rest = re.sub(known, "", text, flags=re.M)
    assert "\\" not in rest and "$" not in rest and not re.search(r"^[\[*]", text, flags=re.M)
    assert r"\textbackslash input\{/etc/passwd\}" in text and len(text.splitlines()) == len(HOSTILE) + 6


def test_hostile_text_in_markdown_is_text(hostile):
    text = (hostile.parent / "report_tables" / "failures.md").read_text()
    rendered = mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "url"])(text)
    page = Page(rendered)
    assert {name for name, _ in page.elements} == {"table", "thead", "tbody", "tr", "th", "td"}
    for text in HOSTILE:
        assert visible(text).strip() in page.text


def test_numbers_are_no_formulas():
    frame = pd.DataFrame({"a": ["-5", "+1.5e-3", "-5+x", "-"], "b": [-5.0, -0.25, 1.0, 2.0]})
    rows = list(csv.reader(io.StringIO(Table("t", frame, values=frame).csv())))
    assert rows[1:] == [["-5", "-5.0"], ["+1.5e-3", "-0.25"], ["'-5+x", "1.0"], ["'-", "2.0"]]


def test_a_table_in_a_notebook_is_escaped():
    table = Table("t", pd.DataFrame({"<b>": ["<script>"]}), notes=("<img>",))
    assert not {"b", "script", "img"} & {name for name, _ in Page(table._repr_html_()).elements}
