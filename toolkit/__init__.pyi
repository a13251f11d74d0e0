# The public names: `__init__.py` imports each on first use, editors and type checkers read them here.
from .backbones import build_backbone
from .backbones.selective_scan import selective_scan
from .baselines import evaluate_baseline
from .budget import TensorMemory
from .datasets import load_dataset
from .errors import InputError
from .experiment import Experiment
from .forecast.explorer import Explorer
from .forecast.forecasts import preview, what_fits
from .forecast.step import memory_table, step_memories
from .measure import Meter, flops
from .measure.scores import netscore
from .methods import adapt, summarize
from .methods.lean import auto_checkpoint, plan  # which registers the lean forms of low-rank layers
from .methods.weights import load_adapted, save_adapted
from .model import build_model, seed_everything
from .model.export import export_model, push_model
from .model.saved import load_model, save_model
from .training.evaluation import evaluate, evaluate_split, test
from .training.loop import fit, train
from .training.record import RunRecord, load_records, run_folder

__version__: str
__all__ = [
    "Experiment", "Explorer", "InputError", "Meter", "RunRecord", "TensorMemory", "adapt",
    "auto_checkpoint", "build_backbone", "build_model", "evaluate", "evaluate_baseline", "evaluate_split",
    "export_model", "fit", "flops", "load_adapted", "load_dataset", "load_model", "load_records",
    "memory_table", "netscore", "plan", "preview", "push_model", "run_folder", "save_adapted",
    "save_model", "seed_everything", "selective_scan", "step_memories", "summarize", "test", "train",
    "what_fits",
]  # fmt: skip
