"""Compares our selective scan with the torch form of transformers, on the same inputs, one thread.

    python tests/benchmarks/selective_scan.py

Vim-Small's scan at a batch of 8: 768 channels, 197 steps, 16 states; with D, gate, bias and softplus, and
gradients of all eight inputs.  Times are of the process, so other work on the machine counts little: the
best of some runs forward and backward, after one that is not counted.  Kept: storages that autograd saves,
inputs apart.  Peak: of what torch's allocator handed out in a run, inputs apart; unlike a dispatch mode its
profiler sees what operators take inside.  The other form takes half a minute a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from toolkit.backbones.selective_scan import selective_scan

BATCH, CHANNELS, LENGTH, STATES = 8, 768, 197, 16


def inputs() -> list[torch.Tensor]:
    """u, dt, A, B, C, D, z, delta_bias, in the ranges of a fresh Mamba layer."""
    generator = torch.Generator().manual_seed(0)
    over_time, of_states = (BATCH, CHANNELS, LENGTH), (BATCH, STATES, LENGTH)
    shapes = [
        over_time,
        over_time,
        (CHANNELS, STATES),
        of_states,
        of_states,
        (CHANNELS,),
        over_time,
        (CHANNELS,),
    ]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[2] = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    made[7] -= 4
    return [x.requires_grad_() for x in made]


def kept_bytes(scan: Callable, tensors: list[torch.Tensor]) -> int:
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = scan(*tensors, delta_softplus=True)
    del y
    return sum(storages.values()) - sum(storages.get(x.untyped_storage().data_ptr(), 0) for x in tensors)


def peak_bytes(run: Callable) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(scan: Callable, tensors: list[torch.Tensor], runs: int) -> tuple[dict, list[torch.Tensor]]:
    grad = torch.randn(BATCH, CHANNELS, LENGTH, generator=torch.Generator().manual_seed(1))
    times = []

    def run():
        start = time.process_time()
        y = scan(*tensors, delta_softplus=True)
        middle = time.process_time()
        grads = torch.autograd.grad(y, tensors, grad)
        times.append((middle - start, time.process_time() - middle))
        return [y.detach(), *grads]

    peak = peak_bytes(run)
    times.clear()
    results = [run() for _ in range(runs)][-1]
    forward, backward = (min(column) for column in zip(*times))
    return {
        "forward ms": forward * 1e3,
        "backward ms": backward * 1e3,
        "both ms": (forward + backward) * 1e3,
        "kept MiB": kept_bytes(scan, tensors) / 2**20,
        "peak MiB": peak / 2**20,
    }, results


def main() -> None:
    torch.set_num_threads(1)
    tensors = inputs()
    ours, results = measure(selective_scan, tensors, runs=5)
    theirs, expected = measure(mamba_selective_scan, tensors, runs=1)
    print(f"batch {BATCH}, {CHANNELS} channels, L {LENGTH}, {STATES} states, float32, one thread")
    print(f"{'':12} {'ours':>10} {'transformers':>14} {'ratio':>8}")
    for name in ours:
        print(f"{name:12} {ours[name]:>10.1f} {theirs[name]:>14.1f} {theirs[name] / ours[name]:>7.1f}x")
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, expected))
    print(f"largest difference of an output or gradient, relative to its largest element: {worst:.1e}")


if __name__ == "__main__":
    main()
