import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.budget import format_bytes, parse_bytes
from toolkit.errors import InputError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("800 MB", 800_000_000),
        ("28 mib", 28 * 2**20),
        ("  64kib ", 65536),
        (".5 GiB", 2**29),
        ("123", 123),
        (123, 123),
    ],
)
def test_sizes_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "two GB", "-1GB", "-5", "0", "0 GB", "1e9", "2 GX", "GB", "1 2GB", "nan", None]
)
def test_no_size_is_refused_by_name(text):
    with pytest.raises(InputError, match="budget"):
        parse_bytes(text)


@given(st.integers(1, 2**50))
def test_plain_bytes_are_exact(count):
    assert parse_bytes(count) == parse_bytes(str(count)) == parse_bytes(f"{count} B") == count


@given(st.integers(1, 2**40), st.sampled_from(["kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_units_are_exact(number, unit):
    factor = (1024 if "i" in unit else 1000) ** ("kmg".index(unit[0].lower()) + 1)
    assert parse_bytes(f"{number} {unit}") == number * factor


def test_format():
    assert format_bytes(28 * 2**20) == "28.0 MiB"
    assert format_bytes(3 * 2**29) == "1.50 GiB"
