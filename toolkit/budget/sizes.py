"""Byte counts for people: `parse_bytes("1.5 GiB")`, `format_bytes(1610612736)`."""

from __future__ import annotations

import re

from toolkit.errors import InputError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_PATTERN = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Whole bytes of `2_000_000_000`, `"2GB"` (10^9), `"1.5 GiB"` (2^30) or `"800 MB"`.

    Raises `InputError` for anything else, and for sizes below one byte.
    """
    match = _PATTERN.fullmatch(str(size))
    unit = match and _UNITS.get(match["unit"].lower())
    if not unit:
        raise InputError(f"budget {size!r} is no size; write for example '2GB', '1.5 GiB' or plain bytes.")
    count = int(float(match["number"]) * unit) if "." in match["number"] else int(match["number"]) * unit
    if count < 1:
        raise InputError(f"budget {size!r} must be at least one byte.")
    return count


def format_bytes(count: int) -> str:
    """`count` in MiB, or in GiB from one GiB on."""
    mib = count / 2**20
    return f"{mib / 1024:,.2f} GiB" if mib >= 1024 else f"{mib:,.1f} MiB"
