"""What the tests of integrations share: a program that runs with and without a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.utils import random_seed
from torch import nn

from toolkit.budget import TensorMemory, tensors_of


class Watch:
    """Counts the tensors of a training program from its second step on, as its callbacks tell."""

    def __init__(self):
        self.memory = TensorMemory(torch.device("cpu"))
        self.steps = 0

    def step_begins(self, model: nn.Module, *others: torch.Tensor) -> None:
        """Tell of a step; `others`: tensors of the loop that were made before the first."""
        if self.steps == 0:
            self.memory.track([*tensors_of(model), *others])
            self.memory.__enter__()
        elif self.steps == 1:
            self.memory.reset_peak()
        self.steps += 1

    def training_ends(self) -> int:
        """Stop, and return the highest bytes."""
        self.memory.__exit__(None, None, None)
        assert self.steps > 2
        return self.memory.peak_bytes


@dataclass
class Run:
    """What a program leaves."""

    model: nn.Module
    peak_bytes: int
    handle: object = None


def held(program: Callable[[int | None], Run], share: float) -> Run:
    """Run `program` without a budget, then within `share` of the peak that it had; return the second run.

    The budget must be held, and the trained weights must be the same.
    """
    random_seed(0)
    plain = program(None)
    budget_bytes = int(share * plain.peak_bytes)
    random_seed(0)
    planned = program(budget_bytes)
    assert planned.peak_bytes <= budget_bytes < plain.peak_bytes
    expected = plain.model.state_dict()
    for name, value in planned.model.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert planned.handle.replans <= 2
    return planned
