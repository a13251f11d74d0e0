"""One file adds a thing: what is registered here goes through a run, a record, a table and a figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import toolkit
from toolkit.analysis.statistics import compare
from toolkit.baselines import prompts
from toolkit.batch.dry_run import dry_run
from toolkit.datasets import DATASETS, Dataset, Policy, Prompt, Splits, in_memory, register_dataset
from toolkit.plots import runs as plots

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
    plots.accuracy_against(frame, "memory")
    plt.close("all")
    assert toolkit.load_dataset("stripes").policy == Policy(flip=True)
    assert prompts.templates("stripes") == ["{} stripes"]
    assert dry_run([experiment], tmp_path).finished.tolist() == [True]


def test_an_unregistered_data_set_is_refused_with_the_known_ones():
    with pytest.raises(toolkit.InputError, match=r"unknown dataset 'stripes'.*digits"):
        toolkit.Experiment(dataset="stripes", **TOY)
