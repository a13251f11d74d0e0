"""Tables for people (text with units and intervals) and for programs (plain numbers); pandas writes both."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pandas as pd
from pandas.io.formats.style import Styler

from toolkit.budget import format_bytes
from toolkit.files import write_atomically
from toolkit.measure.quantities import QUANTITIES, Quantity


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` for people: quantities in their units, means as `mean ± half width`, "–" for what is missing.

    A mean of fewer runs than `n` says so.
    """
    means = [name.removesuffix("_half_width") for name in frame if name.endswith("_half_width")]
    hidden = {f"{name}{end}" for name in means for end in ("_half_width", "_n")}
    columns = {}
    for name in [name for name in frame if name not in hidden]:
        quantity = QUANTITIES.get(name)
        if name in means:
            columns[quantity.title] = [_mean(quantity, row) for row in frame.to_dict("records")]
        elif name == "budget_bytes":
            columns["budget"] = [_missing(value) or format_bytes(value) for value in frame[name]]
        elif name == "environment":
            words = frame.attrs.get("environments", {})
            columns[name] = [_missing(value) or words.get(value, str(value)) for value in frame[name]]
        elif quantity is not None and _is_number(frame[name]):
            columns[quantity.title] = frame[name].map(quantity.text)
        else:
            title = quantity.title if quantity else name.replace("_pct", " (%)").replace("_", " ")
            columns[title] = [_missing(value) or _cell(value) for value in frame[name]]
    return pd.DataFrame(columns, index=frame.index, dtype=object)


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _mean(quantity: Quantity, row: dict) -> str:
    half_width, n = row[f"{quantity.name}_half_width"], row[f"{quantity.name}_n"]
    text = quantity.text(row[quantity.name])
    if n > 1:
        text += f" ± {quantity.text(half_width)}"
    return f"{text} (n = {n})" if 0 < n < row["n"] else text


def _missing(value: object) -> str:
    return "–" if pd.isna(value) else ""


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def show(frame: pd.DataFrame) -> Styler:
    """`as_text` for a notebook: without an index, with all rows, and with names shown as text."""
    return as_text(frame).style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)


def write_table(frame: pd.DataFrame, path: Path, shown: pd.DataFrame | None = None) -> None:
    """Write `frame` as `path` with .csv (plain numbers), .tex (booktabs) and .md (both as people read it).

    `shown`: what people read, if it is not all of `frame`.
    """
    text = as_text(frame if shown is None else shown)
    formats = {
        ".csv": frame.to_csv(index=False),
        ".tex": text.to_latex(index=False, escape=True) if len(text.columns) else "",
        ".md": markdown(text),
    }
    for ending, content in formats.items():
        write_atomically(path.with_name(path.name + ending), content.encode())


def markdown(text: pd.DataFrame) -> str:
    """A pipe table; `DataFrame.to_markdown` needs another package and does not escape names."""
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    cells = [[_escaped(cell) if line is not lines[1] else cell for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _escaped(cell: str) -> str:
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(cell, quote=False)).replace("\n", " ")
