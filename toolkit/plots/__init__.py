"""Figures: every function draws one and returns it; `save` writes it for the README or a report."""

from toolkit.plots.images import confusion_matrix, examples, mistakes, predicted, test_examples, test_pictures
from toolkit.plots.runs import (
    accuracy_against,
    costs_by_batch,
    learning_curves,
    learning_rates,
)
from toolkit.plots.step import (
    memory_over_step,
    recompute_against_budget,
    smallest_budgets,
    step_figure,
)
from toolkit.plots.style import save

__all__ = [
    "accuracy_against",
    "confusion_matrix",
    "costs_by_batch",
    "examples",
    "learning_curves",
    "learning_rates",
    "memory_over_step",
    "mistakes",
    "predicted",
    "recompute_against_budget",
    "save",
    "smallest_budgets",
    "step_figure",
    "test_examples",
    "test_pictures",
]
