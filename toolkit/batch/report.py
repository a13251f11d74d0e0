"""The report: the notebook `7_results`, executed and exported to one HTML file without its code.

The page loads nothing: pictures are inside it, and nbconvert's "basic" template brings no scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from traitlets.config import Config

from toolkit.batch.sweep import execute_notebook
from toolkit.errors import InputError
from toolkit.files import write_atomically

NOTEBOOK = "7_results"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Results of finished runs</title>
<style>
body {{ font: 16px/1.5 Georgia, serif; max-width: 76rem; margin: 3rem auto; padding: 0 1.5rem; }}
p, li {{ max-width: 46rem; }} h2 {{ margin-top: 3rem; border-top: 1px solid; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; font: .78rem/1.35 sans-serif; display: block; overflow-x: auto; }}
th {{ text-align: left; border-bottom: 1px solid; }}
th, td {{ padding: .28rem .9rem .28rem 0; vertical-align: top; }}
.anchor-link {{ display: none; }}
</style>
<body>
{body}
</body>
</html>
"""


def write_report(
    runs: Path, output: Path, figures: Path | None = None, figure_ids: Sequence[str] = ()
) -> Path:
    """Write the report on the records below `runs` to the file `output`.

    Tables (CSV, LaTeX, Markdown) go to the folder `<stem>_tables` next to it, and into `figures`, if any, the
    pictures of accuracy against memory and time, of the experiments `figure_ids`.  A folder without records
    makes a report that says so.  Raises `InputError` if `runs` is a file or `output` a folder.
    """
    runs, output = Path(runs).resolve(), Path(output).resolve()
    if runs.is_file():
        raise InputError(f"{runs} is a file; give the folder in which runs are kept.")
    if output.is_dir():
        raise InputError(f"{output} is a folder; give the file to write, such as {output / 'report.html'}.")
    parameters = {"runs": str(runs), "tables": str(output.with_name(f"{output.stem}_tables"))}
    if figures:
        parameters |= {"figures": str(figures), "figure_ids": ",".join(figure_ids)}
    executed = output.with_suffix(".ipynb")
    execute_notebook(NOTEBOOK, executed, parameters)
    write_atomically(output, page_of(executed).encode())
    return output


def page_of(notebook: Path) -> str:
    """An executed notebook as one page: no code, and no cell that needs a live kernel."""
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {"interactive", "parameters", "injected-parameters"}
    options = {"template_name": "basic", "exclude_input": True, "exclude_output_prompt": True}
    exporter = HTMLExporter(config=config, **options)
    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)  # the state of what needs a kernel
    body, _ = exporter.from_notebook_node(content)
    return PAGE.format(body=body)
