"""Images from formulas, which the demo backbones are pretrained on."""

import sys

from toolkit.files import NOTEBOOKS


def test_formula_images_are_reproducible_and_not_empty(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(NOTEBOOKS / "extras"), *sys.path])
    from formulas import formula_splits

    make = dict(fractals=2, curves=1, textures=2, images_per_class=5, size=32)
    first, again, other = (formula_splits(**make, seed=seed) for seed in (0, 0, 1))
    assert first.hashes == again.hashes != other.hashes
    assert first.classes == ["fractal 0", "fractal 1", "curve 0", "texture 0", "texture 1"]
    assert len(first.train) == 25 and first.train[0][0].shape == (3, 32, 32)
    contrast = first.train.images.reshape(25, -1).std(axis=1)
    assert contrast.min() > 5, "no picture is empty"
