"""Figures: every function draws one and returns it; `save` writes it for the README or a report."""

from toolkit.plots.images import confusion_matrix, examples, test_examples, test_pictures
from toolkit.plots.runs import (
    accuracy_against,
    costs_by_batch,
    learning_curves,
    learning_rates,
    method_grid,
    over_option,
)
from toolkit.plots.step import (
    batch_sizes_against_memory,
    memory_bars,
    memory_over_step,
    recompute_against_budget,
    smallest_budgets,
    step_figure,
)
from toolkit.plots.style import save

__all__ = [
    "accuracy_against",
    "batch_sizes_against_memory",
    "confusion_matrix",
    "costs_by_batch",
    "examples",
    "learning_curves",
    "learning_rates",
    "memory_bars",
    "memory_over_step",
    "method_grid",
    "over_option",
    "recompute_against_budget",
    "save",
    "smallest_budgets",
    "step_figure",
    "test_examples",
    "test_pictures",
]
