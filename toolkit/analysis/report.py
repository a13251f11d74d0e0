"""One self-contained page of what finished runs say: tables, figures, tests, and published claims.

`write_report` reads the records below a folder and writes an HTML file that loads nothing and runs nothing,
with every table beside it as CSV, LaTeX and Markdown.  Each section is a function, which
`notebooks/report.ipynb` calls one by one.  The same records give the same bytes.

From the bottom: `tables` has the formats of a table, `reading` the records, `paired` tests of differences,
`verdicts` the published claims, `sections` makes the tables and pictures, `page` puts them together.
"""

from toolkit.analysis.page import write_report
from toolkit.analysis.reading import read_runs
from toolkit.analysis.sections import (
    budgets,
    claims,
    data_sets,
    effects,
    environments,
    failures,
    left_out,
    pictures,
    results,
    scores,
    what_ran,
)

__all__ = [
    "budgets",
    "claims",
    "data_sets",
    "effects",
    "environments",
    "failures",
    "left_out",
    "pictures",
    "read_runs",
    "results",
    "scores",
    "what_ran",
    "write_report",
]
