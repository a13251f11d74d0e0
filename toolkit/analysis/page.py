"""The page: all sections in one HTML file, and every table and picture beside it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from toolkit.analysis import sections
from toolkit.analysis.reading import read_runs
from toolkit.errors import InputError
from toolkit.files import write_atomically


def write_report(runs: Path, output: Path) -> Path:
    """Write the report on the records below `runs` to the file `output`.

    Tables (CSV, LaTeX, Markdown) and pictures (SVG) go to the folder `<stem>_tables` too.

    A folder without records makes a report that says so.  Raises `InputError` if `runs` is a file or
    `output` a folder.
    """
    output = Path(output).resolve()
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the file to write, such as {output / 'report.html'}.")
    read = read_runs(runs)
    plain = (
        sections.what_ran, sections.environments, sections.data_sets, sections.results, sections.budgets,
        sections.claims, sections.failures, sections.left_out,
    )  # fmt: skip
    made = [section(read) for section in plain]
    made += [sections.scores(read, phase) for phase in ("training", "inference")]
    made += [sections.effects(read, of) for of in sections.REFERENCES]
    made = {table.name: table for table in made}
    folder = output.with_name(f"{output.stem}_tables")

    def href(path: str | Path) -> str:
        return quote(os.fsencode(os.path.relpath(path, output.parent)))

    pictures = sections.pictures(read)
    page = _PAGES.get_template("report.html.jinja").render(
        runs=read, tables=made, statuses=read.frame.status.value_counts(), facts=sections.facts(made),
        pictures=[(title, Markup(svg)) for title, svg in pictures], href=href, folder=folder,
    )  # fmt: skip
    for table in made.values():
        for ending, text in (("csv", table.csv()), ("tex", table.latex()), ("md", table.markdown())):
            write_atomically(folder / f"{table.name}.{ending}", text.encode())
    for number, (_, svg) in enumerate(pictures, start=1):
        write_atomically(folder / f"picture_{number}.svg", svg.encode())
    write_atomically(output, page.encode())
    return output


_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("toolkit.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
