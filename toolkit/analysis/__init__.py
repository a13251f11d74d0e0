"""What finished runs show: tables, statistics, verdicts on published claims.

From the bottom: `statistics` (means, intervals, paired differences), `tables` (formats), `results` (one
function per table), `recommend` (which method for a device), `claims` with one file for each paper.
"""

from toolkit.analysis.recommend import ranking, ranking_table, recommend, write_ranking
from toolkit.analysis.results import (
    best_learning_rates,
    budgets,
    compare,
    data_sets,
    effects,
    effects_table,
    environments,
    failures,
    missing,
    overview,
    read,
    runs_of,
    validation_losses,
    what_ran,
)
from toolkit.analysis.statistics import COSTS, adaptation, differences, mean_and_interval, means, standing
from toolkit.analysis.tables import as_text, by_strategy, plain_table, show, write_table

__all__ = [
    "COSTS",
    "adaptation",
    "as_text",
    "best_learning_rates",
    "budgets",
    "by_strategy",
    "compare",
    "data_sets",
    "differences",
    "effects",
    "effects_table",
    "environments",
    "failures",
    "mean_and_interval",
    "means",
    "missing",
    "overview",
    "plain_table",
    "ranking",
    "ranking_table",
    "read",
    "recommend",
    "runs_of",
    "show",
    "standing",
    "validation_losses",
    "what_ran",
    "write_ranking",
    "write_table",
]
