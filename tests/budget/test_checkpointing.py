"""Blocks are found; checkpointing them changes when activations are computed, never the results."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.budget import Checkpointing, TensorMemory, find_blocks
from toolkit.budget.checkpointing import Threshold
from toolkit.errors import InputError

CPU = torch.device("cpu")
METHODS = ("linear", "bitfit", "lora", "full")


def step(model, batch, strategy, budget_bytes=10**9, tau=0.55):
    """One forward and backward: (loss, gradients, peak bytes, forward passes per block, wrapper)."""
    x, y = batch
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), x, y])
    passes = Counter()
    hooks = [
        next(block.children()).register_forward_hook(lambda *_, name=name: passes.update([name]))
        for name, block in find_blocks(model).items()
    ]
    chosen = Threshold(tau) if strategy == "threshold" else strategy
    wrapper = Checkpointing(model, chosen, memory=memory, budget_bytes=budget_bytes)
    torch.manual_seed(1)
    with memory, wrapper:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, memory.peak_bytes, list(passes.values()), wrapper


def some_blocks_budget(model, batch):
    """A budget whose 80 % are reached early in the forward pass."""
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), *batch])
    start = memory.allocated_bytes
    with memory:
        output = model(batch[0])
    end, _ = memory.allocated_bytes, output
    return int((0.7 * start + 0.3 * end) / 0.8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["static", "threshold"])
def test_losses_and_gradients_are_bit_identical(demo_model, batch, method, strategy):
    budget = some_blocks_budget(demo_model(method), batch)
    plain = step(demo_model(method), batch, "none")
    other = step(demo_model(method), batch, strategy, budget, tau=0.8)
    assert other[0] == plain[0]
    assert other[1].keys() == plain[1].keys()
    assert all(torch.equal(other[1][name], gradient) for name, gradient in plain[1].items())
    if strategy == "threshold" and method != "linear":
        assert 0 < len(other[4].checkpointed) < 4, "the test has to exercise both kinds of block"


def test_dropout_is_recomputed_with_the_same_mask(demo_model, batch):
    plain = step(demo_model("lora", dropout=0.5).train(), batch, "none")
    static = step(demo_model("lora", dropout=0.5).train(), batch, "static")
    assert static[0] == plain[0]
    assert all(torch.equal(static[1][name], gradient) for name, gradient in plain[1].items())


@pytest.mark.parametrize("name", ["resnet18", "tiny_vit_5m_224"])
def test_batch_norm_statistics_are_updated_once(name):
    """Recomputation runs the block again; its running statistics must not move again."""
    models = []
    for strategy in ("none", "static"):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4, drop_path_rate=0.0).train()
        wrapper = Checkpointing(model, strategy, memory=TensorMemory(CPU), budget_bytes=1)
        with wrapper:
            x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            model(x).sum().backward()
        models.append(model)
    plain, static = models
    buffers = dict(plain.named_buffers())
    assert sum("running_mean" in buffer for buffer in buffers) > 10
    assert all(torch.equal(buffers[name], buffer) for name, buffer in static.named_buffers())
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert all(torch.equal(gradients[name], p.grad) for name, p in static.named_parameters())


class _Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.other = nn.utils.spectral_norm(nn.Linear(8, 8))

    def forward(self, x):
        return x + self.other(torch.tanh(self.one(x)))


class _Stateful(nn.Module):
    """Depends on counters, on a mean that it keeps, and on random numbers that are not torch's."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.log = nn.Linear(8, 8), 0, []
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x + self.linear(torch.tanh(x)) * self.calls * random.random() * np.random.rand() + self.mean


@pytest.mark.filterwarnings("ignore:.*spectral_norm")
@pytest.mark.parametrize("block", [_Spectral, _Stateful])
def test_recomputation_starts_from_the_state_of_the_first_pass(block):
    seen = []
    for strategy in ("none", "static"):
        toolkit.seed_everything(0)
        model = nn.Sequential(nn.Sequential(*[block() for _ in range(3)]), nn.Linear(8, 2))
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        with Checkpointing(model, strategy, memory=TensorMemory(CPU), budget_bytes=1):
            for _ in range(2):
                model(x).sum().backward()
        python = [(getattr(part, "calls", 0), getattr(part, "log", ())) for part in model[0]]
        tensors = [p.grad for p in model.parameters()] + list(model.buffers())
        seen.append((python, random.random(), np.random.rand(), tensors))
    plain, static = seen
    assert plain[:3] == static[:3]
    assert all(map(torch.equal, plain[3], static[3]))


def test_blocks_that_are_a_small_part_of_the_model_cause_a_warning():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(_Small(), _Small()))
    with pytest.warns(UserWarning, match=r"2 blocks found in Sequential hold 3 %"):
        Checkpointing(model, "static", memory=TensorMemory(CPU), budget_bytes=1).remove()


class _Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)


def test_static_recomputes_every_block_once(demo_model, batch):
    assert step(demo_model(), batch, "none")[3] == [1, 1, 1, 1]
    assert step(demo_model(), batch, "static")[3] == [2, 2, 2, 2]


def test_threshold_keeps_a_prefix_and_recomputes_the_rest(demo_model, batch):
    """The published rule: a block is checkpointed iff the bytes at its entry reach tau * budget."""
    entries = []
    model = demo_model()
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *batch])
    hooks = [
        block.register_forward_pre_hook(lambda *_: entries.append(memory.allocated_bytes))
        for block in find_blocks(model).values()
    ]
    with memory:
        model(batch[0])
    for hook in hooks:
        hook.remove()
    assert entries == sorted(entries) and len(set(entries)) == 4

    for kept in range(5):
        # Just above the entry of the last block that is to be kept, so that the next one reaches it.
        limit = entries[kept - 1] + 1 if kept else entries[0]
        model = demo_model()
        _, _, _, passes, wrapper = step(model, batch, "threshold", budget_bytes=2 * limit, tau=0.5)
        assert passes == [1] * kept + [2] * (4 - kept)
        assert wrapper.checkpointed == {f"blocks.{i}" for i in range(kept, 4)}


@pytest.mark.parametrize("method", ["bitfit", "lora", "full"])
def test_peak_orders_none_threshold_static(demo_model, batch, method):
    budget = some_blocks_budget(demo_model(method), batch)
    none, threshold, static = (
        step(demo_model(method), batch, strategy, budget, tau=0.8)[2]
        for strategy in ("none", "threshold", "static")
    )
    assert none > threshold >= static


def test_peak_is_the_same_to_the_byte_every_time(demo_model, batch):
    peaks = {step(demo_model("lora"), batch, "threshold", 20 * 2**20)[2] for _ in range(3)}
    assert len(peaks) == 1


def test_checkpointing_saves_nothing_below_a_frozen_backbone(demo_model, batch):
    assert step(demo_model("linear"), batch, "none")[2] == step(demo_model("linear"), batch, "static")[2]


def test_nothing_is_checkpointed_without_gradients(demo_model, batch):
    model = demo_model()
    with Checkpointing(model, "static", memory=TensorMemory(CPU), budget_bytes=1) as wrapper, torch.no_grad():
        model(batch[0])
        assert wrapper.checkpointed == set()


def test_remove_restores_the_model(demo_model, batch):
    model = demo_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with Checkpointing(model, "static", memory=TensorMemory(CPU), budget_bytes=1):
        assert any(set(vars(module)) != before[name] for name, module in model.named_modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_unknown_strategy_names_the_nearest(demo_model):
    with pytest.raises(InputError, match="Did you mean 'static'"):
        Checkpointing(demo_model(), "statik", memory=TensorMemory(CPU), budget_bytes=1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch16_224", [f"blocks.{i}" for i in range(12)]),
        # 2 MBConv and 2 + 6 + 2 transformer blocks, not the four stages
        (
            "tiny_vit_21m_224",
            [f"stages.{s}.blocks.{i}" for s, n in enumerate((2, 2, 6, 2)) for i in range(n)],
        ),
        ("resnet18", [f"layer{s}.{i}" for s in (1, 2, 3, 4) for i in (0, 1)]),
    ],
)
def test_blocks_of_known_backbones(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert list(find_blocks(model)) == expected


def test_adapters_do_not_change_the_blocks(demo_model):
    plain, wrapped = find_blocks(demo_model()), find_blocks(demo_model("lora"))
    assert list(plain) == [f"blocks.{i}" for i in range(4)]
    assert [name.removeprefix("base_model.model.") for name in wrapped] == list(plain)


def test_a_lora_layer_inside_a_sequential_is_not_a_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))})
                for _ in range(2)
            )
            self.blocks = nn.Sequential(*(_Residual() for _ in range(3)))
            self.head = nn.Linear(4, 2)

        def get_classifier(self):
            return self.head

    model = toolkit.adapt(Net(), "lora", rank=2)
    assert [name.split(".")[-2:] for name in find_blocks(model)] == [["blocks", str(i)] for i in range(3)]


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.mlp(x)


def test_models_without_repeated_modules_are_refused():
    with pytest.raises(InputError, match="no repeated"):
        find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def test_the_budget_package_needs_nothing_but_torch():
    code = (
        "import sys, toolkit.budget; print(sorted({'timm', 'peft', 'pandas', 'skimage'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
