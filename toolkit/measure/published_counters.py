"""What is known to be off in published numbers of this field, counted again with our tools.

Published figures stand here as inputs, each with its source; everything else is computed.  The counter of
arXiv 2507.23536 stands here too; `edge.costs` applies it.
"""

from __future__ import annotations

import math

import pandas as pd

from toolkit.measure.scores import SAM_VERSIONS, sam

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
