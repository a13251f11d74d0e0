"""One file adds a thing: what is registered here goes through a run, a record, a table and a figure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import toolkit
from toolkit import plots
from toolkit.analysis import compare, means
from toolkit.baselines import prompts
from toolkit.batch.dry_run import dry_run
from toolkit.batch.sweep import grid
from toolkit.budget import STRATEGIES, Strategy, find_blocks, register_strategy
from toolkit.datasets import DATASETS, Dataset, Policy, Prompt, Splits, in_memory, register_dataset
from toolkit.errors import Options, option
from toolkit.forecast.forecasts import forecast
from toolkit.measure.quantities import METRICS, Quantity, register, register_metric
from toolkit.methods import METHODS, Hooks, LearningRate
from toolkit.methods import register as register_method
from toolkit.training.result import FitResult

TOY = dict(method="linear", checkpointing="none", epochs=2, batch_size=16, lr=0.01, device="cpu")


def recorded(experiment: toolkit.Experiment, runs) -> pd.DataFrame:
    """Train, test and record `experiment` below `runs`; return the folder's records."""
    splits = toolkit.load_dataset(experiment.dataset)
    toolkit.seed_everything(experiment.seed)
    model = toolkit.build_model(experiment, len(splits.classes))
    model = toolkit.adapt(model, experiment.method, **experiment.method_options)
    folder, meter = toolkit.run_folder(experiment, runs), toolkit.Meter(experiment.device)
    result = toolkit.fit(model, splits, experiment, folder=folder, meter=meter)
    evaluation = toolkit.test(model, splits, experiment, result, meter)
    toolkit.RunRecord.of_run(experiment, splits, model, result, evaluation).save(folder)
    return toolkit.load_records(runs)


# --- a data set -----------------------------------------------------------------------------------


def stripes() -> Splits:
    """Horizontal or vertical stripes under noise."""
    rng, parts = np.random.default_rng(0), {}
    for split, count in (("train", 64), ("val", 16), ("test", 32)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 16, 16), dtype=np.uint8)
        images[labels == 0, ::4] += 150
        images[labels == 1, :, ::4] += 150
        parts[split] = (images, labels)
    return in_memory("stripes", parts, ["horizontal", "vertical"])


@pytest.fixture
def stripes_registered():
    entry = Dataset("stripes", lambda root: stripes(), Policy(flip=True), prompt=Prompt(("{} stripes",)))
    register_dataset(entry)
    yield
    del DATASETS["stripes"]


def test_a_new_data_set_is_one_entry(stripes_registered, tmp_path):
    experiment = toolkit.Experiment(dataset="stripes", **TOY)
    frame = recorded(experiment, tmp_path)
    assert frame.dataset.tolist() == ["stripes"] and frame.status.tolist() == ["ok"]
    assert frame.test_top1_pct[0] > 80
    assert len(compare(frame)) == 1
    plots.accuracy_against(means(frame), "memory")
    plt.close("all")
    assert toolkit.load_dataset("stripes").policy == Policy(flip=True)
    assert prompts.templates("stripes") == ["{} stripes"]
    assert dry_run([experiment], tmp_path).finished.tolist() == [True]


def test_an_unregistered_data_set_is_refused_with_the_known_ones():
    with pytest.raises(toolkit.InputError, match=r"unknown dataset 'stripes'.*digits"):
        toolkit.Experiment(dataset="stripes", **TOY)


# --- a metric -------------------------------------------------------------------------------------


def rank_of_the_class(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """1 for an image whose class has the highest of its scores, (B, classes), 2 for the second highest."""
    own = scores.gather(1, labels[:, None])
    return 1 + (scores > own).sum(1)


@pytest.fixture
def rank_registered():
    register_metric(Quantity("rank", "mean rank", better="less"), "classification", rank_of_the_class)
    yield
    del METRICS["classification"]["rank"]


def test_a_new_metric_is_one_function_and_one_row(rank_registered, tmp_path):
    experiment = toolkit.Experiment(dataset="digits", backbone="demo_vit", **TOY | {"epochs": 1})
    frame = recorded(experiment, tmp_path)
    wrong = 1 - frame.test_top1_pct[0] / 100
    assert 1 + wrong <= frame.test_rank[0] <= 1 + 9 * wrong
    record = json.loads(Path(frame.folder[0], "record.json").read_text())
    [row] = record["curves"]["history"]
    assert 1 <= row["val_rank"] == record["quality"]["val_rank"] <= 10
    assert compare(frame, "test_rank")["test mean rank"].tolist() == [f"{frame.test_rank[0]:.2f}"]
    figure = plots.accuracy_against(means(frame, "test_rank"), "memory", score="test_rank")
    assert figure.axes[0].get_ylabel() == "test mean rank"
    plt.close("all")


def test_a_metric_that_was_not_measured_has_its_reason(rank_registered, demo_model, few_digits):
    experiment, result = toolkit.Experiment(device="cpu"), FitResult(status="oom", error="CUDA out of memory")
    record = toolkit.RunRecord.of_run(experiment, few_digits, demo_model(), result, None)
    assert record.quality["test_rank"] is None
    assert record.missing["test_rank"] == "the run did not end well"
    assert record.overview().value["test_rank"] == "–"


def test_a_name_has_one_meaning():
    with pytest.raises(toolkit.InputError, match="'top1_pct' is registered already"):
        register(Quantity("top1_pct", "another accuracy"))
    with pytest.raises(toolkit.InputError, match="unknown direction 'higher'"):
        register(Quantity("toy", "toy", better="higher"))


# --- a method -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LastBlocksOptions(Options):
    blocks: int = option(1, "how many of the last blocks train", between=(1, 100))


def last_blocks(model: nn.Module, options: LastBlocksOptions) -> nn.Module:
    """Train the head and the last blocks."""
    METHODS["linear"].apply(model)
    for block in list(find_blocks(model).values())[-options.blocks :]:
        block.requires_grad_(True)
    return model


class CountedSteps(Hooks):
    seen: ClassVar[list[int]] = []

    def after_step(self, step: int, *, finite: bool = True) -> None:
        self.seen.append(step)


@pytest.fixture
def last_blocks_registered():
    rates = {"default": LearningRate(0.01, "a test")}
    register_method("last_blocks", last_blocks, rates, LastBlocksOptions, hooks=CountedSteps)
    yield
    del METHODS["last_blocks"]
    CountedSteps.seen.clear()


def test_a_new_method_is_one_declaration(last_blocks_registered, tmp_path):
    usual = {name: value for name, value in TOY.items() if name not in ("method", "lr")}
    experiments = grid(method=["last_blocks", "linear"], blocks=[2], **{n: [v] for n, v in usual.items()})
    assert [e.options for e in experiments] == [{"blocks": 2}, {}] and experiments[0].lr == 0.01
    frame = recorded(experiments[0], tmp_path)
    assert (frame.status[0], frame.method[0], frame.blocks[0]) == ("ok", "last_blocks", 2)
    assert CountedSteps.seen == list(range(1, frame.steps[0] + 1))
    assert compare(frame).method.tolist() == ["last_blocks"]
    assert plots.accuracy_against(means(frame), "memory").axes[0].containers
    plt.close("all")
    found = forecast(experiments[0], 10, tmp_path / "forecasts")
    assert found.peak_bytes == pytest.approx(frame.train_peak_bytes[0], rel=1e-3)
    with pytest.raises(toolkit.InputError, match="blocks must lie between 1 and 100"):
        toolkit.Experiment(method="last_blocks", options={"blocks": 0})


# --- a strategy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EveryNth(Strategy):
    """Checkpoint every n-th block, whatever is allocated."""

    name, label, marker = "every_nth", "every n-th block", "*"

    nth: int = option(2, "distance of checkpointed blocks", between=(1, 100))

    def checkpoints(self, block: str, allocated_bytes: int, budget_bytes: int) -> bool:
        return int(block.split(".")[-1]) % self.nth == 0


@pytest.fixture
def every_nth_registered():
    register_strategy(EveryNth)
    yield
    del STRATEGIES["every_nth"]


def test_a_new_strategy_is_one_class(every_nth_registered, tmp_path):
    usual = TOY | {"method": "full", "lr": 1e-3, "checkpointing": "every_nth"}
    frame = recorded(toolkit.Experiment(options={"nth": 2}, **usual), tmp_path)
    assert (frame.status[0], frame.checkpointing[0], frame.nth[0]) == ("ok", "every_nth", 2)
    assert frame.checkpointed_blocks[0] == 2 and frame.recompute_flops_per_image[0] > 0
    assert compare(frame).checkpointing.tolist() == ["every_nth"]
    assert plots.accuracy_against(means(frame), "memory").axes[0].containers[0].lines[0].get_marker() == "*"
    plt.close("all")
    one, two = (forecast(toolkit.Experiment(options={"nth": n}, **usual), 10, tmp_path) for n in (1, 2))
    assert one.peak_bytes < two.peak_bytes == pytest.approx(frame.train_peak_bytes[0], rel=1e-3)
    assert one.recompute_pct == pytest.approx(2 * two.recompute_pct)
