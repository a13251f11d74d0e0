"""The report page: whole, without code, and without anything that a browser would fetch."""

import pytest
from bs4 import BeautifulSoup

from toolkit.batch.report import write_report
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.training.record import RunRecord


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report on one failed run."""
    runs = tmp_path_factory.mktemp("runs")
    RunRecord.of_failure(Experiment(device="cpu"), "ValueError: <b>no</b>").save(runs / "one")
    return write_report(runs, runs / "out" / "report.html")


def test_the_page_is_whole_and_loads_nothing(report):
    page = BeautifulSoup(report.read_text(), "html.parser")
    assert not page.find_all(["script", "link", "iframe", "b"])
    assert "analysis.read" not in page.get_text(), "code is left out"
    assert all(image["src"].startswith("data:") for image in page.find_all("img"))
    assert all(link["href"].startswith("#") for link in page.find_all("a"))
    assert "ValueError: <b>no</b>" in page.get_text() and "no run ended ok" in page.get_text()
    assert page.title.get_text() == page.h1.find(string=True)


def test_every_table_is_written_in_three_formats(report):
    names = {path.stem for path in (report.parent / "report_tables").iterdir()}
    assert {"results", "effects_of_methods", "budgets", "claims", "failures"} <= names
    endings = [path.suffix for path in (report.parent / "report_tables").iterdir()]
    assert endings.count(".csv") == endings.count(".tex") == endings.count(".md") == len(names)


def test_bad_paths_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_report(tmp_path / "file", tmp_path / "report.html")
    with pytest.raises(InputError, match="is a folder"):
        write_report(tmp_path, tmp_path)
