"""Measures what a budget costs a loop whose batches have another length in every step.

A text encoder of 4 layers trains on batches padded to 20 to 128 tokens.  Plain and planned steps on the same
batch take turns; CPU seconds of one thread.  Expected: a total of at most 1.5 times the plain loop's beyond
recomputation.  The longest step takes 1.1 to 1.7 plain steps of the longest batch if that one is given in
advance, and 3 to 3.7 otherwise: the two or three steps that make a new plan run the step on fake tensors,
which takes 0.6 seconds of this model.

    python tests/benchmarks/dynamic_shapes.py [--steps 60] [--share 0.6]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import nn

import toolkit
from toolkit.budget import Planner


def _encoder(width: int = 128) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, batch_first=True, norm_first=True, activation="gelu"
    )
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(1000, width), encoder, nn.Linear(width, 1000))


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _seconds(model, optimizer, ids: torch.Tensor, seed: int) -> float:
    """CPU seconds of one training step."""
    torch.manual_seed(seed)
    start = time.process_time()
    _loss(model(ids), ids).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def measure(steps: int, share: float, given: bool, batch_size: int = 16) -> dict[str, float]:
    """Run the loop; `given`: the longest batch is given in advance; else the first one is.

    `share`: of the way from the smallest to the stock peak of the longest batch, where the budget is.
    """
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 129, (steps,), generator=draw).tolist()
    batches = [torch.randint(0, 1000, (batch_size, length), generator=draw) for length in lengths]
    longest = torch.zeros(batch_size, 128, dtype=torch.long)
    plain = _encoder()
    planned = copy.deepcopy(plain)
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in (plain, planned)]
    planner = Planner(planned, (longest, longest), loss=_loss)
    least, most = planner.smallest_bytes(), planner.plan(1 << 40).unplanned_peak_bytes
    first = longest if given else batches[0]
    for seed in range(2):  # torch's own first steps
        _seconds(plain, optimizers[0], longest, seed)
    slowest = min(_seconds(plain, optimizers[0], longest, seed) for seed in range(3))
    other_bytes = 3 * sum(p.nbytes for p in plain.parameters())  # the plain model is seen, with its state
    budget = int(least + share * (most - least)) + other_bytes
    ours, stock, shares = [], [], []
    with toolkit.auto_checkpoint(
        planned, budget, (first, first), loss=_loss, optimizer=optimizers[1]
    ) as handle:
        for seed, ids in enumerate(batches):
            stock.append(_seconds(plain, optimizers[0], ids, seed))
            ours.append(_seconds(planned, optimizers[1], ids, seed))
            shares.append(handle.plan.recompute_flops / (3 * handle.plan.forward_flops))
    recomputed = sum(share * seconds for share, seconds in zip(shares, stock)) / sum(stock)
    return {
        "ratio": sum(ours) / sum(stock),
        "recomputed": recomputed,
        "beyond": sum(ours) / sum(stock) - recomputed,
        "longest": max(ours) / slowest,
        "median": statistics.median(a / b for a, b in zip(ours, stock)),
        "replans": handle.replans,
        "departures": handle.departures,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--share", type=float, default=0.6)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for given in (True, False):
        figures = measure(arguments.steps, arguments.share, given)
        print("longest batch given " if given else "first batch given   ", end="")
        print(", ".join(f"{name} {figure:.2f}" for name, figure in figures.items()))


if __name__ == "__main__":
    main()
