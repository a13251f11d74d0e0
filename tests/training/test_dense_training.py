"""`fit`, tests and records of segmentation, detection and cached features: the loop that classifiers have."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import toolkit
from toolkit.analysis import compare
from toolkit.batch.dry_run import dry_run
from toolkit.datasets import loader, task_of
from toolkit.datasets.tasks import IGNORED, TASKS, score_in, split_targets
from toolkit.forecast.forecasts import forecast
from toolkit.methods import adapt
from toolkit.model import build_model
from toolkit.training.feature_cache import cached_features
from toolkit.training.step import Steps

SETTINGS = {
    "backbone": "demo_swin", "pretrained": False, "epochs": 2, "batch_size": 4, "budget": "100 MiB",
    "lr": 1e-3, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def few():
    """Eight, four and four images of a data set."""

    def load(name):
        splits = toolkit.load_dataset(name)
        counts = {"train": 8, "val": 4, "test": 4}
        return replace(splits, **{s: Subset(getattr(splits, s), range(n)) for s, n in counts.items()})

    return load


def trained(splits, folder=None, **parameters):
    experiment = toolkit.Experiment(dataset=splits.name, **SETTINGS | parameters)
    toolkit.seed_everything(0)
    model = build_model(experiment, len(splits.classes))
    model = adapt(model, experiment.method, **experiment.method_options)
    return experiment, model, toolkit.fit(model, splits, experiment, folder=folder)


def test_parts_of_a_batch_add_up_to_its_loss():
    task = TASKS["segmentation"]
    logits, masks = torch.randn(5, 3, 4, 4), torch.randint(3, (5, 4, 4))
    masks[0, :2] = IGNORED
    parts = zip(logits.split(2), split_targets(masks, 2))
    assert sum(task.loss(x, y) * len(x) / 5 for x, y in parts) == pytest.approx(task.loss(logits, masks))
    right = (logits.argmax(1) == masks)[masks != IGNORED].double().mean()
    assert task.hits(logits, masks).item() / 5 == pytest.approx(right.item())


def test_targets_in_parts():
    targets = {"boxes": torch.arange(30.0).view(3, 2, 5), "instances": torch.zeros(3, 4, 4)}
    parts = split_targets(targets, 2)
    assert [len(part["instances"]) for part in parts] == [2, 1]
    assert torch.equal(torch.cat([part["boxes"] for part in parts]), targets["boxes"])


def test_each_data_set_has_a_metric():
    assert [task_of(name).metric for name in ("digits", "ade20k", "coco")] == [
        "top1_pct",
        "miou_pct",
        "map_pct",
    ]
    assert score_in({"epoch": 1, "train_loss": 2.0, "val_miou_pct": 30.0}, "val") == ("miou_pct", 30.0)
    assert score_in({"epoch": 1, "train_loss": 2.0}, "train") is None


@pytest.mark.parametrize("method", [pytest.param("linear", marks=pytest.mark.long), "e3va"])
def test_segmentation_is_planned_and_measured(few, tmp_path, method):
    splits = few("mosaics")
    experiment, model, result = trained(splits, method=method, checkpointing="planned")
    assert result.status == "ok" and result.peak_bytes == result.predicted_peak_bytes
    assert {"val_miou_pct", "val_loss", "train_pixel_accuracy_pct"} < set(result.history[-1])
    evaluation = toolkit.test(model, splits, experiment, result)
    record = toolkit.RunRecord.of_run(experiment, splits, model, result, evaluation)
    assert record.quality["test_miou_pct"] == evaluation.score_pct and record.scores["ns"] is not None
    assert "test_top1_pct" not in record.quality and "test_miou_pct" not in record.missing
    record.save(tmp_path / "run")
    assert compare(toolkit.load_records(tmp_path))["test mean IoU (%)"][0] == f"{evaluation.score_pct:.2f}"


def test_micro_batches_do_not_change_the_loss_of_a_segmentation(few):
    splits = few("mosaics")
    losses = [
        trained(splits, method="linear", checkpointing="none", micro_batch_size=size)[2].history[-1][
            "train_loss"
        ]
        for size in (0, 1)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "method, checkpointing", [("linear", "none"), ("losa", "planned"), ("lst", "planned")]
)
def test_cached_features_train_as_the_backbone_does(few_digits, tmp_path, method, checkpointing):
    runs = {}
    for cache in ("", "100MB"):
        settings = {"backbone": "demo_vit", "pretrained": True, "batch_size": 32, "feature_cache": cache}
        runs[cache] = trained(few_digits, method=method, checkpointing=checkpointing, **settings)
    (_, plain, plain_result), (experiment, model, result) = runs.values()
    for expected, row in zip(plain_result.history, result.history):
        assert row == pytest.approx(expected, rel=1e-4)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-5), name
    assert result.peak_bytes < plain_result.peak_bytes and result.step_flops["forward"] > 0
    if checkpointing == "planned":
        assert result.peak_bytes == result.predicted_peak_bytes
    told = forecast(experiment, 10, tmp_path).peak_bytes  # but for the count of right answers
    assert 0 <= result.peak_bytes - told <= 1024
    evaluation = toolkit.test(model, few_digits, experiment, result)
    record = toolkit.RunRecord.of_run(experiment, few_digits, model, result, evaluation)
    assert record.time["features_seconds"] > 0 and record.curves["windows"]["features"]["seconds"] > 0


@pytest.mark.parametrize("head", ["retinanet", pytest.param("mask_rcnn", marks=pytest.mark.long)])
def test_detection_trains_and_is_scored(few, head):
    splits = few("digit_scenes")
    experiment, model, result = trained(splits, method="e3va", checkpointing="none", head=head, epochs=1)
    assert result.status == "ok" and math.isfinite(result.history[-1]["train_loss"])
    evaluation = toolkit.test(model, splits, experiment, result)
    assert 0 <= evaluation.score_pct <= 100 and ("mask_map_pct" in evaluation.scores) == (head == "mask_rcnn")
    record = toolkit.RunRecord.of_run(experiment, splits, model, result, evaluation)
    assert record.quality["test_map_pct"] == evaluation.score_pct
    assert "no loss in a test" in record.missing["test_loss"]


def test_dense_runs_are_forecast_and_listed_before_they_run(tmp_path):
    dense = [{"dataset": "mosaics"}, {"dataset": "digit_scenes", "checkpointing": "none"}]
    table = dry_run([toolkit.Experiment(**SETTINGS | asked) for asked in dense], tmp_path, tmp_path)
    assert list(table.within_budget) == ["yes", "unknown"] and "measured" in table.reason[1]


class Told(nn.Module):
    """A detector that knows the truth."""

    def __init__(self, batches):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.truths = {images.sum().item(): targets["boxes"] for images, targets in batches}

    def forward(self, images):
        kept = [boxes[boxes[:, 4] >= 0] for boxes in self.truths[images.sum().item()]]
        return [
            {"boxes": rows[:, :4], "scores": torch.ones(len(rows)), "labels": rows[:, 4].long()}
            for rows in kept
        ]


@pytest.mark.parametrize("shift, score", [(0, 100.0), (1, 0.0)])
def test_perfect_boxes_score_100(few, shift, score):
    splits = few("digit_scenes")
    config = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    batches = list(loader(splits.test, config, splits.policy, batch_size=2))
    told = Told(batches)
    for boxes in told.truths.values():
        boxes[..., 4] += shift * (boxes[..., 4] >= 0)
    batches = list(loader(splits.test, config, splits.policy, batch_size=2))
    found = toolkit.evaluate(told, batches, task=TASKS["detection"], num_classes=11, costs=False)
    assert found.score_pct == pytest.approx(score)


def test_features_of_other_images_are_not_taken(few_digits, tmp_path):
    model = adapt(toolkit.build_backbone("demo_vit", 10), "linear")
    some = replace(few_digits, train=Subset(few_digits.train, range(8)))
    found = [
        cached_features(model, splits, budget_bytes=10**8, batch_size=32, folder=tmp_path)
        for splits in (some, few_digits)
    ]
    assert [len(features.train) for features in found] == [8, len(few_digits.train)]


def test_a_killed_run_of_cached_features_resumes_bit_for_bit(few_digits, tmp_path, monkeypatch):
    settings = {"backbone": "demo_vit", "pretrained": True, "batch_size": 32, "feature_cache": "100MB"}
    settings |= {"method": "losa", "checkpointing": "none"}
    check_resumes_after_a_kill(monkeypatch, few_digits, tmp_path, settings, 6)


@pytest.mark.long
def test_a_killed_run_of_e3va_resumes_bit_for_bit(few, tmp_path, monkeypatch):
    check_resumes_after_a_kill(
        monkeypatch, few("mosaics"), tmp_path, {"method": "e3va", "checkpointing": "none"}, 4
    )


def check_resumes_after_a_kill(monkeypatch, splits, folder, settings, steps):
    class Killed(Exception):
        pass

    step = Steps.run
    _, whole, _ = trained(splits, **settings)

    def dies(self, images, targets, result):
        if result.steps == 3:
            raise Killed
        return step(self, images, targets, result)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Steps, "run", dies)
        trained(splits, folder, **settings)
    _, resumed, result = trained(splits, folder, **settings)
    assert result.resumes == 1 and result.steps == steps
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
