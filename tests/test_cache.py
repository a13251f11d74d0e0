"""The cache on disk: answers and rows are found again, and damaged or foreign ones are not used."""

import json
import os
import warnings

import numpy as np
import pytest

from toolkit import __main__ as command_line
from toolkit import cache
from toolkit.cache import entries, kept, kept_rows, trim
from toolkit.errors import FileError
from toolkit.files import digest

QUESTION = {"what": "rows", "sizes": (1, 2)}


def rows(*values: int) -> np.ndarray:
    return np.array([(value, value) for value in values], [("features", "<f4"), ("label", "<i8")])


def test_an_answer_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        assert kept(tmp_path, {"a": 1}, lambda: made.append(1) or {"b": 2}) == {"b": 2}
    assert made == [1]


def test_damaged_and_foreign_answers_are_named_and_made_again(tmp_path):
    """Any flipped bit, any truncation, another question's answer, and what is no JSON object."""
    answer = {"text": "a", "number": 0.25, "list": [1, None, True]}
    assert kept(tmp_path, {"a": 1}, lambda: answer) == answer
    assert kept(tmp_path / "other", {"a": 2}, lambda: {"another": 1}) == {"another": 1}
    (path,), (foreign,) = tmp_path.glob("*.json"), (tmp_path / "other").iterdir()
    whole = path.read_bytes()
    flipped = [bytes([*whole[:i], whole[i] ^ 1 << i % 8, *whole[i + 1 :]]) for i in range(len(whole))]
    contents = [*flipped, *(whole[:i] for i in range(0, len(whole), 9)), foreign.read_bytes()]
    contents += [b"null", b"3", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"{}"]
    for content in contents:
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert kept(tmp_path, {"a": 1}, lambda: answer) == answer
        same = content == whole or path.name not in "".join(str(w.message) for w in caught)
        assert not same or json.loads(content) == json.loads(whole), content


def test_a_pipe_in_place_of_an_answer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / f"{digest({'a': 1})}.json")
    with pytest.warns(UserWarning, match="not a regular file"):
        assert kept(tmp_path, {"a": 1}, lambda: {"b": 2}) == {"b": 2}


def test_rows_are_streamed_and_found_again(tmp_path):
    def make(put):
        put(rows(1, 2))
        put(rows(3))
        return {"seconds": 4}

    for found in (False, True):
        records, answer, was_found = kept_rows(tmp_path, QUESTION, 3, make)
        assert len(records) == 3 and records[[2, 0]]["label"].tolist() == [3, 1]
        assert answer == {"seconds": 4} and was_found == found


def test_a_wrong_number_of_rows_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="1 rows were made, not 3"):
        kept_rows(tmp_path, QUESTION, 3, lambda put: put(rows(1)) or {})
    assert not [*tmp_path.rglob("rows.*")]


def test_rows_that_are_damaged_are_made_again_and_a_truncation_is_an_error(tmp_path):
    def make(put):
        put(rows(1, 2, 3))
        return {"seconds": 4}

    records, *_ = kept_rows(tmp_path, QUESTION, 3, make)
    (path,) = tmp_path.glob("*/rows.npy")
    os.truncate(path, path.stat().st_size - 1)
    assert records[[0, 1]]["label"].tolist() == [1, 2]
    with pytest.raises(FileError, match="truncated"):
        records[[0, 2]]
    for place in ("rows.npy", "meta.json"):
        content = bytearray(path.with_name(place).read_bytes())
        content[-20] ^= 1
        path.with_name(place).write_bytes(content)
        with pytest.warns(UserWarning, match="made again"):
            assert kept_rows(tmp_path, QUESTION, 3, make)[1:] == ({"seconds": 4}, False)
        assert kept_rows(tmp_path, QUESTION, 3, make)[2]


NOW = 1_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four entries of 100 bytes, a file or a folder each, by the hours since their last use."""
    monkeypatch.setattr(cache.time, "time", lambda: NOW)
    folder = tmp_path / "cache" / "features"
    for hours in (0, 5, 9, 2):
        path = folder / f"{hours}.json" if hours % 2 else folder / str(hours) / "rows.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (NOW - 3600 * hours,) * 2)
    return folder


@pytest.mark.parametrize(
    ("most_bytes", "left"),
    [(400, "0 2 5.json 9.json"), (399, "0 2 5.json"), (250, "0 2"), (99, "0"), (0, "")],
)
def test_the_least_recently_used_entries_make_room(folder, most_bytes, left):
    """What may be being written stays, unless everything is to go."""
    assert trim(folder, most_bytes) == 400 - 100 * len(left.split())
    assert sorted(path.name for path in entries(folder)) == left.split()


def test_the_limit_is_kept_where_entries_are_made(folder, monkeypatch):
    trimmed = []
    monkeypatch.setattr(cache, "trim", trimmed.append)
    kept_rows(folder, QUESTION, 1, lambda put: put(rows(1)) or {})
    assert trimmed == [folder]
    for number in range(1000):
        kept(folder, {"a": number}, dict)
    assert 1 < len(trimmed) < 20 and {*trimmed} == {folder}, "not at each one of many"


def test_clean_shows_and_frees_kinds_of_entries_but_no_downloads(folder, monkeypatch, capsys):
    downloads = folder.parent / "downloads" / "data.zip"
    downloads.parent.mkdir()
    downloads.write_bytes(bytes(100))
    monkeypatch.setattr(command_line, "CACHE", folder.parent)
    monkeypatch.setattr(command_line, "DOWNLOADS", downloads.parent)
    assert command_line.main(["clean"]) == 0
    assert "features: 4 entries, 400 bytes" in capsys.readouterr().out
    assert command_line.main(["clean", "--remove", "downloads"]) == 2
    assert "Valid: features." in capsys.readouterr().err
    assert command_line.main(["clean", "--remove", "features"]) == 0
    assert "features: 0 entries" in capsys.readouterr().out
    assert not any(folder.iterdir()) and downloads.exists()
