"""Foundation models that are evaluated, not trained: zero-shot, frozen features, generative.

`evaluate_baseline` returns the record of one; `prepare`, `test` and `record_of` are its steps.
"""

from toolkit.baselines.evaluate import evaluate_baseline, prepare, record_of, test
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.memory_estimate import MemoryEstimate, estimate_table
from toolkit.baselines.prepared import Prepared
from toolkit.baselines.registry import BASELINES, PROTOCOLS, Baseline

__all__ = [
    "BASELINES",
    "PROTOCOLS",
    "Baseline",
    "BaselineExperiment",
    "MemoryEstimate",
    "Prepared",
    "estimate_table",
    "evaluate_baseline",
    "prepare",
    "record_of",
    "test",
]
