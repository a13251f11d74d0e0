"""One of the processes of a data-parallel training program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.budget import TensorMemory, auto_checkpoint, tensors_of

STEPS = 4


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):  # (B, N, 16)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*[_Block() for _ in range(4)]), nn.Linear(16, 1))


def _train(
    x: torch.Tensor, views: bool, budget: int | None = None, recorded: bool = False
) -> tuple[nn.Module, list[int]]:
    model = DistributedDataParallel(_network(), gradient_as_bucket_view=views)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    memory, handle, peaks = TensorMemory(torch.device("cpu")), None, []
    memory.track([x, *tensors_of(model)])
    if budget is not None:
        batch = None if recorded else x
        handle = auto_checkpoint(
            model, budget, batch, optimizer=optimizer, loss=lambda out, _: out.square().mean()
        )
    for _ in range(STEPS):
        memory.reset_peak()
        with memory:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks.append(memory.peak_bytes)
    if handle is not None:
        assert handle.departures == 0 and handle.plan.recompute_flops > 0
        handle.remove()
    return model, peaks


def run(rank: int, store: str) -> None:
    """Train with and without a budget, and compare."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    x = torch.randn(64, 12, 16, generator=torch.Generator().manual_seed(rank))
    for views, recorded in ((False, True), (True, False)):
        plain, peaks = _train(x, views)
        budget = int(0.7 * max(peaks))
        planned, peaks = _train(x, views, budget, recorded)
        assert max(peaks) <= budget, (peaks, budget)
        assert all(map(torch.equal, plain.parameters(), planned.parameters()))
    torch.distributed.destroy_process_group()
