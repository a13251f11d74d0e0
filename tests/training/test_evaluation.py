"""Metrics of a pass over a split, and how a test can end."""

import pytest
import torch
from short_runs import experiment, same, weights
from torch import nn

import toolkit
from toolkit.training import evaluation
from toolkit.training.result import FitResult


def test_evaluate_by_hand(few_digits):
    """A model that always says class 0, then 1, 2, ... is right on the zeros, and among five on 0 to 4."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.arange(10.0, 0.0, -1.0))

        def forward(self, x):
            return self.scores.expand(len(x), -1)

    e = experiment()
    evaluation = toolkit.evaluate_split(Constant(), few_digits, "test", e)
    labels = torch.from_numpy(few_digits.test.labels)
    assert evaluation.top1_pct == pytest.approx(100 * (labels == 0).double().mean().item())
    assert evaluation.top5_pct == pytest.approx(100 * (labels < 5).double().mean().item())
    expected = nn.functional.cross_entropy(torch.arange(10.0, 0.0, -1.0).expand(len(labels), -1), labels)
    assert evaluation.loss == pytest.approx(expected.item())
    assert evaluation.predictions.tolist() == [0] * len(labels)
    assert evaluation.scores["balanced_pct"] == pytest.approx(100 / len(labels.unique()))
    assert next(iter(evaluation.scores)) == "top1_pct"
    table = evaluation.per_class(few_digits.classes)
    assert table.accuracy_pct.to_dict()["0"] == 100 and table.accuracy_pct.sum() == 100
    assert table.images.sum() == len(labels)
    assert evaluation.peak_bytes > 0


def test_evaluate_changes_nothing(demo_model, few_digits):
    model = demo_model()
    before = weights(model)
    first = toolkit.evaluate_split(model, few_digits, "test", experiment())
    second = toolkit.evaluate_split(model, few_digits, "test", experiment())
    assert first.loss == second.loss and first.peak_bytes == second.peak_bytes
    assert same(weights(model), before)


def test_out_of_memory_in_the_test_is_a_result(demo_model, few_digits, monkeypatch):
    def evaluate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = FitResult(status="ok")
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert toolkit.test(demo_model(), few_digits, experiment(), result) is None
    assert result.status == "oom" and result.error.startswith("in the test")
