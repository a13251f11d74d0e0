"""The cache on disk: answers and rows are found again, and damaged or foreign ones are not used."""

import numpy as np
import pytest

from toolkit.cache import digest, kept, kept_rows, read, write

QUESTION = {"what": "rows", "sizes": (1, 2)}


def rows(*values: int) -> np.ndarray:
    return np.array([(value, value) for value in values], [("features", "<f4"), ("label", "<i8")])


def test_an_answer_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        assert kept(tmp_path, {"a": 1}, lambda: made.append(1) or {"b": 2}) == {"b": 2}
    assert made == [1] and read(tmp_path, {"a": 2}) is None


def test_an_answer_to_another_question_is_not_used(tmp_path):
    write(tmp_path, {"a": 1}, {"b": 2}, {"x": np.arange(3)})
    (tmp_path / f"{digest({'a': 1})}.npz").rename(tmp_path / f"{digest({'a': 2})}.npz")
    with pytest.warns(UserWarning, match="answers another question"):
        assert read(tmp_path, {"a": 2}) is None


def test_rows_are_streamed_and_found_again(tmp_path):
    def make(put):
        put(rows(1, 2))
        put(rows(3))
        return {"seconds": 4}

    for found in (False, True):
        records, answer, was_found = kept_rows(tmp_path, QUESTION, 3, make)
        assert isinstance(records, np.memmap) and records["label"].tolist() == [1, 2, 3]
        assert answer == {"seconds": 4} and was_found == found


def test_a_wrong_number_of_rows_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="1 rows were made, not 3"):
        kept_rows(tmp_path, QUESTION, 3, lambda put: put(rows(1)) or {})
    assert not [*tmp_path.rglob("rows.*")]
