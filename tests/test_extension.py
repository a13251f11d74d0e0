"""One file adds a thing: what is registered here goes through a run, a record, a table and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

import toolkit
from toolkit import plots
from toolkit.analysis import compare, means
from toolkit.baselines import prompts
from toolkit.batch.dry_run import dry_run
from toolkit.datasets import DATASETS, Dataset, Policy, Prompt, Splits, in_memory, register_dataset
from toolkit.measure.quantities import METRICS, Quantity, register, register_metric
from toolkit.training.result import FitResult

TOY = dict(method="linear", checkpointing="none", epochs=2, batch_size=16, lr=0.01, device="cpu")


def recorded(experiment: toolkit.Experiment, runs) -> pd.DataFrame:
    """Train, test and record `experiment` below `runs`; return the folder's records."""
    splits = toolkit.load_dataset(experiment.dataset)
    toolkit.seed_everything(experiment.seed)
    model = toolkit.adapt(toolkit.build_model(experiment, len(splits.classes)), experiment.method)
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
