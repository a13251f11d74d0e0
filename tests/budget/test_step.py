"""A training step: the runner, and the moments that its observers are told."""

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.budget import TensorMemory
from toolkit.budget.flops import FlopCounter
from toolkit.budget.optimizers import make_state, optimizer_like
from toolkit.budget.step import run_step

BATCH = torch.randn(4, 8), torch.tensor([0, 1, 2, 1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))


def test_a_step_changes_parameters_as_a_loop_does():
    stepped, looped = network(), network()
    run_step(stepped, BATCH, None, torch.optim.SGD(stepped.parameters(), lr=0.1), "fp32")
    optimizer = torch.optim.SGD(looped.parameters(), lr=0.1)
    F.cross_entropy(looped(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    assert all(map(torch.equal, stepped.parameters(), looped.parameters()))
    assert all(p.grad is None for p in stepped.parameters())


class Log(FlopCounter):
    """Notes the moments of a step with the FLOPs before them."""

    def __init__(self):
        super().__init__()
        self.moments = []

    def end_forward(self):
        self.moments.append(("forward", self.flops.forward, self.flops.backward))

    def start_optimizer(self):
        self.moments.append(("backward", self.flops.forward, self.flops.backward))


def test_observers_are_entered_and_told_when_forward_and_backward_end():
    model, log = network(), Log()
    run_step(model, BATCH, None, optimizer_like("sgd", model)(model), "fp32", log)
    forward, first_gradients = 2 * 4 * (8 * 16 + 16 * 3), 2 * 4 * 8 * 16  # the input needs no gradient
    assert log.moments == [
        ("forward", forward, 0),
        ("backward", forward, 2 * forward - first_gradients),
    ]


def test_the_state_of_the_optimizer_is_made_without_changing_the_memory_of_later_steps():
    model = network()
    optimizer = optimizer_like("adamw", model)(model)
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*model.parameters(), *BATCH])
    with memory:
        make_state(model, optimizer)
    before, peaks = memory.allocated_bytes, []
    for _ in range(2):
        memory.reset_peak()
        run_step(model, BATCH, None, optimizer, "fp32", memory)
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1] > before == memory.allocated_bytes
