"""Models that checkpoint themselves: the plan takes over, and says so."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from toolkit.budget import Planner, TensorMemory, auto_checkpoint, tensors_of

X, Y = torch.randn(64, 24, 16), torch.randint(0, 5, (64, 24))


class Block(nn.Module):
    reentrant: bool | None = None

    def __init__(self, width=48):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 192), nn.Linear(192, width)

    def branch(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x):
        if self.reentrant is None:
            return x + self.branch(x)
        return x + torch.utils.checkpoint.checkpoint(self.branch, x, use_reentrant=self.reentrant)


def network(reentrant=None):
    torch.manual_seed(0)
    blocks = nn.Sequential(*[Block() for _ in range(4)])
    for block in blocks:
        block.reentrant = reentrant
    return nn.Sequential(nn.Linear(16, 48), blocks, nn.Linear(48, 5)).train()


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("share", [1.02, 1.5, 100])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_plan_decides_what_is_recomputed(reentrant, share):
    stock = torch.utils.checkpoint.CheckpointFunction
    plain, model = network(), network(reentrant)
    loss(plain(X), Y).backward()
    budget = int(share * Planner(plain, (X, Y), loss=loss, optimizer="sgd").smallest_bytes())
    memory = TensorMemory(torch.device("cpu"))
    memory.track([*tensors_of(model), X, Y])
    with auto_checkpoint(model, budget, (X, Y), loss=loss, optimizer="sgd") as handle, memory:
        loss(model(X), Y).backward()
    assert any("own checkpointing" in note for note in handle.plan.notes)
    assert memory.peak_bytes <= handle.plan.peak_bytes <= budget and handle.departures == 0
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.utils.checkpoint.CheckpointFunction is stock


def test_without_a_plan_they_checkpoint_as_ever():
    model = network(False)
    runs = []
    model[1][0].up.register_forward_hook(lambda *_: runs.append(1))
    with auto_checkpoint(model, "1GB", (X, Y), loss=loss):
        pass
    loss(model(X), Y).backward()
    assert len(runs) == 2
