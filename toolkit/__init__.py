"""Adapt pretrained vision models inside a memory budget."""

import importlib

# Resolved on first use (PEP 562), so that `toolkit.budget` alone costs no more than torch.
_HOME = {
    "Experiment": "experiment",
    "InputError": "errors",
    "Meter": "measure",
    "RunRecord": "records",
    "adapt": "methods",
    "auto_checkpoint": "budget",
    "build_backbone": "backbones",
    "build_model": "preview",
    "evaluate": "evaluation",
    "evaluate_baseline": "baselines",
    "evaluate_split": "evaluation",
    "fit": "training",
    "flops": "measure",
    "load_adapted": "weights",
    "load_dataset": "datasets",
    "load_records": "records",
    "netscore": "scores",
    "plan": "budget",
    "run_folder": "records",
    "save_adapted": "weights",
    "seed_everything": "training",
    "selective_scan": "backbones.selective_scan",
    "summarize": "methods",
    "test": "evaluation",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
