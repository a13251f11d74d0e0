"""Names in pictures."""


def plain(text: str) -> str:
    """`text` as matplotlib shall draw it: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
