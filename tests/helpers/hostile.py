"""Names and errors with characters that mean something in HTML, LaTeX, Markdown or mathtext."""

from __future__ import annotations

HOSTILE: list[str] = [
    "<script>alert(1)</script>",
    '" onmouseover="alert(2)',
    "&lt;b&gt; & %s ${x} {{y}}",
    r"$\bad$ \input{x} # _ ^ ~",
    "| `code` **bold** [a](b) |",
    "🦜 Ünïcödé 数字 שלום",
]
