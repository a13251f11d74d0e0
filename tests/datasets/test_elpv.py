"""ELPV: found without an import, checked, and split by groups of near-twins."""

import importlib.metadata
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from toolkit.datasets import elpv, load_dataset
from toolkit.errors import InputError
from toolkit.files import sha256_of

COUNT = 2_624


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Pictures of 2 x 2 pixels in the form of the package."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(COUNT):
        pixels = np.array([[number % 256, number // 256], [0, 0]], np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/cell{number + 1:04}.png")
        probability = ("0.0", "0.3333333333333333", "0.6666666666666666", "1.0")[number % 4]
        lines.append(f"images/cell{number + 1:04}.png  {probability}  mono")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    distribution = SimpleNamespace(locate_file=lambda _: tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(elpv, "LIST_SHA256", sha256_of(tmp_path / "labels.csv"))
    return tmp_path


def test_splits_labels_and_licence(package):
    splits = load_dataset("elpv")
    assert [len(getattr(splits, split)) for split in ("train", "val", "test")] == [1_575, 394, 655]
    found = {}
    for split in (splits.train, splits.val, splits.test):
        found |= {path.name: label for path, label in split.samples}
    assert len(found) == COUNT  # no picture on two sides
    assert [found[f"cell{n:04}.png"] for n in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert "non-commercial" in str(splits)


def test_another_list_is_refused(package):
    (package / "labels.csv").write_text("images/cell0001.png 0.0 mono")
    with pytest.raises(InputError, match=r"labels.csv is not the list .*elpv-dataset==1.0.0.post1"):
        load_dataset("elpv")


def test_without_the_package_the_error_names_command_and_licence(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"CC-BY-NC-SA-4.0.*pip install --no-deps elpv-dataset"):
        load_dataset("elpv")
