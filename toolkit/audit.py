"""What is known to be off in published numbers of this field, counted again with our tools.

Published figures stand here as inputs, each with its source; everything else is computed.
"""

from __future__ import annotations

import math

import pandas as pd
import peft
import timm
import torch
from torch import nn

from toolkit.budget.fake_step import on_fake_tensors
from toolkit.measure import FlopCounter
from toolkit.measure.memory import memory_of_adam_step
from toolkit.scores import SAM_VERSIONS, sam

IMAGE = (3, 224, 224)

# One epoch of adaptive checkpointing in the log that comes with the code of arXiv 2607.02158
# (step_energy.csv.gz, 7,253 rows): its 782 training steps, and the rows "train_fwd_re" that lie inside
# them.  (These rows are meant to be recomputation; they time the first forward pass of checkpointed
# blocks, since torch stops the second by an exception before it is logged.)
LOGGED_STEPS = {"seconds": 428.32, "joules": 66_960.28}
LOGGED_INSIDE = {"seconds": 94.97, "joules": 14_419.40}


def double_count() -> pd.DataFrame:
    """Time and energy of that epoch: as its meter adds them up, and with every moment counted once."""
    rows = {
        "training steps": LOGGED_STEPS,
        "train_fwd_re, inside the steps": LOGGED_INSIDE,
        "as its meter adds: both": {unit: LOGGED_STEPS[unit] + LOGGED_INSIDE[unit] for unit in LOGGED_STEPS},
        "counted once": LOGGED_STEPS,
    }
    frame = pd.DataFrame(rows).T
    frame["seconds too high %"] = 100 * (frame.seconds / LOGGED_STEPS["seconds"] - 1)
    frame["joules too high %"] = 100 * (frame.joules / LOGGED_STEPS["joules"] - 1)
    percent = ["seconds too high %", "joules too high %"]
    frame.loc[["training steps", "train_fwd_re, inside the steps"], percent] = None
    return frame


def _matmul(m: int, n: int, k: int) -> int:
    return 2 * m * n * k - m * k


def _published_mm(a, b, *, out_val) -> int:
    return _matmul(*a.shape, b.shape[1])


def _published_addmm(bias, a, b, *, out_val, **scales) -> int:
    return _matmul(*a.shape, b.shape[1]) + bias.shape[0] * a.shape[1]


def _published_convolution(x, weight, bias, *rest, out_val) -> int:
    per_pixel = weight.numel() + (out_val.shape[1] if bias is not None else 0)
    return 2 * x.shape[0] * math.prod(out_val.shape[2:]) * per_pixel


def _published_convolution_backward(grad, x, weight, *rest, out_val) -> int:
    """The weight gradient as if every output channel saw every input channel: `groups` times too much."""
    mask = rest[-1]
    input_gradient = 2 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel()
    weight_gradient = 2 * x.shape[1] * grad.numel() * math.prod(weight.shape[2:])
    return mask[0] * input_gradient + mask[1] * weight_gradient


def _corrected_convolution_backward(grad, x, weight, *rest, out_val) -> int:
    input_gradient = 2 * grad.shape[0] * math.prod(grad.shape[2:]) * weight.numel()
    return (rest[-1][0] + rest[-1][1]) * input_gradient


def _published_batch_norm(x, weight, bias, *rest, out_val) -> int:
    return x.numel() * (6 + weight.requires_grad + bias.requires_grad) + 2 * x.shape[1]


def _published_batch_norm_backward(grad, x, weight, *rest, out_val) -> int:
    return x.numel() * (4 + weight.requires_grad) + x.shape[1] * (1 + weight.requires_grad)


# The operators that the profiler of arXiv 2507.23536 knows, and what it counts for them.
PUBLISHED_COUNTER = {
    "aten.mm": _published_mm,
    "aten.addmm": _published_addmm,
    "aten.convolution": _published_convolution,
    "aten.convolution_backward": _published_convolution_backward,
    "aten.native_batch_norm": _published_batch_norm,
    "aten.native_batch_norm_backward": _published_batch_norm_backward,
    "aten.add": lambda a, b, *, out_val, **_: 2 * a.numel(),
    "aten.add_": lambda a, b, *, out_val, **_: 2 * a.numel(),
    "aten.mul": lambda a, b, *, out_val: out_val.numel(),
    "aten.mul_": lambda a, b, *, out_val: out_val.numel(),
}
CORRECTED_COUNTER = PUBLISHED_COUNTER | {"aten.convolution_backward": _corrected_convolution_backward}


def edge_network(name: str, method: str) -> nn.Module:
    """A timm CNN with random weights, for `full` fine-tuning or `lora`.

    `lora`: rank 1 on the head and on every convolution that is not grouped, the stem excepted.  (Which
    layers arXiv 2507.23536 adapts is not published; these come nearest to its figures.)
    """
    model = timm.create_model(name)
    if method == "lora":
        layers = dict(model.named_modules())
        targets = [n for n, m in layers.items() if isinstance(m, nn.Conv2d) and m.groups == 1][1:]
        head = next(n for n, m in layers.items() if m is model.get_classifier())
        model = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=[*targets, head]))
    return model.train()


def flop_over_count(names: list[str]) -> pd.DataFrame:
    """GFLOP of one SGD step at batch 1, 224 px, by three counters, and what LoRA seems to save.

    `published`: the profiler of arXiv 2507.23536; `corrected`: the same with a weight gradient that
    knows groups; `toolkit`: our counter (products and norms, no optimizer).
    """
    rows = []
    for name in names:
        counts = {method: _count_step(edge_network(name, method)) for method in ("full", "lora")}
        for counter, full in counts["full"].items():
            lora = counts["lora"][counter]
            saved = 100 * (1 - lora / full)
            rows.append(
                dict(model=name, counter=counter, full=full / 1e9, lora=lora / 1e9) | {"saved %": saved}
            )
    return pd.DataFrame(rows)


def _count_step(model: nn.Module) -> dict[str, int]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    images = torch.zeros(1, *IMAGE)
    with FlopCounter(PUBLISHED_COUNTER) as published, FlopCounter(CORRECTED_COUNTER) as corrected:
        with FlopCounter() as ours:
            model(images).sum().backward()
        optimizer.step()
    return {
        "published": published.flops.total,
        "corrected": corrected.flops.total,
        "toolkit": ours.flops.total,
    }


def category_maxima(names: list[str], batch_sizes: list[int]) -> pd.DataFrame:
    """Memory of an Adam step: the sum of the categories' maxima beside the peak that really occurs.

    MiB, 224 px, fp32, on fake tensors (same bytes, nothing computed).  `lora` as in `edge_network`;
    the two last columns say how much less it takes than `full`, by either figure.
    """
    rows = []
    for name in names:
        for batch_size in batch_sizes:
            figures = {m: _peaks(edge_network(name, m), batch_size) for m in ("full", "lora")}
            row = {"model": name, "batch": batch_size}
            for method, (maxima, peak) in figures.items():
                row |= {f"{method}: sum of maxima": maxima / 2**20, f"{method}: peak": peak / 2**20}
            for kind, position in (("sum of maxima", 0), ("peak", 1)):
                row[f"saved % by {kind}"] = 100 * (1 - figures["lora"][position] / figures["full"][position])
            rows.append(row)
    return pd.DataFrame(rows)


def _peaks(model: nn.Module, batch_size: int) -> tuple[int, int]:
    with on_fake_tensors(model, torch.empty(batch_size, *IMAGE)) as images:
        memory = memory_of_adam_step(model, images)
    return sum(memory.category_peaks.values()), memory.peak_bytes


def sam_winners(first: tuple[float, float], second: tuple[float, float], exponents: range) -> pd.DataFrame:
    """Which of two results each version of SAM prefers: 1 or 2.

    A result is (accuracy as a fraction, joules).
    """
    rows = {
        version: {
            f"SAM_{k}": 1 if sam(version, *first, k) > sam(version, *second, k) else 2 for k in exponents
        }
        for version in SAM_VERSIONS
    }
    return pd.DataFrame(rows).T
