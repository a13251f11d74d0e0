"""A plan says what a step takes to the byte, keeps within the budget, and changes no gradient."""

import contextlib
import itertools
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toolkit
from toolkit.budget import Checkpointing, TensorMemory, find_blocks, format_bytes, parse_bytes
from toolkit.budget.checkpointing import find_segments
from toolkit.budget.fakes import Others, on_fake_tensors
from toolkit.budget.lean import LeanForms
from toolkit.budget.memory import WORKSPACES
from toolkit.budget.optimizers import optimizer_like
from toolkit.budget.plan import Planner, plan
from toolkit.budget.step import autocast, segmented
from toolkit.budget.tape import Tape
from toolkit.errors import InputError

CPU = torch.device("cpu")
HUGE = 1 << 50


class Block(nn.Module):
    """A part of a random model."""

    def __init__(self, width, inner, activation, norm, dropout, residual):
        super().__init__()
        norms = {"": [], "layer": [nn.LayerNorm(width)], "batch": [nn.BatchNorm1d(width)]}
        self.parts = nn.ModuleList(
            [
                *norms[norm],
                nn.Linear(width, inner),
                activation(),
                nn.Dropout(dropout),
                nn.Linear(inner, width),
            ]
        )
        self.residual = residual

    def forward(self, x):
        y = x
        for part in self.parts:
            y = part(y)
        return x + y if self.residual else y


@st.composite
def models(draw):
    """A function that makes the same small model each time, and its batch."""
    width, batch_size = draw(st.sampled_from([8, 33, 64])), draw(st.sampled_from([2, 16, 61]))
    activations = [nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, lambda: nn.ReLU(inplace=True)]
    block = st.tuples(
        st.sampled_from([16, 40, 200]),
        st.sampled_from(activations),
        st.sampled_from(["", "layer", "batch"]),
        st.sampled_from([0.0, 0.3]),
        st.booleans(),
    )
    blocks = draw(st.lists(block, min_size=2, max_size=4))
    frozen = draw(st.integers(0, len(blocks) - 1))

    def build():
        torch.manual_seed(0)
        layers = [Block(width, *options) for options in blocks]
        for layer in layers[:frozen]:
            layer.requires_grad_(False)
        return nn.Sequential(nn.Linear(5, width), nn.Sequential(*layers), nn.Linear(width, 7)).train()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 5, generator=generator)
    return build, (x, torch.randint(0, 7, (batch_size,), generator=generator))


def decisions_of(made, ended):
    """`decide` for a tape, and the function that `segmented` calls, that carry out a plan."""
    place = {"segment": 0, "op": 0}

    def next_segment(*_):
        place.update(segment=place["segment"] + 1, op=0)
        ended()

    def decide(op, contents):
        option = made.options[place["segment"]]
        cost = option.segment.ops[place["op"]]
        place["op"] += 1
        assert cost.name == str(op.func), "the profile has other operators"
        return [option.level.decisions[option.segment.place(buffer)] for buffer in cost.outputs]

    return decide, next_segment


def forward_loss(model, x, y, made, precision="fp32"):
    """Outputs and loss of a batch under a plan, or of the plain model."""
    blocks = find_segments(model)
    with autocast(CPU, precision):
        if made is None:
            out = model(x)
        else:
            decide, ended = decisions_of(made, lambda: None)
            slices = {name: option.slices for name, option in zip(made.segments, made.options)}
            with Tape(decide), segmented(blocks, ended, slices):
                out = model(x)
        return out, F.cross_entropy(out, y)


def measured_peak(model, batch, made=None, precision="fp32", optimizer="adamw", fake=True):
    """Peak bytes of the second step of training, on fake tensors or on real ones."""
    real = contextlib.nullcontext(batch)
    with on_fake_tensors(model, batch, Others(optimizer)) if fake else real as (x, y):
        memory = TensorMemory(CPU)
        memory.track([*model.parameters(), *model.buffers(), x, y])
        stepper = optimizer_like(optimizer, model)(model)
        size = len(x) if made is None else made.micro_batch_size
        with memory:
            for _ in range(2):
                memory.reset_peak()
                for start in range(0, len(x), size):
                    part = slice(start, start + size)
                    outputs, loss = forward_loss(model, x[part], y[part], made, precision)
                    loss.backward()
                    del outputs, loss
                stepper.step()
                stepper.zero_grad(set_to_none=True)
        return memory.peak_bytes


def gradients(build, batch, made=None, precision="fp32"):
    """Loss, gradients and buffers of one real step of a fresh model."""
    model = build()
    torch.manual_seed(1)
    _, loss = forward_loss(model, *batch, made, precision)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **dict(model.named_buffers())}


def assert_same_step(build, batch, made, precision="fp32"):
    plain, planned = gradients(build, batch, None, precision), gradients(build, batch, made, precision)
    assert plain.keys() == planned.keys()
    sliced = any(option.slices > 1 for option in made.options)
    for name, value in plain.items():
        if sliced:
            torch.testing.assert_close(planned[name], value, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(planned[name], value), name


@pytest.fixture
def pair(batch):
    """Two samples, for which the planner tries few sizes of micro-batches."""
    return batch[0][:2], batch[1][:2]


def vit(**options):
    torch.manual_seed(0)
    options = {"img_size": 32, "depth": 3, "num_classes": 10, **options}
    return timm.create_model("vit_tiny_patch16_224", **options).train()


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10).train()


def demo():
    toolkit.seed_everything(0)
    return toolkit.build_backbone("demo_vit", 10, False).train()


@settings(max_examples=8)
@given(models(), st.floats(0, 1), st.booleans(), st.sampled_from(["adamw", "sgd"]))
def test_the_predicted_peak_is_the_measured_one(case, share, real, optimizer):
    """Never above it and at most 1 KiB below, for any model and budget; no gradient changes by a bit."""
    build, batch = case
    planner = Planner(build(), batch, optimizer=optimizer)
    smallest, unplanned = planner.smallest_bytes(), planner.plan(HUGE).peak_bytes
    assert unplanned == measured_peak(build(), batch, optimizer=optimizer)
    # Not the smallest itself: a test of its own.
    budget = int(1.02 * smallest + share * max(0, unplanned - 1.02 * smallest))
    made = planner.plan(budget)
    assert made.peak_bytes <= budget and made.fits
    measured = measured_peak(build(), batch, made, optimizer=optimizer, fake=not real)
    if any(option.slices > 1 for option in made.options):
        assert measured <= budget
    else:
        assert made.peak_bytes - 1024 <= measured <= made.peak_bytes == made.memory.max()
    assert_same_step(build, batch, made)


class Passing(nn.Module):
    """Autograd saves a small tensor that is computed from the input, and not the input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return x + self.layer(x.sum(1, keepdim=True)).relu()


def test_tensors_that_only_recomputation_reads_are_not_held_without_it():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(5, 64), nn.Sequential(*(Passing() for _ in range(4))), nn.Linear(64, 7)
        )

    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(256, 5, generator=generator), torch.randint(0, 7, (256,), generator=generator)
    made = Planner(build(), batch).plan(HUGE)
    assert made.peak_bytes == measured_peak(build(), batch) < 5 * 256 * 64 * 4


def noisy_vit():
    return vit(drop_path_rate=0.3, proj_drop_rate=0.1)


@pytest.mark.parametrize("build, precision", [(demo, "bf16"), (resnet, "fp32"), (noisy_vit, "fp32")])
def test_a_real_network_keeps_within_its_budget(build, precision, batch):
    planner = Planner(build(), batch, precision=precision)
    smallest, unplanned = planner.smallest_bytes(), planner.plan(HUGE).peak_bytes
    assert smallest < unplanned == measured_peak(build(), batch, precision=precision)
    for budget in (smallest, (smallest + unplanned) // 2):
        made = planner.plan(budget)
        assert made.recompute_flops > 0 or any("recompute" in level for level in made.levels.values())
        assert measured_peak(build(), batch, made, precision) <= budget
        if precision == "fp32" or all(option.slices == 1 for option in made.options):
            assert_same_step(build, batch, made, precision)


def test_lean_lora_keeps_within_its_budget(demo_model, batch):
    model = demo_model("lora", dropout=0.1).train()
    planner = Planner(model, batch)
    for budget in (planner.smallest_bytes(), HUGE):
        made = planner.plan(budget)
        forms = LeanForms(model)
        assert measured_peak(model, batch, made) == made.peak_bytes <= budget
        forms.remove()
    assert plan(model, HUGE, batch, lean=False).peak_bytes == measured_peak(model, batch)


def test_a_larger_budget_never_takes_longer(batch):
    planner = Planner(vit(), batch)
    smallest, unplanned = planner.smallest_bytes(), planner.plan(HUGE).peak_bytes
    budgets = [smallest + i * (unplanned - smallest) // 40 for i in range(41)]
    plans = [planner.plan(budget) for budget in budgets]
    seconds = [made.extra_seconds for made in plans]
    assert all(one >= other for one, other in itertools.pairwise(seconds)), seconds
    assert seconds[0] > seconds[-1] == 0 and plans[-1].recompute_flops == 0
    assert all(made.peak_bytes <= budget for made, budget in zip(plans, budgets))
    flops = [made.recompute_flops for made in plans]
    assert sum(flops[:3]) > 0 and flops[0] <= plans[0].forward_flops


def test_an_infeasible_budget_names_the_smallest(pair):
    planner = Planner(vit(), pair)
    smallest = planner.smallest_bytes()
    with pytest.raises(InputError, match="cannot be held: the smallest peak") as error:
        planner.plan(smallest // 2)
    named = re.search(r"for batch 2 is ([\d.]+ MiB)", str(error.value))[1]
    assert planner.plan(parse_bytes(named)).fits and "fixed: weights" in str(error.value)
    assert planner.plan(smallest).peak_bytes <= smallest
    with pytest.raises(InputError, match="cannot be held"):
        planner.plan(int(smallest * 0.998))


@pytest.mark.parametrize("build", [vit, demo])
def test_the_budget_named_in_the_message_is_feasible(build, pair):
    """A person types what the message says."""
    planner = Planner(build(), pair)
    with pytest.raises(InputError) as error:
        planner.plan(1)
    named = str(error.value).split(f"for batch {2} is ")[1].split(" (")[0].split(",")[0]
    assert plan(build(), named, pair).fits


def test_a_reserve_is_subtracted_from_the_budget_of_tensors(pair):
    planner = Planner(vit(), pair)
    smallest = planner.smallest_bytes()
    made = planner.plan(smallest + 10**6, 10**6)
    assert made.peak_bytes == smallest and made.fits and "reserved" in made.explain()
    with pytest.raises(InputError, match="of it reserved"):
        planner.plan(smallest + 10**6 - 10**5, 10**6)
    assert plan(vit(), "1 GiB", pair, reserve="1 MiB").reserve_bytes == 2**20


@pytest.mark.parametrize("build", [vit])
@pytest.mark.parametrize("strategy", ["none", "static", "threshold"])
def test_other_strategies_are_predicted_exactly(build, strategy, batch):
    budget = int(0.6 * measured_peak(build(), batch))
    made = plan(build(), budget, batch, strategy=strategy)
    model = build()
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), *batch])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with memory, Checkpointing(model, strategy, memory=memory, budget_bytes=budget) as wrapper:
        for _ in range(2):
            memory.reset_peak()
            outputs = model(batch[0])
            F.cross_entropy(outputs, batch[1]).backward()
            del outputs
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert made.peak_bytes == memory.peak_bytes
    assert {name for name, level in made.levels.items() if level != "keep"} == wrapper.checkpointed
    assert made.unplanned_peak_bytes == measured_peak(build(), batch)
    assert (made.recompute_flops > 0) == bool(wrapper.checkpointed)
    assert made.strategy == strategy and made.fits == (memory.peak_bytes <= budget)


def test_planning_leaves_the_model_unchanged(demo_model, batch):
    model = demo_model("lora")
    state = {name: (id(p), p.clone(), p.grad) for name, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    planner = Planner(model, batch)
    planner.plan(planner.smallest_bytes())
    for name, p in model.named_parameters():
        assert id(p) == state[name][0] and torch.equal(p, state[name][1]) and p.grad is None
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), random) and model.training


def test_micro_batches_fit_a_budget_that_the_whole_batch_exceeds(batch):
    planner = Planner(demo(), batch)
    budget = int(0.9 * planner.smallest_bytes())
    with pytest.raises(InputError, match="micro-batches"):
        planner.plan(budget)
    made = planner.plan(budget, micro_batches=True)
    assert made.sliced and made.micro_batch_size < made.batch_size == 32
    assert f"micro-batches of {made.micro_batch_size}" in made.explain()
    assert measured_peak(demo(), batch, made) <= made.peak_bytes <= budget


def test_micro_batches_are_refused_for_a_batch_norm(batch):
    planner = Planner(resnet(), batch)
    smallest = planner.smallest_bytes()
    made = planner.plan(smallest, micro_batches=True)
    assert not made.sliced and any("batch norm" in note for note in made.notes)
    assert "batch norm" in made.explain()
    with pytest.raises(InputError, match="cannot be held") as error:
        planner.plan(smallest // 2, micro_batches=True)
    assert "micro-batches" not in str(error.value)


def test_batch_norm_in_evaluation_does_not_couple_samples():
    torch.manual_seed(0)
    layers = nn.Sequential(*[Block(32, 64, nn.GELU, "batch", 0.0, True) for _ in range(3)])
    model = nn.Sequential(nn.Linear(5, 32), layers, nn.Linear(32, 7)).eval()
    planner = Planner(model, (torch.randn(256, 5), torch.zeros(256, dtype=torch.long)))
    made = planner.plan(int(0.9 * planner.smallest_bytes()), micro_batches=True)
    assert made.sliced and not made.notes


def test_the_smallest_peak_is_a_feasible_budget():
    """For small models too, where rounding counts."""
    torch.manual_seed(0)
    options = [(16, nn.GELU, "", 0.0, False), (16, nn.GELU, "", 0.0, True), (200, nn.GELU, "", 0.0, True)]
    layers = nn.Sequential(*[Block(8, *each) for each in options])
    model = nn.Sequential(nn.Linear(5, 8), layers, nn.Linear(8, 7))
    planner = Planner(model, (torch.randn(16, 5), torch.zeros(16, dtype=torch.long)))
    smallest = planner.smallest_bytes()
    assert planner.plan(smallest).peak_bytes <= smallest


@pytest.mark.parametrize("name", ["dropout", "batch"])
def test_blocks_that_couple_samples_are_never_sliced(name):
    options = (200, nn.GELU, "batch" if name == "batch" else "layer", 0.3 * (name == "dropout"), True)
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(0, 7, (64,))

    def slices(options):
        layers = nn.Sequential(*[Block(64, *options) for _ in range(3)])
        planner = Planner(nn.Sequential(nn.Linear(5, 64), layers, nn.Linear(64, 7)).train(), (x, y))
        return {option.slices for options in planner.chain(64, True).options for option in options}

    assert slices(options) == {1}
    assert slices((200, nn.GELU, "layer", 0.0, True)) == {1, 8}


def test_a_block_that_mixes_samples_by_itself_is_not_sliced():
    """Nothing in its operators says so: contrastive losses and mixing do this."""

    class Mixing(Block):
        def forward(self, x):
            return super().forward(x) - x.mean(0, keepdim=True)

    torch.manual_seed(0)
    layers = nn.Sequential(*[Mixing(64, 200, nn.GELU, "", 0.0, True) for _ in range(3)])
    model = nn.Sequential(nn.Linear(5, 64), layers, nn.Linear(64, 7)).train()
    chain = Planner(model, (torch.randn(64, 5), torch.zeros(64, dtype=torch.long))).chain(64, True)
    assert {option.slices for options in chain.options for option in options} == {1}


@pytest.mark.parametrize(
    "optimizer, tensors, scalars",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1, 0),
        (lambda p: torch.optim.AdamW(p, lr=0.1), 2, 0),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, foreach=False), 3, 0),
        ("sgd", 1, 0),
        ("adamw", 2, 1),
    ],
)
def test_the_state_of_the_optimizer_is_counted(demo_model, batch, optimizer, tensors, scalars):
    model = demo_model("bitfit")
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = [optimizer] if isinstance(optimizer, str) else [optimizer, optimizer(trained)]
    rounded = [-(-p.nbytes // 512) * 512 for p in trained]
    for kind in kinds:
        made = plan(model, HUGE, batch, optimizer=kind)
        steps = 512 * len(trained) if tensors >= 2 else 0  # AdamW counts its steps in tensors
        assert made.fixed["optimizer"] == tensors * sum(rounded) + steps
        assert made.fixed["gradients"] == sum(rounded)
        assert made.fixed["weights"] == sum(
            -(-t.nbytes // 512) * 512 for t in (*model.parameters(), *model.buffers())
        )
        assert made.fixed["batch"] == sum(-(-t.nbytes // 512) * 512 for t in batch)


def test_planning_does_not_change_an_optimizer_of_the_model(demo_model, batch):
    model = demo_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    plan(model, HUGE, batch, optimizer=optimizer)
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def test_the_explanation_names_budget_peak_and_levels(batch):
    planner = Planner(vit(), batch)
    made = planner.plan(planner.smallest_bytes())
    text = made.explain()
    assert format_bytes(made.peak_bytes) in text and format_bytes(made.budget_bytes) in text
    assert format_bytes(made.unplanned_peak_bytes) in text and "fits" in text
    assert list(made.levels) == list(find_blocks(vit()))
    assert all(f"{name}  {level}" in text for name, level in made.levels.items())
    assert "recompute" in text and "optimizer" in text
    static = plan(vit(), 1000, batch, strategy="static")
    assert "DOES NOT FIT" in static.explain() and not static.fits


def test_blocks_can_be_named(batch):
    planner = Planner(vit(), batch, blocks=["blocks.0", "blocks.2"])
    assert list(planner.plan(planner.smallest_bytes()).levels) == ["blocks.0", "blocks.2"]


def test_other_losses_and_inputs_are_planned_exactly(batch):
    x, _ = batch
    assert plan(vit(), HUGE, x).peak_bytes > 0
    assert plan(vit(), HUGE, {"x": x}).peak_bytes > 0
    assert plan(vit(), HUGE, ((x,), torch.zeros(32, 10)), loss=F.mse_loss).peak_bytes > 0


BAD = {
    "budget": (r"lots", lambda m, b: plan(m, "lots", b)),
    "reserve": (r"lots", lambda m, b: plan(m, 10**9, b, reserve="lots")),
    "strategy": (r"Did you mean 'static'", lambda m, b: plan(m, 10**9, b, strategy="statik")),
    "blocks": (r"no module 'nope'", lambda m, b: plan(m, 10**9, b, blocks=["nope"])),
    "no tensors": (r"no tensor", lambda m, b: plan(m, 10**9, ([1, 2], [3, 4]))),
    "empty batch": (r"no tensor", lambda m, b: plan(m, 10**9, (b[0][:0], b[1][:0]))),
    "optimizer": (r"Did you mean 'adamw'", lambda m, b: plan(m, 10**9, b, optimizer="adam")),
    "foreign": (r"not parameters of the model", lambda m, b: plan(m, 10**9, b, optimizer=foreign())),
    "precision": (r"unknown precision", lambda m, b: plan(m, 10**9, b, precision="bf17")),
    "static without tensors": (r"no tensor", lambda m, b: plan(m, 10**9, ([1], [2]), strategy="static")),
    "nothing trains": (r"train", lambda m, b: plan(m.requires_grad_(False), HUGE, b)),
    "static optimizer": (r"'adamw'", lambda m, b: plan(m, 10**9, b, strategy="static", optimizer="adam")),
}


def foreign():
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_the_message(case, batch):
    message, call = BAD[case]
    with pytest.raises(InputError, match=message):
        call(vit(depth=2), batch)


def test_a_model_that_cannot_run_one_sample_still_gets_the_message_about_its_budget(pair):
    """While it looks for a batch that fits, the planner must not fall over one that cannot run."""
    with pytest.raises(InputError, match="cannot be held"):
        plan(resnet(), 10**6, pair)


def test_blocks_that_allocate_nothing_are_planned():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Identity(), nn.Linear(8, 8))
    batch = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    made = plan(model, HUGE, batch, blocks=["0", "1", "2", "3"])
    assert list(made.levels) == ["0", "1", "2", "3"]
    assert made.peak_bytes == measured_peak(model, batch)


def test_an_eight_bit_optimizer_is_planned_exactly(demo_model, batch):
    """Its state is a quarter; bitsandbytes' tables of numbers are made when the optimizer is."""
    import bitsandbytes

    model = demo_model("full")
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-3)
    stock = toolkit.plan(model, "1GB", batch)
    small = toolkit.plan(model, "1GB", batch, optimizer=optimizer)
    assert small.fixed["optimizer"] < 0.4 * stock.fixed["optimizer"]
    made = toolkit.plan(model, int(0.7 * small.peak_bytes), batch, optimizer=optimizer)
    memory = TensorMemory(CPU)
    memory.track([*model.parameters(), *model.buffers(), *batch])
    with memory:
        for _ in range(2):
            memory.reset_peak()
            outputs, loss = forward_loss(model, *batch, made)
            loss.backward()
            del outputs, loss
            optimizer.step()
            optimizer.zero_grad()
    assert made.peak_bytes - 8192 <= memory.peak_bytes <= made.peak_bytes <= made.budget_bytes


@torch.library.custom_op("toolkit_tests::with_workspace", mutates_args=())
def with_workspace(x: torch.Tensor) -> torch.Tensor:
    return x * 2


with_workspace.register_fake(torch.empty_like)
with_workspace.register_autograd(lambda ctx, grad: grad * 2)


def test_workspaces_of_operators_count_in_recomputation_too(monkeypatch):
    operator = torch.ops.toolkit_tests.with_workspace.default

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return x + F.gelu(with_workspace(self.fc(x)))

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(*(Block() for _ in range(6))), nn.Linear(32, 3))

    batch = torch.randn(64, 32), torch.arange(64) % 3
    without = toolkit.plan(network(), "1GB", batch).peak_bytes
    monkeypatch.setitem(WORKSPACES, operator, lambda x: 20 * x.nbytes)
    free = toolkit.plan(network(), "1GB", batch)
    assert free.peak_bytes > without + 15 * 64 * 32 * 4
    recomputed = set()
    for percent in (95, 90, 85, 80):
        with contextlib.suppress(InputError):
            made = toolkit.plan(network(), free.peak_bytes * percent // 100, batch)
            recomputed |= {name for option in made.options for name in option.level.recomputed}
            assert measured_peak(network(), batch, made) == made.peak_bytes
    assert str(operator) in recomputed


@pytest.mark.parametrize("strategy", ["none", "static", "planned"])
def test_held_bytes_count_under_every_strategy(demo_model, batch, strategy):
    peaks = [
        toolkit.plan(demo_model("lora"), "1GB", batch, strategy=strategy, held_bytes=held).peak_bytes
        for held in (0, 10_240)
    ]
    assert peaks[1] - peaks[0] == 10_240


class Sequences(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer(32, 64, num_layers=2, batch_first=True), nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch.backends.mkldnn.flags, on any processor
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_memory_of_recurrent_layers_is_predicted_or_refused(layer):
    """oneDNN has a kernel for LSTMs alone; its workspace is half of the step's memory."""
    batch = torch.randn(16, 20, 32), torch.arange(16) % 5
    with torch.backends.mkldnn.flags(enabled=layer is not nn.LSTM):
        made = toolkit.plan(Sequences(layer).train(), "1GB", batch)
        assert measured_peak(Sequences(layer).train(), batch, made) == made.peak_bytes
    if layer is nn.LSTM and torch.backends.mkldnn.is_available():
        model = Sequences(layer)
        for predict in (toolkit.plan, toolkit.auto_checkpoint):
            with pytest.raises(InputError, match=r"torch\.backends\.mkldnn\.flags\(enabled=False\)"):
                predict(model, "1GB", batch)
