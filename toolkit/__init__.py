"""Adapt pretrained vision models inside a memory budget."""

from toolkit.backbones import build_backbone
from toolkit.datasets import load_dataset
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.methods import adapt, summarize
from toolkit.records import RunRecord, load_records, run_folder
from toolkit.training import evaluate, evaluate_split, fit, load_adapted, save_adapted, seed_everything

__all__ = [
    "Experiment",
    "InputError",
    "RunRecord",
    "adapt",
    "build_backbone",
    "evaluate",
    "evaluate_split",
    "fit",
    "load_adapted",
    "load_dataset",
    "load_records",
    "run_folder",
    "save_adapted",
    "seed_everything",
    "summarize",
]
