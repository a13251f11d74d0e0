"""Adapt pretrained vision models inside a memory budget."""

import importlib

__version__ = "0.1.0"

# Resolved on first use (PEP 562), so that `toolkit.budget` alone costs no more than torch.
_HOME = {
    "Experiment": "experiment",
    "Explorer": "forecast.explorer",
    "InputError": "errors",
    "Meter": "measure",
    "RunRecord": "training.record",
    "TensorMemory": "budget",
    "adapt": "methods",
    "auto_checkpoint": "methods.lean",  # which registers the lean forms of low-rank layers
    "build_backbone": "backbones",
    "build_model": "model",
    "evaluate": "training.evaluation",
    "evaluate_baseline": "baselines",
    "evaluate_split": "training.evaluation",
    "fit": "training.loop",
    "flops": "measure",
    "load_adapted": "methods.weights",
    "load_dataset": "datasets",
    "load_records": "training.record",
    "memory_table": "forecast.step_memory",
    "netscore": "measure.scores",
    "plan": "methods.lean",
    "preview": "forecast.forecasts",
    "run_folder": "training.record",
    "save_adapted": "methods.weights",
    "seed_everything": "model",
    "selective_scan": "backbones.selective_scan",
    "step_memories": "forecast.step_memory",
    "summarize": "methods",
    "test": "training.evaluation",
    "train": "training.loop",
    "what_fits": "forecast.forecasts",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
