"""Costs of a step against an independent recount, real tensors, and what must hold between figures."""

import pytest
import torch

from toolkit.budget import TensorMemory
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.forecast.cnn_costs import PUBLISHED_SETTING, cost_table, step_costs
from toolkit.forecast.step import step_of

SMALL = {"batch_size": 2, "image_size": 64, **PUBLISHED_SETTING}


@pytest.mark.long
@pytest.mark.parametrize(
    ("backbone", "published", "corrected", "lora"),
    [
        ("resnet18", 10.74, 10.72, 6.91),
        ("mobilenetv2_100", 12.39, 1.87, 1.28),
        ("mobilenetv3_large_100", 11.87, 1.36, 0.94),
    ],
)
def test_gflop_of_the_published_counter(backbone, published, corrected, lora):
    """An independent recount of the same profiler: batch 1, 224 px, 1000 classes, GFLOP within 1 %."""
    full, adapted = (
        step_costs(backbone, method, batch_size=1, num_classes=1000, **PUBLISHED_SETTING)
        for method in ("full", "lora")
    )
    assert full.published_flops == pytest.approx(published * 1e9, rel=0.01)
    assert full.corrected_flops == pytest.approx(corrected * 1e9, rel=0.01)
    assert adapted.published_flops == adapted.corrected_flops == pytest.approx(lora * 1e9, rel=0.01)
    assert full.forward_flops + full.backward_flops == pytest.approx(corrected * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("backbone", "method", "batch_size", "by_maxima", "by_peak"),
    [
        ("resnet18", "lora", 1, -73, -70),
        pytest.param("resnet18", "lora", 16, None, -48, marks=pytest.mark.long),
        pytest.param("resnet18", "dora", 1, -54, -49, marks=pytest.mark.long),
        pytest.param("resnet18", "norm", 1, -68, -66, marks=pytest.mark.long),
        pytest.param("resnet18", "norm", 16, None, -23, marks=pytest.mark.long),
        pytest.param("mobilenetv2_100", "lora", 1, -29, -26, marks=pytest.mark.long),
        pytest.param("mobilenetv2_100", "lora", 16, None, -11, marks=pytest.mark.long),
        pytest.param("mobilenetv2_100", "dora", 1, 6, 8, marks=pytest.mark.long),
        pytest.param("mobilenetv2_100", "norm", 1, -23, -18, marks=pytest.mark.long),
        pytest.param("mobilenetv2_100", "norm", 16, None, -1, marks=pytest.mark.long),
    ],
)
def test_changes_of_memory(backbone, method, batch_size, by_maxima, by_peak):
    """An independent recount at ten classes, 224 px, in per cent of full fine-tuning: within 5 points."""
    (row,) = cost_table([backbone], [method], [batch_size], **PUBLISHED_SETTING).itertuples()
    assert row.peak_change_pct == pytest.approx(by_peak, abs=5)
    if by_maxima is not None:
        assert row.published_bytes_change_pct == pytest.approx(by_maxima, abs=5)


@pytest.mark.parametrize("method", ["full", "lora", "galore"])
def test_the_peak_is_that_of_a_real_step(method):
    options = {"rank": 4 if method == "galore" else 1, "gap": 1}
    costs = step_costs("test_resnet", method, batch_size=2, image_size=64, **options)
    experiment = Experiment.flat(backbone="test_resnet", method=method, batch_size=2, device="cpu", **options)
    step = step_of(experiment, 10)
    images, labels = torch.zeros(2, 3, 64, 64), step.batch[1]
    memory = TensorMemory(images.device)
    memory.track([*step.model.parameters(), *step.model.buffers(), images, labels])
    for _ in range(2):
        with memory:
            memory.reset_peak()
            outputs = step.model(images)  # held during the backward pass, as in `fit`
            step.loss(outputs, labels).backward()
            del outputs
            step.optimizer.step()
            step.optimizer.zero_grad()
    assert costs.peak_bytes == memory.peak_bytes


def test_relations_between_the_figures():
    full, lora, galore = (
        step_costs("test_efficientnet", method, **SMALL | {"rank": 4 if method == "galore" else 1})
        for method in ("full", "lora", "galore")
    )
    for costs in (full, lora, galore):
        assert costs.published_bytes > costs.peak_bytes, "the maxima do not coincide"
        assert costs.flops == costs.forward_flops + costs.backward_flops + costs.optimizer_flops
        assert costs.gradient_bytes < 1.2 * 4 * costs.trainable + 2**18
    assert full.published_flops > 1.1 * full.corrected_flops, "depthwise layers"
    assert lora.published_flops == lora.corrected_flops, "no depthwise weight trains"
    assert (full.trainable, full.svd_flops, lora.svd_flops) == (full.total, 0, 0)
    assert galore.backward_flops == full.backward_flops and galore.trainable == full.trainable
    assert galore.gradient_bytes < full.gradient_bytes / 2 and galore.peak_bytes < full.peak_bytes


def test_decompositions_are_ours_alone_and_spread_over_the_gap():
    often, seldom = (step_costs("test_resnet", "galore", **SMALL, gap=gap) for gap in (1, 100))
    assert often.svd_flops == seldom.svd_flops > 0
    spread = often.svd_flops - often.svd_flops // 100
    assert often.optimizer_flops - seldom.optimizer_flops == pytest.approx(spread, abs=1)
    assert often.published_flops == seldom.published_flops, "the published counter knows no svd"
    assert often.peak_bytes == seldom.peak_bytes, "a step that refreshes"


def test_flops_of_the_passes_grow_with_the_batch_and_those_of_the_optimizer_do_not():
    two, four = (step_costs("test_resnet", "galore", **SMALL | {"batch_size": size}) for size in (2, 4))
    assert 2 * two.forward_flops == four.forward_flops and 2 * two.backward_flops == four.backward_flops
    assert two.optimizer_flops == four.optimizer_flops


def test_lean_forms_take_less():
    stock, lean = (step_costs("test_resnet", "lora", **SMALL, lean=lean) for lean in (False, True))
    assert lean.peak_bytes < stock.peak_bytes
    assert (lean.trainable, lean.optimizer_flops) == (stock.trainable, stock.optimizer_flops)


def test_the_table_compares_with_full():
    table = cost_table(["test_resnet"], ["linear", "full"], [2], image_size=64).set_index("method")
    assert table.loc["full", "peak_change_pct"] == table.loc["full", "published_flops_change_pct"] == 0
    change = 100 * (table.loc["linear", "flops"] / table.loc["full", "flops"] - 1)
    assert table.loc["linear", "flops_change_pct"] == pytest.approx(change) and change < -50


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backbone": "resnet81"}, "resnet81"),
        ({"method": "loar"}, "lora"),
        ({"rnak": 4}, "rank"),
        ({"batch_size": 0}, "batch_size must lie between"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"image_size": 0}, "image_size must be a positive"),
        ({"method": "qlora"}, "qlora"),
    ],
)
def test_bad_input_is_refused(changed, message):
    arguments = {"backbone": "test_resnet", "method": "lora", "rank": 1, "batch_size": 1} | changed
    with pytest.raises(InputError, match=message):
        step_costs(**arguments)
