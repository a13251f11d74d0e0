"""Small models with random weights, in folders that the loaders of the real ones open.

Tests take each family through its whole path without a download.  The answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tiny_models.contrastive import tiny_contrastive
from tiny_models.generative import tiny_generative
from tiny_models.mobilevlm import tiny_mobilevlm
from toolkit.baselines.registry import baseline_named
from toolkit.errors import InputError

__all__ = ["tiny_contrastive", "tiny_generative", "tiny_hub", "tiny_mobilevlm"]


def tiny_hub(name: str, folder: Path, texts: Sequence[str]) -> Path:
    """Write what stands in for the hub repository of the baseline `name` to `folder`, and return it.

    `texts`: what the tokenizer is made for.  Pass the folder as `source` to `evaluate_baseline`.  Raises
    `InputError` for frozen features, which have `demo_vit`.
    """
    baseline = baseline_named(name)
    if baseline.family == "features":
        raise InputError(f"there is no tiny {name!r}: `demo_vit` is the small model for frozen features.")
    if baseline.family == "contrastive":
        return tiny_contrastive(folder, texts, "siglip" if "SigLIP" in baseline.source else "clip")
    make = tiny_mobilevlm if baseline.kind.startswith("mobilevlm") else tiny_generative
    return make(baseline.kind, folder, list(texts))
