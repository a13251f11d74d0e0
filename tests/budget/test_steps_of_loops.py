"""Loops as people write them: budgets are held from the first step on, or it is told; gradients are equal."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.budget import TensorMemory, tensors_of
from toolkit.errors import InputError

X = torch.randn(32, 12, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32 * 12).view(32, 12) % 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 128), nn.Linear(128, 16)

    def forward(self, x):  # (B, N, 16)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


class ValueDependentBlock(Block):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum().item() > 0 else 0.5)


def network(block=Block):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*[block() for _ in range(6)]), nn.Linear(16, 5))


def loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class Loop:
    """Steps of a model; `peaks`: of each step, with all that the loop holds counted."""

    def __init__(self, block=Block, held=()):
        self.model = network(block)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.memory = TensorMemory(torch.device("cpu"))
        self.memory.track([*tensors_of(self.model), X, Y, *held])
        self.peaks = []

    def run(self, step, steps):
        torch.manual_seed(1)
        for _ in range(steps):
            self.memory.reset_peak()
            with self.memory:
                step(self.model)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.peaks.append(self.memory.peak_bytes)
        return self


def one_forward(model):
    loss(model(X), Y).backward()


def accumulated(model):
    one_forward(model)
    one_forward(model)


def siamese(model):
    (loss(model(X), Y) + loss(model(X.flip(1)), Y)).backward()


def crops(model):
    """Calls the network on crops of two sizes."""
    outputs = [model(X), *(model(half.contiguous()) for half in X.chunk(2, dim=1))]
    sum(loss(out, Y[:, : out.shape[1]]) for out in outputs).backward()


def large_loss(model):
    """Its tensors outside the model are larger than those inside."""
    loss(model(X).repeat(1, 1, 60), Y).backward()


def loss_of_values(model):
    outputs = model(X)
    (loss(outputs, Y) * max(outputs.mean(0).flatten().tolist())).backward()


STEPS = [
    one_forward,
    accumulated,
    siamese,
    crops,
    large_loss,
    loss_of_values,
]


@pytest.mark.parametrize("batch", [None, (X, Y)], ids=["recorded", "planned"])
@pytest.mark.parametrize("step", STEPS)
def test_budget_and_gradients_are_kept(step, batch):
    """All steps are within the budget, also those that run before the loop is known."""
    plain = Loop().run(step, 5)
    budget = int(0.7 * max(plain.peaks))
    planned = Loop()
    with toolkit.auto_checkpoint(
        planned.model, budget, batch, loss=loss, optimizer=planned.optimizer
    ) as handle:
        planned.run(step, 5)
        assert max(planned.peaks) <= budget
        assert handle.plan.recompute_flops > 0 and handle.departures == 0
    for a, b in zip(plain.model.parameters(), planned.model.parameters()):
        assert torch.equal(a, b)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_graph_that_is_retained_is_planned_for():
    """What the first backward pass asks for counts until the last has used it: most of the plain step."""

    def two_backwards(model):
        outputs = model(X)
        loss(outputs, Y).backward(retain_graph=True)
        outputs.square().mean().backward()

    plain = Loop().run(two_backwards, 4)
    budget = int(1.05 * max(plain.peaks))
    planned = Loop()
    with toolkit.auto_checkpoint(planned.model, budget, optimizer=planned.optimizer) as handle:
        planned.run(two_backwards, 4)
        assert max(planned.peaks) <= handle.plan.peak_bytes <= budget
    for a, b in zip(plain.model.parameters(), planned.model.parameters()):
        assert torch.equal(a, b)


def test_a_path_that_depends_on_values_is_recorded():
    plain = Loop(ValueDependentBlock).run(one_forward, 4)
    budget = int(0.6 * max(plain.peaks))
    planned = Loop(ValueDependentBlock)
    with toolkit.auto_checkpoint(planned.model, budget, optimizer=planned.optimizer) as handle:
        assert handle.plan is None
        planned.run(one_forward, 4)
        assert max(planned.peaks) <= budget and handle.plan.peak_bytes <= budget
    for a, b in zip(plain.model.parameters(), planned.model.parameters()):
        assert torch.equal(a, b)


def test_what_the_loop_holds_is_planned_for():
    teacher = network()

    def distilled(model):
        with torch.no_grad():
            target = teacher(X)
        (loss(out := model(X), Y) + F.mse_loss(out, target)).backward()

    held = tensors_of(teacher)
    budget = int(0.75 * max(Loop(held=held).run(distilled, 3).peaks))
    planned = Loop(held=held)
    with toolkit.auto_checkpoint(
        planned.model, budget, (X, Y), loss=loss, optimizer=planned.optimizer, held=teacher
    ):
        assert max(planned.run(distilled, 4).peaks) <= budget


def test_accumulation_can_be_told_in_advance():
    budget = int(0.7 * max(Loop().run(accumulated, 3).peaks))
    planned = Loop()
    with toolkit.auto_checkpoint(
        planned.model, budget, (X, Y), loss=loss, optimizer=planned.optimizer, accumulate=2
    ) as handle:
        assert max(planned.run(accumulated, 3).peaks) <= budget
        assert handle.replans == 0


def test_an_optimizer_with_more_state_is_planned_for():
    plain = Loop().run(one_forward, 3)
    budget = int(0.7 * max(plain.peaks))
    planned = Loop()
    with toolkit.auto_checkpoint(planned.model, budget, (X, Y), loss=loss, optimizer="sgd") as handle:
        planned.run(one_forward, 4)
        assert max(planned.peaks[1:]) <= budget and handle.replans == 1


def test_a_batch_that_does_not_fit_is_refused_each_time():
    planned = Loop()
    small = X[:4], Y[:4]
    budget = int(1.2 * toolkit.plan(planned.model, "1GB", small, loss=loss).unplanned_peak_bytes)
    with toolkit.auto_checkpoint(planned.model, budget, small, loss=loss) as handle:
        for _ in range(2):
            with pytest.raises(InputError, match="cannot be held"):
                planned.model(X.repeat(8, 1, 1))
        loss(planned.model(small[0]), small[1]).backward()
        assert handle.plan.batch_size == 4
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_smaller_sizes_need_no_plan_and_growing_ones_few():
    model = network()
    lengths = (3, 5, 6, 7, 8, 9, 10, 11, 12, 4, 8)

    def gradients(length):
        torch.manual_seed(0)
        loss(model(X[:, :length].contiguous()), Y[:, :length]).backward()
        found = [p.grad.numpy().copy() for p in model.parameters()]  # no tensors, which the loop would hold
        model.zero_grad()
        return found

    plain = [gradients(length) for length in lengths]
    with toolkit.auto_checkpoint(model, "1.2MB", (X[:, :4], Y[:, :4]), loss=loss) as handle:
        for length, expected in zip(lengths, plain):
            assert all(map(np.array_equal, gradients(length), expected))
        assert handle.replans <= 6 and handle.departures == 0


def test_plans_of_many_shapes_do_not_pile_up():
    model = network()
    with toolkit.auto_checkpoint(model, "100MB", (X[:1, :1], Y[:1, :1]), loss=loss) as handle:
        for n in range(2, 13):
            model(X[:n, : 13 - n]).sum().backward()
            model.zero_grad()
        assert len(handle._loop._known) <= 8


def test_a_step_that_is_never_the_same_is_told_once():
    class Random(Block):
        def forward(self, x):
            for _ in range(int(torch.randint(1, 9, ()))):
                x = super().forward(x)
            return x

    model = network(Random)
    torch.manual_seed(0)
    with toolkit.auto_checkpoint(model, "3MB"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(12):
            one_forward(model)
            model.zero_grad()
    assert ["other operators in every step" in str(each.message) for each in told].count(True) == 1
