"""Training programs of several models or several steps: what they hold besides is seen, and planned for."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.budget import Planner, TensorMemory, tensors_of

X = torch.randn(32, 12, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):  # (B, N, width)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)


def network(outputs=16, width=16):
    blocks = nn.Sequential(*[Block(width) for _ in range(4)])
    return nn.Sequential(nn.Linear(16, width), blocks, nn.Linear(width, outputs))


def square(outputs, targets=None):
    return outputs.square().mean()


class Program:
    """Trains `trained`; all modules that are its attributes are held."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = network()
        self.make()
        self.trained = self.trained or [self.model]
        self.optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in self.trained]
        self.memory = TensorMemory(torch.device("cpu"))
        self.modules = [value for value in vars(self).values() if isinstance(value, nn.Module)]
        self.memory.track([X, *(tensor for module in self.modules for tensor in tensors_of(module))])

    trained = ()

    def make(self):
        """Make what else the program trains or holds."""

    def update(self, index=0):
        self.optimizers[index].step()
        self.optimizers[index].zero_grad()

    def run(self, steps):
        """Run, and return the peak bytes of each step."""
        torch.manual_seed(1)
        peaks = []
        for _ in range(steps):
            self.memory.reset_peak()
            with self.memory:
                self.step()
            peaks.append(self.memory.peak_bytes)
        return peaks


class Distillation(Program):
    """The teacher, which is the larger one, has run before the student."""

    def make(self):
        self.teacher = network(width=48)

    def step(self):
        with torch.no_grad():
            target = self.teacher(X)
        F.mse_loss(self.model(X), target).backward()
        self.update()


class LateDistillation(Distillation):
    def step(self):
        outputs = self.model(X)
        with torch.no_grad():
            target = self.teacher(X)
        F.mse_loss(outputs, target).backward()
        self.update()


class Average(Program):
    def make(self):
        self.average = copy.deepcopy(self.model)

    def step(self):
        square(self.model(X)).backward()
        self.update()
        with torch.no_grad():
            for mean, new in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(new, 0.1)


class Sharpness(Program):
    """Sharpness-aware minimisation: the gradient of moved weights, of which it keeps a copy."""

    def step(self):
        square(self.model(X)).backward()
        with torch.no_grad():
            before = [p.clone() for p in self.model.parameters()]
            for p in self.model.parameters():
                p.add_(p.grad, alpha=0.05)
        self.optimizers[0].zero_grad()
        square(self.model(X)).backward()
        with torch.no_grad():
            for p, old in zip(self.model.parameters(), before):
                p.copy_(old)
        self.update()


class Adversarial(Program):
    """A generator whose graph waits while the discriminator trains."""

    def make(self):
        self.discriminator = network(outputs=1)
        self.trained = [self.model, self.discriminator]

    def step(self):
        fake = self.model(torch.randn_like(X))
        real, made = self.discriminator(X), self.discriminator(fake.detach())
        (F.softplus(-real) + F.softplus(made)).mean().backward()
        self.update(1)
        F.softplus(-self.discriminator(fake)).mean().backward()
        self.update(0)
        self.optimizers[1].zero_grad()


class AdversarialInTurn(Adversarial):
    """The discriminator's step comes first, and alone."""

    def step(self):
        with torch.no_grad():
            fake = self.model(torch.randn_like(X))
        (F.softplus(-self.discriminator(X)) + F.softplus(self.discriminator(fake))).mean().backward()
        self.update(1)
        F.softplus(-self.discriminator(self.model(torch.randn_like(X)))).mean().backward()
        self.update(0)
        self.optimizers[1].zero_grad()


PROGRAMS = [Distillation, LateDistillation, Average, Sharpness, Adversarial, AdversarialInTurn]


@pytest.mark.parametrize("batch", [None, X], ids=["recorded", "planned"])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_budget_and_weights_are_kept(kind, batch):
    plain, planned = kind(), kind()
    budget = int(0.7 * max(plain.run(5)))
    handles = [
        toolkit.auto_checkpoint(model, budget, batch, loss=square, optimizer=optimizer)
        for model, optimizer in zip(planned.trained, planned.optimizers)
    ]
    peaks = planned.run(5)
    if kind is not Adversarial:  # where what runs inside another step recomputes enough
        assert any(handle.plan.recompute_flops for handle in handles)
    for handle in handles:
        assert handle.departures == 0 and handle.replans <= 2
        handle.remove()
    if kind is Adversarial:
        assert "inside      " in handles[1].report() and "inside      " not in handles[0].report()
    assert max(peaks) <= budget
    for module, other in zip(plain.modules, planned.modules):
        assert all(map(torch.equal, tensors_of(module), tensors_of(other)))
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_what_leaves_no_room_is_told_once():
    planned = Distillation()
    budget = int(1.05 * Planner(planned.model, X, loss=square).smallest_bytes())
    with (
        toolkit.auto_checkpoint(planned.model, budget, optimizer=planned.optimizers[0]) as handle,
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        planned.run(4)
    kinds = ["between" if "between the steps" in str(each.message) else "besides" for each in told]
    assert sorted(kinds) == ["besides", "between"]  # its weights, and its forward pass alone
    assert handle.departures == 0 and handle.plan.recompute_flops > 0
