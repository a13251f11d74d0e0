"""What a training step of a method keeps and holds, and tables of finished runs with what a step takes.

Parameters that train are only a part of the memory.  What backward needs of the forward pass is mostly
kept for layers that are not trained at all, because the gradient has to come through them: here it is
counted, tensor by tensor, in a step that really runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import pandas as pd
import torch
from torch.utils._pytree import tree_leaves

from toolkit.analysis.statistics import compare, groups, mean_and_interval
from toolkit.budget import device_memory, tensors_of
from toolkit.budget.step import make_state, run_step
from toolkit.experiment import Experiment, Parameters
from toolkit.forecast.steps import step_of
from toolkit.measure.memory import KeptTensors, MemoryTrace
from toolkit.methods import METHODS, summarize
from toolkit.training.result import FitResult

MIB = 2**20


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step whose optimizer has its state."""

    kept_bytes: int  # by autograd at the end of the forward pass, weights and buffers left out
    peak_bytes: int  # highest moment of the whole step, weights and optimizer state included
    trained_parameters: int
    trace: list[dict]  # see `MemoryTrace.segments`


def step_memory(experiment: Experiment, num_classes: int) -> StepMemory:
    """Run a step of `experiment` on a batch of zeros, with random weights and nothing checkpointed.

    What several operators keep is counted once, by storage.  Raises `InputError` for a model that cannot be
    built or adapted.
    """
    step = step_of(experiment, num_classes)
    kept = KeptTensors(tensors_of(step.model))
    memory = device_memory(torch.device(experiment.device))
    memory.track(tensors_of(step.model))
    memory.track(tree_leaves(step.batch))
    trace = MemoryTrace(memory, step.model)
    with memory:
        make_state(step.model, step.optimizer)
        memory.reset_peak()
        run_step(step.model, step.batch, step.loss, step.optimizer, experiment.precision, trace, kept)
    return StepMemory(kept.forward_bytes, memory.peak_bytes, summarize(step.model).trainable, trace.segments)


def memory_table(steps: Mapping[str, StepMemory]) -> pd.DataFrame:
    """One row for each step: what trains, what is kept for backward, and the peak."""
    return pd.DataFrame(
        {
            "trained": {name: f"{step.trained_parameters:,}" for name, step in steps.items()},
            "kept for backward (MiB)": {name: step.kept_bytes / MIB for name, step in steps.items()},
            "peak of the step (MiB)": {name: step.peak_bytes / MIB for name, step in steps.items()},
        }
    )


def runs_of(records: pd.DataFrame, experiments: Iterable[Parameters]) -> pd.DataFrame:
    """The rows of `records` that are runs of `experiments`, on whatever device."""
    names = [field.name for field in fields(Experiment) if field.name != "device"]
    wanted = {_key(e.to_dict(), names) for e in experiments if isinstance(e, Experiment)}
    rows = records.to_dict("records")
    chosen = [row["phase"] == "training" and _key(row, names) in wanted for row in rows]
    return records[pd.Series(chosen, index=records.index, dtype=bool)]


def _key(row: Mapping, names: list[str]) -> tuple:
    values = (row[name] for name in names)  # a column of a frame may have made floats of integers
    return tuple(value if isinstance(value, str) else float(value) for value in values)


def run_table(records: pd.DataFrame) -> pd.DataFrame:
    """`statistics.compare` with the time of a step, without columns that say nothing: empty ones, and a data
    set, backbone or strategy that all runs have.

    Raises `InputError` where runs were not measured alike.
    """
    table = compare(records)
    table.insert(len(table.columns) - 2, "step ms", [_step_ms(group) for _, group in groups(records)])
    same = [name for name in ("dataset", "backbone", "checkpointing") if table[name].nunique() == 1]
    empty = [name for name in table if set(table[name]) <= {"–", ""}]
    return table.drop(columns=[*same, *empty])


def _step_ms(group: pd.DataFrame) -> str:
    ok = group[group.status == "ok"]
    mean, half_width, _ = mean_and_interval(1000 * ok.train_seconds / ok.steps)
    if mean is None:
        return "–"
    return f"{mean:.1f}" if half_width is None else f"{mean:.1f} ± {half_width:.1f}"


def as_usual(records: pd.DataFrame) -> pd.DataFrame:
    """The runs in which every option of the method has its usual value: the most frequent one among the
    method's runs, the default among equals."""
    return _rows(records, {method: () for method in records.method.unique()})


def ablations(records: pd.DataFrame) -> pd.DataFrame:
    """What each option of each method changes, all others at their usual value; empty if none was varied.

    `records`: of one data set and backbone.  Columns: `method`, `option`, `value`, and those of `run_table`
    that tell what came out.
    """
    parts = []
    for method in (m for m in METHODS if m in set(records.method)):
        own = records[records.method == method]
        for option in _options(method):
            series = _rows(own, {method: (option,)})
            if series[option].nunique() > 1:
                table = run_table(series)
                table.insert(1, "option", option)
                table.insert(2, "value", table.pop(option).map(lambda value: str(value) or "none"))
                parts.append(table)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _options(method: str) -> tuple[str, ...]:
    return (*METHODS[method].apply_options, *METHODS[method].optimizer_options, "feature_cache")


def _rows(records: pd.DataFrame, free: Mapping[str, tuple[str, ...]]) -> pd.DataFrame:
    """Rows with the usual value of all options of their method but those that are `free`."""
    defaults = {field.name: field.default for field in fields(Experiment)}
    chosen = pd.Series(True, index=records.index)
    for method, left_free in free.items():
        mine = records.method == method
        for option in set(_options(method)) - set(left_free):
            counts = records.loc[mine, option].value_counts()
            most = list(counts.index[counts == counts.max()])
            usual = defaults[option] if defaults[option] in most else most[0]
            chosen &= ~mine | (records[option] == usual)
    return records[chosen]


def epoch_row(result: FitResult) -> dict[str, str]:
    """How long an epoch of a run took, and what it reached, as text."""
    epochs, window = len(result.history), result.windows.get("features")
    if not epochs:
        return {"features (s)": "–", "an epoch (s)": "–", "peak (MiB)": "–", "validation accuracy (%)": "–"}
    found = " (found on disk)" if result.features_cached else ""
    return {
        "features (s)": f"{window['seconds']:.2f}{found}" if window else "–",
        "an epoch (s)": f"{result.train_seconds / epochs:.2f}",
        "peak (MiB)": f"{result.peak_bytes / MIB:.2f}",
        "validation accuracy (%)": f"{result.history[-1]['val_top1_pct']:.1f}",
    }
