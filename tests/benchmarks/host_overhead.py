"""What following a plan costs the host: CPU seconds of one thread, on tensors so small that the host counts.

Run `python tests/benchmarks/host_overhead.py [model ...]`.  For each model and budget the plain step, timm's
own checkpointing of every block and the planned step run in turn; the table shows medians of the ratios to
the plain step of the same round, and the range.  Budgets are percentages of the way from the smallest peak
that has a plan to the plain step's.  "beyond" is the ratio without the recomputed operators: their share of
the forward pass's FLOPs, times the share of the forward pass in the plain step's time.
"""

from __future__ import annotations

import statistics
import sys
import time

import timm
import torch
import torch.nn.functional as F

from toolkit import adapt, auto_checkpoint
from toolkit.budget import Planner

ROUNDS = 11
STEPS = 2  # per round and variant
BUDGETS_PCT = (90, 70, 50, 30, 10)
MODELS = {
    "vit_small lora": ("vit_small_patch16_224", "lora", 2, {"img_size": 64}),
    "vit_small full": ("vit_small_patch16_224", "full", 2, {"img_size": 64}),
    "mobilenetv3_small full": ("mobilenetv3_small_100", "full", 4, {}),
    "swin_tiny full": ("swin_tiny_patch4_window7_224", "full", 1, {"img_size": 112}),
    "tiny_vit full": ("tiny_vit_5m_224", "full", 2, {}),
}
CHECKPOINTED = "static"


def build(name: str):
    """The model, its batch, and a function that builds the model again with the same weights."""
    backbone, method, batch_size, options = MODELS[name]
    torch.manual_seed(0)
    model = adapt(timm.create_model(backbone, num_classes=10, **options), method).train()
    pixels = options.get("img_size", 64)
    images = torch.randn(batch_size, 3, pixels, pixels)
    return model, (images, torch.randint(0, 10, (batch_size,)))


def step(model: torch.nn.Module, batch) -> tuple[float, float]:
    """CPU seconds of a forward pass, and of the whole step without an optimizer."""
    start = time.process_time()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    middle = time.process_time()
    loss.backward()
    end = time.process_time()
    model.zero_grad(set_to_none=True)
    return middle - start, end - start


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in sys.argv[1:] or MODELS:
        plain, batch = build(name)
        static, _ = build(name)
        static.set_grad_checkpointing(True)
        planner = Planner(plain, batch, optimizer="sgd")
        smallest, most = planner.smallest_bytes(), planner.plan(1 << 62).peak_bytes
        variants = {"plain": plain, CHECKPOINTED: static}
        handles = {}
        for percent in BUDGETS_PCT:
            model, _ = build(name)
            budget = int(smallest + (most - smallest) * percent / 100) + 1
            handles[percent] = auto_checkpoint(model, budget, batch, optimizer="sgd")
            variants[f"{percent} %"] = model
        rounds, forwards = [], []
        for number in range(ROUNDS + 2):
            seconds = {}
            for key, model in variants.items():
                times = [step(model, batch) for _ in range(STEPS)]
                seconds[key] = sum(whole for _, whole in times)
                if key == "plain":
                    forwards.append(sum(forward for forward, _ in times) / seconds[key])
            if number >= 2:
                rounds.append({key: value / seconds["plain"] for key, value in seconds.items()})
        share = statistics.median(forwards)
        print(f"{name}: plain step {1e3 * step(plain, batch)[1]:.0f} ms, {100 * share:.0f} % of it forward")
        for key in list(variants)[1:]:
            ratios = sorted(each[key] for each in rounds)
            middle = statistics.median(ratios)
            plan = None if key == CHECKPOINTED else handles[int(key[:-2])].plan
            again = 100 if plan is None else plan.recompute_pct
            print(
                f"  {key:>7}  {middle:.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f}), recomputed {again:.0f} %, "
                f"beyond {middle - again / 100 * share:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
