"""Optimizers of any class are planned: their state is that of their own first step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolkit.budget import plan
from toolkit.errors import InputError

BATCH = torch.randn(4, 32), torch.tensor([0, 1, 2, 1])
PARAMETERS = 32 * 64 + 64 * 5  # none is smaller than what an allocation is rounded to


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.GELU(), nn.Linear(64, 5, bias=False)).train()


def state_bytes(optimizer):
    """What its real state takes, rounded as the allocator does."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(-(-t.nbytes // 512) * 512 for t in tensors)


class Wrapper:
    """As the wrappers of accelerate: no `torch.optim.Optimizer`, and their own `zero_grad`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self):
        self.optimizer.zero_grad()


class SharpnessAware(torch.optim.Optimizer):
    """Steps only with a closure, as SAM."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "needs a closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
        torch.enable_grad()(closure)()
        self.base.step()


class Undecided(torch.optim.Adam):
    """Its step runs outside of torch."""

    def step(self, closure=None):
        self.param_groups[0]["params"][0].detach().numpy().sum()
        super().step(closure)


TORCHS = ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop",
          "Rprop", "SGD", "Muon")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TORCHS if hasattr(torch.optim, name)])
def test_the_state_of_torchs_optimizers_is_predicted_before_and_after_their_first_step(name):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters())
    before = plan(model, "1GB", BATCH, optimizer=optimizer)
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    values = [parameter.clone() for parameter in model.parameters()]
    after = plan(model, "1GB", BATCH, optimizer=optimizer)
    assert before.fixed["optimizer"] == after.fixed["optimizer"] == state_bytes(optimizer)
    assert before.peak_bytes == after.peak_bytes and before.notes == after.notes == ()
    assert all(map(torch.equal, values, model.parameters()))
    of_class = plan(network(), "1GB", BATCH, optimizer=getattr(torch.optim, name))
    assert of_class.fixed["optimizer"] == before.fixed["optimizer"]


@pytest.mark.parametrize(
    "make, copies",
    [
        (lambda p: Wrapper(torch.optim.SGD(p, lr=0.1, momentum=0.9)), 1),
        (SharpnessAware, 2),
        (lambda p: torch.optim.LBFGS(p, history_size=5), 10),
    ],
)
def test_optimizers_of_other_kinds_step_on_fakes(make, copies):
    model = network()
    made = plan(model, "1GB", BATCH, optimizer=make(list(model.parameters())))
    assert made.notes == ()
    assert copies * 4 * PARAMETERS <= made.fixed["optimizer"] < (copies + 3) * 4 * PARAMETERS


def test_a_state_that_cannot_be_predicted_is_assumed_and_told():
    model = network()
    optimizer = Undecided(model.parameters())
    assumed = plan(model, "1GB", BATCH, optimizer=optimizer)
    assert "Undecided" in assumed.notes[0] and "AdamW" in assumed.notes[0]
    assert assumed.fixed["optimizer"] == plan(model, "1GB", BATCH).fixed["optimizer"]
    F.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    known = plan(model, "1GB", BATCH, optimizer=optimizer)
    assert "that it has" in known.notes[0] and known.fixed["optimizer"] == state_bytes(optimizer)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 5, dtype=torch.cfloat))

    def forward(self, x):
        return (torch.fft.fft(x) @ self.weight).abs()


def test_what_an_optimizer_refuses_is_not_blamed_on_the_model():
    made = plan(Complex(), "1GB", BATCH)
    assert "fused" in made.notes[0] and made.fixed["optimizer"] >= 2 * 32 * 5 * 8


def test_an_optimizer_that_is_none_is_refused():
    with pytest.raises(InputError, match="optimizer must be adamw or sgd"):
        plan(network(), "1GB", BATCH, optimizer=42)
