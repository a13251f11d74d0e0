"""Tables for people (text with units and intervals) and for programs (plain numbers); pandas writes both."""

from __future__ import annotations

import html
import re
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from toolkit.analysis.statistics import SHOWN, parameters
from toolkit.budget import STRATEGIES, format_bytes
from toolkit.files import write_atomically
from toolkit.measure.quantities import QUANTITIES, Quantity

LATEX = {"\\": r"\textbackslash ", "~": r"\textasciitilde ", "^": r"\textasciicircum "}
LATEX = str.maketrans(LATEX | {character: f"\\{character}" for character in "&%$#_{}"})


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
        elif name.endswith("_sha256"):
            title = f"{name.removesuffix('_sha256')} data"
            columns[title] = [_missing(value) or str(value)[:8] for value in frame[name]]
        else:
            title = name.removeprefix("n_").replace("_pct", " (%)").replace("_", " ")
            title = quantity.title if quantity else title
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


def plain_table(text: pd.DataFrame) -> str:
    """A table of text for a terminal, below its caption."""
    text, caption = without_constants(text)
    return "\n".join(filter(None, (caption, text.to_string(index=False))))


def _missing(value: object) -> str:
    return "–" if pd.isna(value) else ""


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)


def without_constants(text: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """A table of text without the columns that tell its rows nothing, and a caption that tells them once.

    These are what has one value in all rows, unless it can be better or worse, what was not measured, and a
    score that is there under the name of its task, too.
    """
    score = QUANTITIES["score_pct"].title
    if score in text and any(text[name].equals(text[score]) for name in text if name != score):
        text = text.drop(columns=score)
    figures = {quantity.title for quantity in QUANTITIES.values() if quantity.better} | {*STRATEGIES}
    absent = [name for name in text if len(text) and text[name].eq("" if name == "not ok" else "–").all()]
    alike = [name for name in text if len(text) > 1 and text[name].nunique() == 1 and text[name].iloc[0]]
    alike = [name for name in alike if name not in figures and name not in absent]
    if len(alike) + len(absent) == len(text.columns):
        return text, ""
    parts = [f"In all rows: {', '.join(f'{name} {text[name].iloc[0]}' for name in alike)}."] if alike else []
    missing = [name for name in absent if name in figures]
    parts += [f"Not measured: {', '.join(missing)}."] if missing else []
    return text.drop(columns=[*alike, *absent]), " ".join(parts)


def _best(frame: pd.DataFrame) -> list[tuple[int, str]]:
    """Row and title of the best means of each data set and environment, where there are several values."""
    by = [name for name in ("dataset", "environment") if name in frame]
    best = []
    for name in [name for name in frame if f"{name}_half_width" in frame and QUANTITIES[name].better]:
        values = pd.to_numeric(frame[name]).astype(float) * (-1 if QUANTITIES[name].better == "less" else 1)
        groups = (
            values.groupby([frame[key] for key in by], dropna=False) if by else values.groupby(lambda _: 0)
        )
        first, last = groups.transform("max"), groups.transform("min")
        rows = np.flatnonzero((values == first) & (first > last))
        best += [(row, QUANTITIES[name].title) for row in rows]
    return best


def show(frame: pd.DataFrame, caption: str = "") -> Styler:
    """`as_text` for a notebook: what is alike in all rows in the caption, the best means in bold.

    All rows, without an index; names are shown as text.
    """
    text, alike = without_constants(as_text(frame).reset_index(drop=True))
    style = text.style.hide(axis="index").format(escape="html").format_index(escape="html", axis=1)
    bold = pd.DataFrame("", text.index, text.columns)
    for row, name in _best(frame):
        if name in bold:
            bold.loc[row, name] = "font-weight: bold"
    said = html.escape(f"{caption} {alike}".strip())
    return style.apply(lambda _: bold, axis=None).set_caption(said) if len(text.columns) else style


def write_table(
    frame: pd.DataFrame, path: Path, shown: pd.DataFrame | None = None, caption: str = "", label: str = ""
) -> None:
    """Write `frame` as `path` with .csv (all digits), .tex (booktabs, ready to include) and .md.

    `shown`: what people read in the last two, if it is not all of `frame`; they are as from `show`.
    """
    shown = frame if shown is None else shown
    style = show(shown, caption)
    text, alike = without_constants(as_text(shown))
    style.format(escape="latex").format_index(escape="latex", axis=1)
    latex = style.to_latex(
        caption=f"{caption} {alike}".strip().translate(LATEX), label=label or None, hrules=True,
        position_float="centering", convert_css=True,
    )  # fmt: skip
    formats = {
        ".csv": frame.to_csv(index=False),
        ".tex": latex if len(text.columns) else "",
        ".md": f"{_escaped(f'{caption} {alike}'.strip())}\n\n{markdown(text)}".lstrip("\n"),
    }
    for ending, content in formats.items():
        write_atomically(path.with_name(path.name + ending), content.encode())


def by_strategy(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One quantity of `table` (rows of `means`), as text: methods in rows, strategies in columns."""
    known = {*SHOWN, "environment", *parameters()} - {"checkpointing"}
    keys = as_text(table[[name for name in table if name in known]])
    cells = [_mean(QUANTITIES[quantity], row) for row in table.to_dict("records")]
    rows = keys.assign(cell=cells, strategy=table.get("checkpointing"))
    wide = rows.pivot_table("cell", [*keys], "strategy", aggfunc="first", sort=False).fillna("–")
    return wide.reset_index().rename_axis(columns=None)


def markdown(text: pd.DataFrame) -> str:
    """A pipe table; `DataFrame.to_markdown` needs another package and does not escape names."""
    lines = [list(text.columns), ["---"] * len(text.columns), *text.to_numpy().tolist()]
    cells = [[_escaped(cell) if line is not lines[1] else cell for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _escaped(cell: str) -> str:
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(cell, quote=False)).replace("\n", " ")
