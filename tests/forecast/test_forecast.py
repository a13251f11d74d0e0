"""Forecasts: right about what training then takes, kept on disk, and of use before a sweep."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.budget import plan
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast import forecasts as module
from toolkit.forecast.forecasts import Forecast, forecast, forecasts, what_fits
from toolkit.forecast.step import Step, step_of
from toolkit.plots import smallest_budgets
from toolkit.training.step import held_bytes

STRATEGIES = ("none", "static", "threshold", "planned")
# Frozen but for the head: few operators need a gradient, so it is profiled in a moment.
EXPERIMENT = Experiment(method="linear", batch_size=4, lr=5e-5, device="cpu", budget="1 GB")
SMALL = replace(EXPERIMENT, backbone="small:vit_small", pretrained=False)
TIGHT = "2100 KiB"  # holds the weights, but no step


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder that many tests share, so that few have to profile."""
    return tmp_path_factory.mktemp("forecasts")


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The method of every step that is built from now on."""
    steps = []

    def counted(experiment, num_classes):
        steps.append(experiment.method)
        return step_of(experiment, num_classes)

    monkeypatch.setattr(module, "step_of", counted)
    return steps


def test_forecasts_agree_with_plan(kept):
    e = replace(SMALL, method="bitfit", batch_size=2, budget="960000")
    step = step_of(e, 10)
    asked = [replace(e, checkpointing=strategy) for strategy in ("static", "planned")]
    for found, strategy in zip(forecasts(asked, {e.dataset: 10}, kept), ("static", "planned")):
        expected = plan(
            step.model, e.budget, step.batch, strategy=strategy, micro_batches=True, loss=step.loss,
            held_bytes=held_bytes(step.model, step.hooks, plans=strategy == "planned"),
        )  # fmt: skip
        assert (found.peak_bytes, found.recompute_pct) == (expected.peak_bytes, expected.recompute_pct)
        assert (found.fits, found.micro_batch_size) == (expected.fits, expected.micro_batch_size)
        assert found.step_seconds > 0 and found.recompute_pct > 0


@pytest.mark.parametrize(
    "options, margin",
    [
        (
            {"checkpointing": "threshold", "options": {"tau": 0.4}},
            2e-3,
        ),  # the first step, without state, takes the most
        # Neither has that step the scores that AdaLoRA keeps.
        (
            {
                "backbone": "demo_vit",
                "method": "adalora",
                "checkpointing": "threshold",
                "options": {"tau": 0.55},
                "budget": "11.25 MiB",
            },
            2e-3,
        ),
        ({"method": "galore", "options": {"rank": 4, "tau": 0.4}, "checkpointing": "threshold"}, 2e-3),
        # Gradients of the slices before are counted as if those of this one came on top: a little high.
        ({"checkpointing": "none", "micro_batch_size": 8}, 0.1),
    ],
)
def test_training_takes_no_more_than_predicted(few_digits, tmp_path, options, margin):
    # Full fine-tuning, so that state and gradients are large.
    usual = {"method": "full", "batch_size": 32, "budget": "5MB", "epochs": 1}
    e = replace(SMALL, **usual | options)
    toolkit.seed_everything(0)
    model = toolkit.build_backbone(e.backbone, 10, pretrained=False)
    model = toolkit.adapt(model, e.method, **e.method_options)
    measured = toolkit.fit(model, few_digits, e).peak_bytes
    assert 0.999 * measured < forecast(e, 10, tmp_path).peak_bytes < (1 + margin) * measured


def test_only_planned_is_refused(kept):
    peak = forecast(replace(EXPERIMENT, checkpointing="static"), 10, kept).peak_bytes
    rule = forecast(replace(EXPERIMENT, checkpointing="static", budget=str(peak - 1)), 10, kept)
    assert not rule.fits and not rule.refused and "above the budget" in rule.reason
    tight = replace(EXPERIMENT, budget=TIGHT, micro_batch_size=4)
    refused = forecast(tight, 10, kept)
    assert refused.refused and not refused.fits and "cannot be held" in refused.reason
    assert "\n" not in refused.reason
    assert forecast(replace(tight, budget=str(refused.smallest_bytes)), 10, kept).fits
    assert forecast(replace(tight, budget=str(refused.smallest_bytes - 1000)), 10, kept).refused


def test_models_without_blocks_run_without_checkpointing(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.ReLU(), nn.Linear(32, 10))
    batch = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)
    monkeypatch.setattr(module, "step_of", lambda *_: Step(model, model, batch, F.cross_entropy, "adamw"))
    plain = forecast(replace(EXPERIMENT, checkpointing="none"), 10, tmp_path)
    assert plain.fits and plain.recompute_pct == 0
    static = forecast(replace(EXPERIMENT, checkpointing="static"), 10, tmp_path)
    assert static.refused and "use checkpointing 'none'" in static.reason


def test_the_smallest_budget_may_be_that_of_the_whole_batch(tmp_path):
    # Everything trains: gradients that stay from one micro-batch to the next outweigh one more image.
    e = replace(SMALL, method="full", batch_size=2, budget="1 MB")
    asked = [replace(e, micro_batch_size=size) for size in (0, 2, 1)]
    tight, whole, single = forecasts(asked, {e.dataset: 10}, tmp_path)
    assert tight.smallest_bytes == whole.smallest_bytes < single.smallest_bytes


def test_experiments_that_cannot_be_built_have_a_reason_and_are_not_kept(tmp_path):
    wrong = forecast(replace(EXPERIMENT, backbone="vit_smal"), 10, tmp_path)
    assert wrong.refused and "Did you mean 'vit_small'" in wrong.reason
    small = forecast(replace(EXPERIMENT, budget="1 MiB", checkpointing="none"), 10, tmp_path)
    assert small.refused and "smaller than the weights" in small.reason
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="num_classes"):
        forecast(EXPERIMENT, 0, tmp_path)


def test_one_step_serves_strategies_budgets_and_seeds(tmp_path, built):
    asked = [
        replace(EXPERIMENT, precision=precision, checkpointing=strategy, budget=budget, seed=seed,
                lr=0.1 + seed, epochs=seed + 1)
        for seed in (0, 1)
        for precision in ("fp32", "bf16")
        for strategy in STRATEGIES
        for budget in ("2500 KiB", "1 GB")
    ]  # fmt: skip
    found = forecasts(asked, {"digits": 10}, tmp_path)
    assert len(built) == 2
    assert len(list(tmp_path.iterdir())) == len(asked) / 2  # seeds, rates and epochs share an answer
    assert [f.budget_bytes for f in found] == [e.budget_bytes for e in asked]
    assert forecasts(asked, lambda name: 10, tmp_path) == found and len(built) == 2


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 2}, {"precision": "bf16"}, {"backbone": "small:vit_small"}, {"checkpointing": "none"}],
)
def test_relevant_changes_are_predicted_again(kept, built, change):
    forecast(EXPERIMENT, 10, kept)
    built.clear()
    forecast(replace(EXPERIMENT, **change), 11, kept)
    assert len(built) == 1
    forecast(replace(EXPERIMENT, **change, seed=3), 11, kept)
    assert len(built) == 1


def test_other_code_is_predicted_again(kept, built, monkeypatch):
    forecast(EXPERIMENT, 10, kept)
    built.clear()
    forecast(EXPERIMENT, 10, kept)
    assert not built
    monkeypatch.setattr(module, "code_sha256", lambda: "changed")
    forecast(EXPERIMENT, 10, kept)
    assert built


def test_damaged_answers_are_made_again(tmp_path, built):
    e = replace(EXPERIMENT, batch_size=1)
    first = forecast(e, 10, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.warns(UserWarning, match="made again"):
        assert forecast(e, 10, tmp_path) == first
    assert len(built) == 2 and forecast(e, 10, tmp_path) == first and len(built) == 2


def test_an_unwritable_folder_is_only_a_warning(tmp_path, kept):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    asked = [replace(EXPERIMENT, checkpointing=strategy) for strategy in ("none", "static")]
    with pytest.warns(UserWarning) as warned:
        found = forecasts(asked, {"digits": 10}, blocked / "forecasts")
    assert found == forecasts(asked, {"digits": 10}, kept)
    said = [str(warning.message) for warning in warned]
    assert len(set(said)) == 1 and f"not kept in {blocked / 'forecasts'}: " in said[0]  # shown once


@pytest.mark.parametrize("error", [KeyError("layer"), TypeError("forward() takes 1"), AttributeError("x")])
def test_errors_of_models_are_reported_and_own_errors_are_not_hidden(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    e = replace(SMALL, checkpointing="none")
    with monkeypatch.context() as patched:
        patched.setattr(module, "step_of", fail)
        wrong = forecast(e, 10, tmp_path)
        assert wrong.refused and type(error).__name__ in wrong.reason and error.args[0] in wrong.reason
    monkeypatch.setattr(module, "check_fits_weights", fail)
    with pytest.raises(type(error)):
        forecast(e, 10, tmp_path)


def test_what_fits_and_its_picture(kept, built):
    asked = {"backbones": ["demo_vit", "a$b$c"], "methods": ["linear"], "folder": kept}
    options = {"batch_size": 4, "precision": "fp32", "num_classes": 10}
    limits = {"0.001 GB": 1e6, "0.003 GB": 3e6, "1 GB": 1e9}
    frame = what_fits(["3MB", 10**6, "1GB", "1000MB"], **asked, **options)
    built.clear()
    assert what_fits(["3MB", 10**6, "1GB"], **asked, **options).equals(frame)
    assert len(built) == 1  # what cannot be built is tried again
    demo = frame[frame.backbone == "demo_vit"].set_index("strategy")
    plain, planned = demo.smallest_bytes["none"], demo.smallest_bytes["planned"]
    assert planned < plain == forecast(replace(EXPERIMENT, checkpointing="none"), 10, kept).peak_bytes
    assert forecast(replace(EXPERIMENT, budget=str(planned)), 10, kept).fits
    assert list(frame.card.cat.categories) == list(limits)
    for row in demo.itertuples():
        assert row.card == next(card for card, limit in limits.items() if row.smallest_bytes <= limit)
    wrong = frame[frame.backbone == "a$b$c"]
    assert wrong.smallest_bytes.isna().all() and wrong.reason.str.contains("unknown backbone").all()
    figure = smallest_budgets(frame)
    figure.canvas.draw()
    left, right = figure.axes
    words = [text.get_text() for text in right.texts]
    assert f"{planned / 1e9:.2g}" in words and words.count("–") == 1
    assert [label.get_text() for label in left.get_yticklabels()] == ["demo_vit", r"a\$b\$c"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [*limits, "more than 1 GB"]
    plt.close(figure)


def test_forecast_says_whether_it_fits():
    assert Forecast(10, peak_bytes=9).fits and not Forecast(10, peak_bytes=9).refused
    assert not Forecast(10, peak_bytes=11, reason="above").fits and Forecast(10, reason="no").refused
