"""Mamba's selective scan as two operators that keep almost nothing for the backward pass.

    h_t = exp(Δ_t·A)·h_{t-1} + (Δ_t·u_t)·B_t,   y_t = C_t·h_t + D·u_t      (arXiv 2312.00752, eq. 2 and 4)

With stock operators autograd keeps several tensors of (batch, channels, L, states).  Here only the states at
the starts of chunks of ⌈√L⌉ steps are kept, and the backward pass recomputes the others, a chunk at a time.
`toolkit::selective_scan` and `toolkit::selective_scan_backward` are operators of torch's library, so that
counters, planner and tape see one call each; their FLOPs and their workspace, which cannot be seen from
outside, are registered with `budget`.

Two forms compute them, with the same results and kept states: `scan_torch`, on any device, and
`scan_triton`, on CUDA.  `mamba_ssm` is not used: it keeps other states, cannot run from the end to the start,
and calls its kernels past torch's dispatcher, where nothing here could count or plan them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch.utils._python_dispatch import _disable_current_modes

from toolkit.backbones import scan_torch
from toolkit.budget.flops import register_flops
from toolkit.budget.memory import register_workspace
from toolkit.errors import InputError


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    reverse: bool = False,
) -> torch.Tensor:
    """Compute y (batch, channels, L), the scan of `u`, in `u`'s type; once differentiable.

    u, dt, z (batch, channels, L); A (channels, states), negative; B, C (batch, states, L); D, delta_bias
    (channels,).  Δ = softplus(dt + delta_bias), or dt + delta_bias without `delta_softplus`.  With D the
    output has D·u added, with z it is then multiplied by silu(z).  `reverse` runs from the last step to the
    first, as if all tensors over time, y included, were flipped.

    Computed in float32 regardless of types and autocast (float64 if `u` is).  Raises `InputError` for shapes
    that do not fit.
    """
    _check_shapes(u, dt, A, B, C, D, z, delta_bias)
    return _forward_operator(u, dt, A, B, C, D, z, delta_bias, delta_softplus, reverse)[0]


def _check_shapes(u, dt, A, B, C, D, z, delta_bias) -> None:
    if u.dim() != 3 or u.shape[2] == 0:
        raise InputError(f"u must be (batch, channels, L) with L of 1 or more; it is {tuple(u.shape)}.")
    batch, channels, length = u.shape
    if A.dim() != 2 or A.shape[0] != channels:
        raise InputError(f"A must be (channels, states) with {channels} channels; it is {tuple(A.shape)}.")
    sizes = {"batch": batch, "channels": channels, "L": length, "states": A.shape[1]}
    for name, tensor, axes in (
        ("dt", dt, "batch, channels, L"),
        ("B", B, "batch, states, L"),
        ("C", C, "batch, states, L"),
        ("D", D, "channels,"),
        ("z", z, "batch, channels, L"),
        ("delta_bias", delta_bias, "channels,"),
    ):
        shape = tuple(sizes[axis] for axis in axes.rstrip(",").split(", "))
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name} must be ({axes}) = {shape}; it is {tuple(tensor.shape)}.")


# The two operators.


_INPUTS = "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_OPTIONS = "bool delta_softplus, bool reverse"


@torch.library.custom_op(
    "toolkit::selective_scan", mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _forward_operator(u, *rest):
    """Compute y and the states at the chunk starts."""
    return _form(u.device).forward(u, *rest)


@_forward_operator.register_fake
def _(u, dt, A, *rest):
    return torch.empty_like(u), scan_torch.empty_states(u, A)


@torch.library.custom_op(
    "toolkit::selective_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor states, {_OPTIONS}, bool[] trained) -> Tensor[]",
)
def _backward_operator(grad, *rest):
    """Gradients of the eight tensors; empty for absent ones, and for A, D and delta_bias if not `trained`."""
    return list(_form(grad.device).backward(grad, *rest))


@_backward_operator.register_fake
def _(grad, *rest):
    *inputs, _states, _softplus, _reverse, trained = rest
    return list(scan_torch.empty_gradients(*inputs, trained))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # no zeros for the gradient of the states, which nobody uses


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    trained = [ctx.needs_input_grad[i] for i in (2, 5, 7)]
    grads = _backward_operator(grad, *ctx.saved_tensors, ctx.delta_softplus, ctx.reverse, trained)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad)), None, None


_forward_operator.register_autograd(_differentiate, setup_context=_keep)


def forward_workspace_bytes(u, dt, A, B, C, D, z, *rest) -> int:
    """Bytes that `toolkit::selective_scan` allocates besides its outputs; tensors may be fake."""
    return _form(u.device).workspace_bytes(u, A, z is not None)


def backward_workspace_bytes(grad, u, dt, A, B, C, D, z, *rest) -> int:
    """As `forward_workspace_bytes`, of `toolkit::selective_scan_backward`."""
    return _form(u.device).workspace_bytes(u, A, z is not None, trained=rest[-1])


register_workspace(torch.ops.toolkit.selective_scan.default, forward_workspace_bytes)
register_workspace(torch.ops.toolkit.selective_scan_backward.default, backward_workspace_bytes)


def selective_scan_flops(batch: int, channels: int, length: int, states: int) -> tuple[int, int]:
    """Forward and backward pass of h ← exp(Δ·A)·h + (Δ·u)·B, y = C·h + D·u (arXiv 2312.00752, eq. 2).

    Per channel, time step and state: Δ·A, (Δ·u)·B, the multiply-add of h and that of y; per channel and time
    step Δ·u and the multiply-add of D·u.  Backward: the gradients of C, h (two), B and Δ·u, a multiply-add
    each (10), of exp(Δ·A) (1), and through it of Δ and A (4).  exp and recomputed states are not counted.
    """
    steps = batch * channels * length
    return steps * (6 * states + 3), steps * (15 * states + 7)


def _scan(u, dt, a, *rest, out_val, **options) -> int:
    return selective_scan_flops(*u.shape, a.shape[1])[0]


def _scan_backward(grad, u, dt, a, *rest, out_val, **options) -> int:
    return selective_scan_flops(*u.shape, a.shape[1])[1]


# u (B, channels, L), dt like u, A (channels, states)
register_flops({"toolkit.selective_scan": _scan, "toolkit.selective_scan_backward": _scan_backward})


# Which form runs.

_NAMES = {"triton": "Triton kernels", "torch": "plain torch, sequential in time"}
_PROBED = (
    "output",
    "states",
    *(f"gradient of {x}" for x in ("u", "dt", "A", "B", "C", "D", "z", "delta_bias")),
)


@functools.cache
def backend(device: torch.device) -> str:
    """The form that computes scans on `device`, "torch" or "triton"; printed once per device.

    Triton runs on CUDA devices where a small scan and its gradients come out right; plain torch elsewhere.
    """
    fault = None
    if device.type == "cuda":
        with _disable_current_modes():  # the probe runs for real, uncounted
            fault = _triton_fault(device)
    name = "triton" if device.type == "cuda" and fault is None else "torch"
    reason = f"; Triton, which is faster, does not work here: {fault}" if fault else ""
    print(f"selective scan on {device}: {_NAMES[name]}{reason}")
    return name


def _form(device: torch.device) -> ModuleType:
    return importlib.import_module(f"toolkit.backbones.scan_{backend(device)}")


def _triton_fault(device: torch.device) -> str | None:
    """Why Triton cannot do scans on `device`: a forward and a backward pass against the plain form."""
    try:
        form = importlib.import_module("toolkit.backbones.scan_triton")
        results = [_probe(form, device), _probe(scan_torch, device)]
    except Exception as error:  # imports, compilers and drivers raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    wrong = [
        name
        for name, got, expected in zip(_PROBED, *results)
        if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4)
    ]
    return f"wrong {', '.join(wrong)}" if wrong else None


def _probe(form: ModuleType, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 7)] * 2 + [(5, 3)] + [(2, 3, 7)] * 2 + [(5,), (2, 5, 7), (5,)]
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    y, states = form.forward(*inputs, True, False)
    return [y, states, *form.backward(y, *inputs, states, True, False, [True, True, True])]
