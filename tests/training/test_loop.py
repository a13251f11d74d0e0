"""What `fit` returns, and the ways in which a run can end."""

import dataclasses
import gc
import weakref

import pytest
import timm
import torch
from short_runs import experiment, same, stop_after, weights
from torch import nn

import toolkit
from toolkit.datasets import tasks
from toolkit.errors import InputError
from toolkit.methods import set_train_mode
from toolkit.training import loop as training


def test_training_learns(demo_model, few_digits):
    result = toolkit.fit(demo_model("full", pretrained=True), few_digits, experiment(epochs=8))
    assert result.status == "ok" and result.steps == 24
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    assert 0 <= result.data_seconds < result.train_seconds


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"batch_size": 1}, "choose a batch_size"),
        ({"batch_size": 19}, r"above 1 that leaves no single image over \(19 does\)"),
        ({"batch_size": 8, "micro_batch_size": 1}, "micro_batch_size"),
    ],
)
def test_a_single_image_is_refused_before_training_where_batch_norms_need_more(few_digits, sizes, message):
    model = timm.create_model("resnet10t", num_classes=10)
    model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 32, 32)}
    assert len(few_digits.train) % 19 == 1
    e = experiment(backbone="resnet10t", method="full", pretrained=False, **sizes)
    with pytest.raises(InputError, match=message):
        toolkit.fit(toolkit.adapt(model, "full"), few_digits, e)


def test_windows_of_a_run_add_up(demo_model, few_digits, tmp_path):
    meter = toolkit.Meter("cpu")
    with meter.window("whole") as whole:
        result = toolkit.fit(
            demo_model("full"), few_digits, experiment(), folder=tmp_path, snapshot_seconds=0, meter=meter
        )
    fit, train, validation, snapshot = (
        result.windows[name]["seconds"] for name in ("fit", "train", "validation", "snapshot")
    )
    assert train + validation <= fit <= whole.seconds and snapshot <= fit - validation
    assert whole.children[0].name == "fit"
    assert result.train_seconds == train > result.data_seconds > 0
    assert result.windows["train"]["energy_joules"] is None and result.windows["train"]["reason"]


def test_loss_that_is_not_finite_ends_the_run_before_the_weights_move(demo_model, few_digits, monkeypatch):
    model = demo_model()
    before = weights(model)
    monkeypatch.setattr(tasks.F, "cross_entropy", lambda logits, y: logits.sum() * float("nan"))
    result = toolkit.fit(model, few_digits, experiment())
    assert result.status == "nan" and "step 1" in result.error and result.history == []
    assert same(weights(model), before)


def test_validation_loss_that_is_not_finite_ends_the_run(demo_model, few_digits, monkeypatch, tmp_path):
    original = training.evaluate

    def evaluate(*arguments, **options):
        return dataclasses.replace(original(*arguments, **options), loss=float("nan"))

    monkeypatch.setattr(training, "evaluate", evaluate)
    e, model = experiment(), demo_model()
    result = toolkit.fit(model, few_digits, e)
    assert result.status == "nan" and "after epoch 1" in result.error and result.history == []
    record = toolkit.RunRecord.of_run(
        e, few_digits, model, result, toolkit.test(model, few_digits, e, result)
    )
    assert record.save(tmp_path).exists()


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: RuntimeError("CUDA driver error: out of memory"),
        lambda: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        lambda: RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 bytes"
        ),
        MemoryError,
    ],
)
def test_out_of_memory_is_a_result(demo_model, few_digits, monkeypatch, error):
    stop_after(monkeypatch, 1, error)
    model = demo_model()
    result = toolkit.fit(model, few_digits, experiment(checkpointing="static"))
    assert result.status == "oom" and result.steps == 1
    assert result.peak_bytes > 0, "what was reached before is known"
    assert not any("forward" in vars(module) for module in model.modules()), "checkpointing was taken off"
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None, "nothing holds on to the model"


def test_other_errors_are_raised(demo_model, few_digits, monkeypatch):
    stop_after(monkeypatch, 0, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        toolkit.fit(demo_model(), few_digits, experiment())


def test_budget_below_the_weights_is_refused_before_training(demo_model, few_digits):
    with pytest.raises(InputError, match=r"smaller than the weights alone \(1\.8 MiB\)"):
        toolkit.fit(demo_model(), few_digits, experiment(budget="1MB"))


def test_frozen_batch_norm_keeps_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    set_train_mode(model)
    assert model.training and model[0].training
    assert not model[1].training and model[2].training


@pytest.mark.parametrize("method", ["bitfit", "lora"])
def test_adapted_weights_are_all_that_a_backbone_lacks(demo_model, few_digits, tmp_path, method):
    model = demo_model(method)
    toolkit.fit(model, few_digits, experiment(method=method, epochs=1))
    path = toolkit.save_adapted(model, tmp_path / "adapted.safetensors")
    assert path.stat().st_size < 1.3 * toolkit.summarize(model).adapter_bytes + 10_000
    again = demo_model(method)
    assert not same(weights(again), weights(model))
    toolkit.load_adapted(again, path)
    assert same(weights(again), weights(model))
    with pytest.raises(InputError, match="another way"):
        toolkit.load_adapted(demo_model("linear"), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        toolkit.load_adapted(again, path)


def test_fit_trains_a_model_of_ones_own(few_digits):
    """What the README promises: any module with a `get_classifier`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 2, stride=16)
            self.blocks = nn.Sequential(*(Block() for _ in range(3)))
            self.head = nn.Linear(8, 10)

        def get_classifier(self):
            return self.head

        def forward(self, x):
            return self.head(self.blocks(self.stem(x).flatten(2).mT).mean(1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.mlp(self.norm(x)).relu()

    model = toolkit.adapt(Net(), "lora", rank=2)
    result = toolkit.fit(model, few_digits, experiment(epochs=1, checkpointing="static", backbone="mine"))
    assert result.status == "ok" and result.checkpointed_blocks == 3
