"""Gradients, schedule, memory and FLOPs of steps; steps that run out of memory."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from short_runs import experiment, same, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import toolkit
from toolkit.model import optimizer_of
from toolkit.training.step import Steps


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
    monkeypatch.setattr(Steps, "_counted", lambda self, batch_size: self.memory)
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


def test_micro_batches_give_the_gradient_of_the_whole_batch(demo_model, few_digits, batch):
    """Three AdamW steps on slices of 5 end in the function in which those on whole batches do.

    Not in the same weights: AdamW makes whole steps of gradients that are mere rounding (biases of keys).
    """
    whole, sliced = demo_model("full"), demo_model("full")
    peaks = [
        toolkit.fit(model, few_digits, experiment(epochs=1, micro_batch_size=micro)).peak_bytes
        for model, micro in ((whole, 0), (sliced, 5))  # 32 = 6 * 5 + 2: an uneven last slice
    ]
    assert peaks[1] < peaks[0]
    with torch.no_grad():
        expected, found = (model.eval()(batch[0]) for model in (whole, sliced))
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_schedule_warms_up_and_ends_at_zero(demo_model, few_digits, monkeypatch):
    rates = []
    original = Steps._set_lr

    def set_lr(self, step):
        original(self, step)
        rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(Steps, "_set_lr", set_lr)
    toolkit.fit(
        demo_model("linear"), few_digits, experiment(method="linear", lr=1.0, epochs=10, warmup_fraction=0.2)
    )
    assert len(rates) == 30
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[17] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-12)


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
    original = Steps._passes

    def train(at):
        mode = RunsOut(at)

        def passes(self, *batch):
            with mode:
                return original(self, *batch)

        monkeypatch.setattr(Steps, "_passes", passes)
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
    optimizer = optimizer_of(model, experiment)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {
        names[id(p)].rpartition(".")[2]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    assert decayed == {"weight"}
