"""A table for people and for programs: text, CSV, LaTeX, Markdown and, in a notebook, HTML.

Names, errors and paths are other people's text: control characters are written out (`visible`), and each
format escapes the rest.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

import pandas as pd

FORMULA = tuple("=+-@＝＋－＠")  # what spreadsheets take for the beginning of one
INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


@dataclass(frozen=True)
class Table:
    """A table for people, and the same with plain numbers for programs."""

    name: str  # of its files
    text: pd.DataFrame
    numbers: tuple[str, ...] = ()  # columns of `text` that are set flush right
    values: pd.DataFrame | None = None  # for the CSV; None: `text`
    notes: tuple[str, ...] = ()  # what [a], [b], ... in cells mean
    links: tuple[str, ...] = ()  # file that the last column of each row leads to; empty: none

    @property
    def lines(self) -> list[str]:
        """The notes with their letters."""
        return [f"{letter(number)} {note}" for number, note in enumerate(self.notes)]

    def csv(self) -> str:
        """RFC 4180; text that a spreadsheet would take for a formula has an apostrophe before it."""
        frame = self.text if self.values is None else self.values
        return frame.map(_no_formula).rename(columns=_no_formula).to_csv(index=False, lineterminator="\r\n")

    def latex(self) -> str:
        """A `tabular` in the style of booktabs, notes as comments below."""
        layout = "".join("r" if column in self.numbers else "l" for column in self.text)
        table = self.text.to_latex(index=False, escape=True, column_format=layout)
        # After the end of a row, a bracket or star would be its argument.
        return re.sub(r"^(?=[\[*])", "{}", table, flags=re.M) + "".join(f"% {line}\n" for line in self.lines)

    def markdown(self) -> str:
        """A pipe table, notes below."""
        rule = ["--:" if column in self.numbers else "---" for column in self.text]
        rows = [[_markdown(cell) for cell in row] for row in (self.text.columns, *self.text.to_numpy())]
        lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
        return "\n".join([*lines, *(f"\n{_markdown(line)}" for line in self.lines), ""])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self.lines)
        return self.text.to_html(index=False, border=0) + notes


def letter(number: int) -> str:
    """[a], [b], ... of the notes 0, 1, ..."""
    return f"[{'abcdefghijklmnopqrstuvwxyz'[number % 26]}{number // 26 or ''}]"


def _no_formula(value: object) -> object:
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    return value if re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", value) else f"'{value}"


def _markdown(text: str) -> str:
    """Escaped, but for the points and signs of numbers."""
    text = re.sub(r"([\\`*_{}\[\]()#|!~$:@^=])", r"\\\1", html.escape(text, quote=False))
    return re.sub(r"(?<!\d)[.+-]", r"\\\g<0>", text)


def visible(text: str) -> str:
    """`text` on one line: control characters, direction marks and lone surrogates as Python writes them."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
