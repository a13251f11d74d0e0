"""The loop: gradients, schedule, resume, and the ways in which a run can end."""

import dataclasses
import gc
import itertools
import os
import signal
import time
import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import toolkit
from toolkit.datasets import tasks
from toolkit.errors import InputError
from toolkit.methods import set_train_mode
from toolkit.training import evaluation, resume
from toolkit.training import loop as training
from toolkit.training.resume import Snapshots


def experiment(**parameters):
    defaults = {"epochs": 2, "batch_size": 32, "budget": "1GB", "device": "cpu", "checkpointing": "none"}
    return toolkit.Experiment(**defaults | parameters)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):
    """Stands for a kill: nothing after the step runs."""


def stop_after(monkeypatch, steps, error=Stop):
    """Raise instead of the step after `steps`."""
    original = training._Run._train_step

    def step(self, *batch):
        if self.result.steps == steps:
            raise error()
        original(self, *batch)

    monkeypatch.setattr(training._Run, "_train_step", step)


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


@pytest.mark.parametrize("method", ["linear", "bitfit", "lora", "full"])
def test_the_three_strategies_train_the_same_weights(demo_model, few_digits, method):
    finals, peaks = [], []
    for strategy in ("none", "static", "threshold"):
        model = demo_model(method)
        result = toolkit.fit(
            model, few_digits, experiment(method=method, checkpointing=strategy, budget="10 MiB")
        )
        finals.append((weights(model), [row["train_loss"] for row in result.history]))
        peaks.append(result.peak_bytes)
    assert all(losses == finals[0][1] and same(state, finals[0][0]) for state, losses in finals)
    none, static, threshold = peaks
    if method == "linear":
        assert none == static == threshold, "a frozen backbone keeps nothing"
    else:
        assert none > threshold >= static


def test_peak_of_counted_steps_is_the_peak_of_all_steps(demo_model, few_digits, monkeypatch):
    counted = toolkit.fit(demo_model("lora"), few_digits, experiment(method="lora", epochs=3))
    monkeypatch.setattr(training._Run, "_counted", lambda self, batch_size: self.memory)
    everything = toolkit.fit(demo_model("lora"), few_digits, experiment(method="lora", epochs=3))
    assert counted.peak_bytes == everything.peak_bytes > 0


def phases(trace):
    """Phases of a memory trace in the order of time, blocks aside."""
    return [phase for phase, _ in itertools.groupby(segment["phase"] for segment in trace)]


def test_memory_trace_peaks_where_the_peak_is(demo_model, few_digits):
    result = toolkit.fit(demo_model("full"), few_digits, experiment())
    assert phases(result.memory_trace) == ["forward", "backward", "optimizer"]
    assert max(max(segment["bytes"]) for segment in result.memory_trace) == result.peak_bytes


def test_memory_trace_keeps_the_order_of_micro_batches(demo_model, few_digits):
    result = toolkit.fit(demo_model("full"), few_digits, experiment(epochs=1, micro_batch_size=16))
    assert phases(result.memory_trace) == ["forward", "backward", "forward", "backward", "optimizer"]


def test_flops_of_a_step_show_what_a_strategy_repeats(demo_model, few_digits):
    flops = {}
    for strategy in ("none", "static", "threshold"):
        e = experiment(method="lora", checkpointing=strategy, budget="10 MiB")
        flops[strategy] = toolkit.fit(demo_model("lora"), few_digits, e).step_flops
    expected = toolkit.flops(demo_model("lora"), torch.zeros(32, 3, 32, 32))
    assert flops["none"]["recompute"] == 0 < flops["threshold"]["recompute"] <= flops["static"]["recompute"]
    for count in flops.values():
        assert count["forward"] == expected.forward / 32 and count["backward"] == expected.backward / 32


def test_windows_of_a_run_add_up(demo_model, few_digits, tmp_path):
    meter = toolkit.Meter("cpu")
    with meter.window("whole") as whole:
        result = toolkit.fit(
            demo_model("full"), few_digits, experiment(), folder=tmp_path, snapshot_seconds=0, meter=meter
        )
    fit, train, validation, snapshot = (
        result.windows[name]["seconds"] for name in ("fit", "train", "validation", "snapshot")
    )
    assert 0 <= fit - train - validation <= snapshot + 0.2, "the rest is snapshots after an epoch"
    assert fit <= whole.seconds <= fit + 5 and whole.children[0].name == "fit"
    assert result.train_seconds == train > result.data_seconds > 0
    assert result.windows["train"]["energy_joules"] is None and result.windows["train"]["reason"]


def test_energy_of_a_run_survives_a_kill(demo_model, few_digits, tmp_path, monkeypatch):
    """A simulated GPU of 100 W: joules per second stay what they are across two processes' meters."""
    from simulated_gpu import SimulatedGpu

    def meter():
        gpu = SimulatedGpu(SimpleNamespace(now=0.0), [(0, 100.0)])
        gpu.counter_joules = lambda: 100 * time.perf_counter()
        gpu.watts = lambda: 100.0
        return toolkit.Meter("cpu", gpu=gpu, cpu=None)

    e = experiment(epochs=3)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5)
        toolkit.fit(demo_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0, meter=meter())
    first = Snapshots(tmp_path).newest()["result"]["windows"]
    second_meter = meter()
    with second_meter.window("whole") as whole:
        result = toolkit.fit(
            demo_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0, meter=second_meter
        )
    assert result.resumes == 1
    (fit,) = whole.children
    second = {"fit": [fit], "train": [window for window in fit.children if window.name == "train"]}
    for name, windows in second.items():
        window = result.windows[name]
        assert window["source"] == "fake"
        for quantity in ("seconds", "energy_joules"):
            before, after = first[name][quantity], sum(getattr(w, quantity) for w in windows)
            assert before > 0 and window[quantity] == pytest.approx(before + after)
        assert window["energy_joules"] == pytest.approx(100 * window["seconds"], rel=0.05)


def test_micro_batches_give_the_gradient_of_the_whole_batch(demo_model, few_digits):
    """Three AdamW steps on slices of 5 end where those on whole batches do, up to rounding."""
    whole, sliced = demo_model("full"), demo_model("full")
    peaks = [
        toolkit.fit(model, few_digits, experiment(epochs=1, micro_batch_size=micro)).peak_bytes
        for model, micro in ((whole, 0), (sliced, 5))  # 32 = 6 * 5 + 2: an uneven last slice
    ]
    assert peaks[1] < peaks[0]
    for a, b in zip(weights(whole).values(), weights(sliced).values()):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [1, 3, 4, 7])
def test_resume_after_a_kill_is_bit_identical(
    demo_model, few_digits, monkeypatch, tmp_path, killed_at, precision
):
    """Three steps an epoch; killed in the first epoch, at an epoch's end, after it, and in the third."""
    e = experiment(
        method="lora",
        options={"dropout": 0.2},
        epochs=3,
        precision=precision,
        checkpointing="threshold",
        budget="14 MiB",
    )
    reference = demo_model("lora", dropout=0.2)
    expected = toolkit.fit(reference, few_digits, e)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, killed_at)
        toolkit.fit(demo_model("lora", dropout=0.2), few_digits, e, folder=tmp_path, snapshot_seconds=0)
    torch.rand(7)  # whatever the new process does before it resumes
    model = demo_model("lora", dropout=0.2)
    result = toolkit.fit(model, few_digits, e, folder=tmp_path, snapshot_seconds=0)

    assert result.resumes == 1 and result.steps == 9
    assert result.history == expected.history
    assert result.peak_bytes == expected.peak_bytes
    assert result.memory_trace == expected.memory_trace
    assert same(weights(model), weights(reference))


def test_finished_training_is_not_repeated(demo_model, few_digits, monkeypatch, tmp_path):
    first = toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path)
    stop_after(monkeypatch, first.steps)
    assert toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path).history == first.history


def test_damaged_snapshot_falls_back_to_the_older_one(demo_model, few_digits, monkeypatch, tmp_path, capsys):
    e = experiment(epochs=2)
    reference = demo_model()
    toolkit.fit(reference, few_digits, e)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 4)
        toolkit.fit(demo_model(), few_digits, e, folder=tmp_path, snapshot_seconds=0)
    newest = sorted((tmp_path / "snapshots").glob("*.pt"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    model = demo_model()
    toolkit.fit(model, few_digits, e, folder=tmp_path)
    assert "damaged" in capsys.readouterr().out
    assert same(weights(model), weights(reference))


@pytest.mark.parametrize("position", [0.0, 0.3, 0.999])
def test_any_damage_to_a_snapshot_is_noticed(tmp_path, position):
    snapshots = Snapshots(tmp_path)
    snapshots.save(1, {"x": torch.arange(100.0)})
    path = tmp_path / "snapshots" / "step-00000001.pt"
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 4
    path.write_bytes(content)
    assert snapshots.newest() is None
    path.write_bytes(content[: len(content) // 2])
    assert snapshots.newest() is None
    path.with_suffix(".json").write_text("{")
    assert snapshots.newest() is None


def test_snapshots_of_another_experiment_are_refused(demo_model, few_digits, tmp_path):
    toolkit.fit(demo_model(), few_digits, experiment(epochs=1), folder=tmp_path)
    with pytest.raises(InputError, match="another experiment"):
        toolkit.fit(demo_model(), few_digits, experiment(epochs=2), folder=tmp_path)
    with pytest.raises(InputError, match="another weights"):
        toolkit.fit(demo_model(pretrained=True), few_digits, experiment(epochs=1), folder=tmp_path)
    few_digits = dataclasses.replace(few_digits, hashes={**few_digits.hashes, "train": "other"})
    with pytest.raises(InputError, match="another train data"):
        toolkit.fit(demo_model(), few_digits, experiment(epochs=1), folder=tmp_path)


def test_a_folder_is_claimed_once(demo_model, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "CLAIM_SECONDS", 0.1)
    with resume.claim(tmp_path), pytest.raises(InputError, match="another process"):
        toolkit.fit(demo_model(), few_digits, experiment(), folder=tmp_path)


def test_interrupt_finishes_the_step_and_resumes(demo_model, few_digits, tmp_path, monkeypatch):
    e = experiment(epochs=2)
    reference = demo_model()
    toolkit.fit(reference, few_digits, e)
    original = training._Run._train_step

    def step(self, *batch):
        if self.result.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_train_step", step)
        result = toolkit.fit(demo_model(), few_digits, e, folder=tmp_path)
    assert result.status == "interrupted" and result.steps == 4
    model = demo_model()
    assert toolkit.fit(model, few_digits, e, folder=tmp_path).status == "ok"
    assert same(weights(model), weights(reference))


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


def test_out_of_memory_in_the_test_is_a_result(demo_model, few_digits, monkeypatch):
    def evaluate(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = training.FitResult(status="ok")
    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    assert toolkit.test(demo_model(), few_digits, experiment(), result) is None
    assert result.status == "oom" and result.error.startswith("in the test")


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


def test_schedule_warms_up_and_ends_at_zero(demo_model, few_digits, monkeypatch):
    rates = []
    original = training._Run._set_lr

    def set_lr(self):
        original(self)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training._Run, "_set_lr", set_lr)
    toolkit.fit(
        demo_model("linear"), few_digits, experiment(method="linear", lr=1.0, epochs=10, warmup_fraction=0.2)
    )
    assert len(rates) == 30
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[17] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-12)


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
    assert evaluation.peak_bytes > 0


def test_evaluate_changes_nothing(demo_model, few_digits):
    model = demo_model()
    before = weights(model)
    first = toolkit.evaluate_split(model, few_digits, "test", experiment())
    second = toolkit.evaluate_split(model, few_digits, "test", experiment())
    assert first.loss == second.loss and first.peak_bytes == second.peak_bytes
    assert same(weights(model), before)


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


def test_planned_training_keeps_its_budget_and_the_weights_of_plain_training(demo_model, few_digits):
    for method, budget in (("full", "14MB"), ("bitfit", "12MB")):
        plain, planned = demo_model(method), demo_model(method)
        toolkit.fit(plain, few_digits, experiment(method=method, micro_batch_size=32))
        result = toolkit.fit(
            planned,
            few_digits,
            experiment(method=method, micro_batch_size=32, checkpointing="planned", budget=budget),
        )
        assert result.peak_bytes == result.predicted_peak_bytes <= int(budget.removesuffix("MB")) * 10**6
        assert result.step_flops["recompute"] > 0 and result.checkpointed_blocks > 0
        assert same(weights(plain), weights(planned))


def test_planned_training_takes_micro_batches_where_nothing_else_fits(demo_model, few_digits):
    result = toolkit.fit(demo_model("full"), few_digits, experiment(checkpointing="planned", budget="9.4MB"))
    assert result.status == "ok" and result.peak_bytes <= 9_400_000
    assert 0 < result.micro_batch_size < 32


class RunsOut(TorchDispatchMode):
    """Raises instead of the given operators, counted over the life of the mode."""

    def __init__(self, at):
        super().__init__()
        self.at, self.count = set(at), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count in self.at:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 TiB (injected)")
        return func(*args, **(kwargs or {}))


class SmallNet(nn.Module):
    """Batch norm, in-place ReLU, dropout; two equal blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.blocks = nn.Sequential(*(nn.Sequential(SmallBlock()) for _ in range(2)))
        self.head = nn.Linear(8, 10)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SmallBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.drop(F.relu(self.norm(self.conv(x)), inplace=True))


@pytest.mark.parametrize("errors", [24, pytest.param(100, marks=pytest.mark.long)])
def test_injected_out_of_memory_errors_are_recovered_or_reported(few_digits, monkeypatch, errors):
    planned = experiment(method="full", checkpointing="planned", budget="1GB", epochs=4)
    original = training._Run._passes

    def train(at):
        mode = RunsOut(at)

        def passes(self, *batch):
            with mode:
                return original(self, *batch)

        monkeypatch.setattr(training._Run, "_passes", passes)
        toolkit.seed_everything(0)
        model = SmallNet()
        return toolkit.fit(model, few_digits, planned), weights(model), mode.count

    undisturbed, expected, operators = train(())
    assert undisturbed.status == "ok" and undisturbed.out_of_memory_retries == 0
    gc.collect()
    alive = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    random, injected, recovered = torch.Generator().manual_seed(0), 0, 0
    while injected < errors:
        at = (torch.randperm(operators, generator=random)[:6] + 1).tolist()
        result, trained, _ = train(at)
        injected += len(at)
        if result.status == "ok":
            assert same(trained, expected)
            recovered += result.out_of_memory_retries
        else:
            assert result.status == "oom" and "injected" in result.error
    assert recovered >= 0.9 * errors
    del result, trained
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= alive + 5


def test_weight_decay_leaves_out_what_the_backbone_says():
    experiment = toolkit.Experiment(backbone="small:vim_small", pretrained=False, method="full", device="cpu")
    model = toolkit.build_backbone("small:vim_small", 10, pretrained=False)
    optimizer = training.optimizer_of(model, experiment)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)].rpartition(".")[2]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"weight"}
