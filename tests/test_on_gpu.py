"""What only a CUDA device can show: the energy counter against polling, the context, the spread."""

import statistics

import pytest
import torch

import toolkit
from toolkit.measure import Meter, SensorError
from toolkit.measure.memory import context_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def work(seconds: float) -> None:
    """Keep the device busy, forward and backward."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a = torch.randn(2048, 2048, device="cuda", requires_grad=True)
    start.record()
    while True:
        for _ in range(20):
            (a @ a).sum().backward()
        end.record()
        end.synchronize()
        if start.elapsed_time(end) > 1000 * seconds:
            return


def test_counter_and_polling_agree_over_a_minute(record_property):
    meter = Meter()
    if meter.gpu is None:
        pytest.skip(meter.reason)
    idle = meter.measure_idle()
    with meter.window("work") as window:
        work(60)
    print(meter, window)
    assert window.source == "nvml_counter" and abs(window.disagreement_pct) <= 5
    assert window.energy_joules > idle * window.seconds and window.net_joules > 0
    record_property("longest time between two readings in s", window.max_gap_seconds)
    record_property("share of a core that polling takes", meter.poller_cpu_seconds / window.seconds)


def test_run_to_run_spread_is_small():
    meter = Meter()
    if meter.gpu is None:
        pytest.skip(meter.reason)
    work(10)  # warm silicon leaks more
    powers = []
    for _ in range(5):
        with meter.window("work") as window:
            work(10)
        powers.append(window.energy_joules / window.seconds)
    print(powers)
    assert statistics.stdev(powers) / statistics.mean(powers) <= 0.02


def test_context_is_what_the_process_holds_beside_its_allocator():
    meter = Meter()
    if meter.gpu is None:
        pytest.skip(meter.reason)
    work(0.1)
    try:
        context = context_bytes(meter.gpu, torch.device("cuda"))
    except SensorError as error:
        pytest.skip(str(error))
    print(context)
    assert 50 * 2**20 < context < 3 * 2**30


def test_a_run_on_the_gpu_is_measured_throughout(demo_model, few_digits, tmp_path):
    experiment = toolkit.Experiment(epochs=2, batch_size=32, device="cuda", method="lora")
    meter = Meter()
    model = demo_model("lora")
    result = toolkit.fit(model, few_digits, experiment, meter=meter, folder=tmp_path)
    evaluation = toolkit.test(model, few_digits, experiment, result, meter)
    record = toolkit.RunRecord.of_run(experiment, few_digits, model, result, evaluation)
    assert record.memory["train_reserved_peak_bytes"] >= record.memory["train_peak_bytes"] > 0
    assert record.env["driver"] and record.env["power_limit_watts"]
    if meter.gpu is not None:
        assert record.memory["context_bytes"] or record.missing["context_bytes"]
        assert record.energy["energy_joules"] > 0


def test_cached_features_train_without_the_backbone_on_the_device(demo_model, few_digits):
    peaks = {}
    for cache in ("", "100MB"):
        experiment = toolkit.Experiment(
            epochs=1, batch_size=32, device="cuda", method="losa", checkpointing="none", feature_cache=cache
        )
        model = demo_model("losa", pretrained=True)
        result = toolkit.fit(model, few_digits, experiment)
        assert result.status == "ok" and all(p.is_cuda for p in model.parameters())
        peaks[cache] = result.peak_bytes
    weights = sum(p.nbytes for p in model.backbone.parameters())
    assert peaks["100MB"] < peaks[""] + 32 * 2**20 - weights  # rows of features are larger than images


@pytest.mark.parametrize("method", ["linear", "e3va"])
def test_segmentation_on_the_gpu_is_predicted(method):
    """Within 2 % and a mebibyte: the allocator's blocks are of 512 bytes, and libraries take workspaces."""
    experiment = toolkit.Experiment(
        dataset="mosaics", backbone="demo_swin", method=method, epochs=1, batch_size=16, device="cuda"
    )
    splits = toolkit.load_dataset("mosaics")
    model = toolkit.build_model(experiment, len(splits.classes))
    model = toolkit.adapt(model, method, **experiment.method_options)
    result = toolkit.fit(model, splits, experiment)
    assert result.status == "ok"
    assert abs(result.peak_bytes - result.predicted_peak_bytes) < 0.02 * result.predicted_peak_bytes + 2**20
