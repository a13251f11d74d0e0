"""Data sets' tests: a cache of their own, and the embedded dense sets, which take seconds to compose."""

import pytest

from toolkit.datasets import Splits, image_files, load_dataset


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(image_files, "CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def embedded() -> dict[str, Splits]:
    return {name: load_dataset(name) for name in ("mosaics", "digit_scenes")}
