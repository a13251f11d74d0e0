"""The selective scan in plain torch, on any device: forward and backward pass as functions of tensors.

Sequential in time, vectorised over all else.  Forward keeps the states at the starts of chunks of ⌈√L⌉ steps;
backward recomputes the others, a chunk at a time from the last to the first.  All buffers are allocated at
once and reused for every chunk and every few samples, so the memory of a pass follows from the shapes alone.

Axes: b samples at once, T steps of a chunk, N states, D channels.  Buffers are time-major, (L, b, D) and
(T, b, N, D): the channels innermost, where they are many and vector instructions are full.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from toolkit.budget.memory import rounded

# Bytes of one (T, b, N, D) buffer, from which b follows: on the CPU small, so that it stays in the caches;
# elsewhere large, so that few kernels are launched.
_CPU_BUFFER_BYTES = 2**20
_DEVICE_BUFFER_BYTES = 2**25


def chunk_length(length: int) -> int:
    """⌈√L⌉ steps: as many states are kept as are recomputed at a time."""
    return math.isqrt(length - 1) + 1


def compute_type(u: torch.Tensor) -> torch.dtype:
    """Type of the states and of all arithmetic: float32 or better."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def empty_states(u: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """The states at the starts of all chunks but the first, (chunks - 1, batch, states, channels)."""
    batch, channels, length = u.shape
    chunks = -(-length // chunk_length(length))
    return u.new_empty((chunks - 1, batch, A.shape[1], channels), dtype=compute_type(u))


def empty_gradients(u, dt, A, B, C, D, z, delta_bias, trained) -> tuple[torch.Tensor, ...]:
    """A tensor like each of the eight inputs, without elements if it is absent or not `trained`."""
    wanted = (True, True, trained[0], True, True, trained[1], True, trained[2])
    inputs = (u, dt, A, B, C, D, z, delta_bias)
    return tuple(
        torch.empty_like(x) if want and x is not None else u.new_empty(0) for x, want in zip(inputs, wanted)
    )


def _samples_at_once(u: torch.Tensor, A: torch.Tensor) -> int:
    limit = _CPU_BUFFER_BYTES if u.device.type == "cpu" else _DEVICE_BUFFER_BYTES
    per_sample = chunk_length(u.shape[2]) * A.numel() * compute_type(u).itemsize
    return max(1, min(u.shape[0], limit // max(per_sample, 1)))


def _without_autocast(function):
    @functools.wraps(function)
    def run(*args):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return run


@_without_autocast
def forward(u, dt, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """Compute y, like u, and the states at the chunk starts."""
    y, starts = torch.empty_like(u), empty_states(u, A)
    scan = _Scan(u, A, D, delta_bias, reverse, gated=z is not None, backward=False)
    for samples in scan.slices():
        inputs = scan.load(samples, u=u, dt=dt, B=B, C=C, z=z)
        scan.discretise(inputs, delta_softplus)
        out = scan.buffer("y", *inputs["u"].shape)
        for index in range(len(starts) + 1):
            chunk = scan.chunk(index, inputs, out, starts[index - 1, samples] if index else None)
            scan.output(chunk, chunk.dtu)
            if index < len(starts):
                starts[index, samples].copy_(chunk.last)
        if z is not None:
            out.mul_(F.silu(inputs["z"], inplace=True))
        _from_time_major(out, y[samples])
    return y, starts


@_without_autocast
def backward(grad, u, dt, A, B, C, D, z, delta_bias, starts, delta_softplus, reverse, trained):
    """Gradients of the eight tensors, without elements if absent or (A, D, delta_bias) not `trained`."""
    grads = empty_gradients(u, dt, A, B, C, D, z, delta_bias, trained)
    scan = _Scan(u, A, D, delta_bias, reverse, gated=z is not None, backward=True)
    du, ddt, dA, dB, dC, dD, dz, dbias = grads
    by_time = {"u": du, "dt": ddt, "B": dB, "C": dC, "z": dz}
    sums = {"dA": scan.buffer("dA", *scan.A.shape)}
    sums |= {name: scan.buffer(name, u.shape[1]) for name in ("dD", "dbias")}
    for total in sums.values():
        total.zero_()
    for samples in scan.slices():
        inputs = scan.load(samples, u=u, dt=dt, B=B, C=C, z=z, grad=grad)
        scan.discretise(inputs, delta_softplus)
        dtu = scan.buffer("y", *inputs["u"].shape)
        carry = scan.buffer("carry", dtu.shape[1], *scan.A.shape).zero_()
        for index in reversed(range(len(starts) + 1)):
            chunk = scan.chunk(index, inputs, dtu, starts[index - 1, samples] if index else None)
            _backward_chunk(scan, chunk, carry, sums, delta_softplus, trained)
        for name, result in by_time.items():
            if name in inputs:
                _from_time_major(inputs[name], result[samples])
    for total, result in ((sums["dA"].t(), dA), (sums["dD"], dD), (sums["dbias"], dbias)):
        if result.numel():
            result.copy_(total)
    return grads


def workspace_bytes(u: torch.Tensor, A: torch.Tensor, gated: bool, trained=None) -> int:
    """Bytes that `forward` allocates besides its outputs; with `trained`, `backward`."""
    sizes = _buffer_sizes(u, A, gated=gated, backward=trained is not None)
    return rounded(sum(sizes.values()) * compute_type(u).itemsize)


def _buffer_sizes(u: torch.Tensor, A: torch.Tensor, *, gated: bool, backward: bool) -> dict[str, int]:
    """Number of elements, of the compute type, of every buffer of a pass."""
    length, (channels, states) = u.shape[2], A.shape
    samples, steps = _samples_at_once(u, A), chunk_length(u.shape[2])
    over_time = ["u", "dt", "y"] + ["z"] * gated + ["grad"] * backward
    step = states * channels
    return (
        {"decay": steps * samples * step, "state": (steps + 1) * samples * step, "A": step, "D": channels}
        | dict.fromkeys(over_time, length * samples * channels)
        | dict.fromkeys(["B", "C"], length * samples * states)
        | dict.fromkeys(["d_state"] * backward, steps * samples * step)
        | dict.fromkeys((["scratch"] + ["silu"] * gated) * backward, steps * samples * channels)
        | dict.fromkeys(["carry"] * backward, samples * step)
        | dict.fromkeys(["dA", "sum"] * backward, step)
        | dict.fromkeys(["dD", "dbias"] * backward, channels)
    )


@dataclass(frozen=True)
class _Chunk:
    """One chunk, (T, b, ...), in buffers that the next one overwrites."""

    u: torch.Tensor
    dt: torch.Tensor  # Δ: with bias and softplus
    dtu: torch.Tensor  # Δ·u
    B: torch.Tensor
    C: torch.Tensor
    z: torch.Tensor | None
    grad: torch.Tensor | None
    decay: torch.Tensor  # exp(Δ·A), (T, b, N, D)
    state: torch.Tensor  # h_t
    before: torch.Tensor  # h_{t-1}
    last: torch.Tensor  # (b, N, D), the state that the chunk ends with
    decays: list[torch.Tensor]  # of each step, in the order of the scan


class _Scan:
    """Buffers of one pass, and the steps that forward and backward share."""

    def __init__(self, u, A, D, delta_bias, reverse, *, gated: bool, backward: bool):
        self.batch, self.length, self.reverse = u.shape[0], u.shape[2], reverse
        self.samples = _samples_at_once(u, A)
        sizes = _buffer_sizes(u, A, gated=gated, backward=backward)
        whole = u.new_empty(sum(sizes.values()), dtype=compute_type(u))
        self._flat = dict(zip(sizes, whole.split(list(sizes.values()))))
        self.A = self.buffer("A", *A.t().shape).copy_(A.t())
        self.D = None if D is None else self.buffer("D", *D.shape).copy_(D)
        self.bias = delta_bias

    def buffer(self, name: str, *shape: int) -> torch.Tensor:
        return self._flat[name][: math.prod(shape)].view(shape)

    def slices(self) -> Iterator[slice]:
        for first in range(0, self.batch, self.samples):
            yield slice(first, min(first + self.samples, self.batch))

    def load(self, samples: slice, **sources: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Copy some samples of each source (batch, x, L) to (L, b, x)."""
        loaded = {}
        for name, source in sources.items():
            if source is not None:
                part = source[samples]
                loaded[name] = self.buffer(name, part.shape[2], part.shape[0], part.shape[1])
                _to_time_major(part, loaded[name])
        return loaded

    def discretise(self, inputs: dict[str, torch.Tensor], delta_softplus: bool) -> None:
        """Turn dt into Δ, in place."""
        if self.bias is not None:
            inputs["dt"].add_(self.bias)
        if delta_softplus:
            F.softplus(inputs["dt"], out=inputs["dt"])

    def chunk(self, index: int, inputs: dict, dtu: torch.Tensor, start: torch.Tensor | None) -> _Chunk:
        """Compute Δ·u and the states of the `index`-th chunk of the scan from its start (None: zero)."""
        steps = chunk_length(self.length)
        first, end = index * steps, min((index + 1) * steps, self.length)
        if self.reverse:
            first, end = self.length - end, self.length - first
        part = {name: x[first:end] for name, x in inputs.items()}
        dtu = torch.mul(part["dt"], part["u"], out=dtu[first:end])
        shape = (*dtu.shape[:2], *self.A.shape)
        decay = torch.mul(part["dt"].unsqueeze(2), self.A, out=self.buffer("decay", *shape)).exp_()
        states = self.buffer("state", shape[0] + 1, *shape[1:])
        state, before = (states[:-1], states[1:]) if self.reverse else (states[1:], states[:-1])
        torch.mul(dtu.unsqueeze(2), part["B"].unsqueeze(3), out=state)
        h, decays = self.in_order(states), self.in_order(decay)
        h[0].zero_() if start is None else h[0].copy_(start)
        for t, a in enumerate(decays):
            h[t + 1].addcmul_(a, h[t])
        rest = {name: part.get(name) for name in ("u", "dt", "B", "C", "z", "grad")}
        return _Chunk(**rest, dtu=dtu, decay=decay, state=state, before=before, last=h[-1], decays=decays)

    def in_order(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The steps of `x` (T, ...) in the order of the scan."""
        return list(x.unbind())[:: -1 if self.reverse else 1]

    def output(self, chunk: _Chunk, out: torch.Tensor) -> torch.Tensor:
        """Compute C·h + D·u, (T, b, D)."""
        _products(chunk.C.unsqueeze(2), chunk.state, out.unsqueeze(2))
        return out if self.D is None else out.addcmul_(chunk.u, self.D)


def _backward_chunk(scan: _Scan, chunk: _Chunk, carry, sums, delta_softplus: bool, trained) -> None:
    """Replace u, dt, B, C and z of the chunk by their gradients and add to the sums.

    `carry` (b, N, D): the gradient of the chunk's last state from later chunks; on return, of its start.
    """
    g, u, dt = chunk.grad, chunk.u, chunk.dt
    scratch = scan.buffer("scratch", *u.shape)
    if chunk.z is not None:
        silu = torch.ops.aten.silu.out(chunk.z, out=scan.buffer("silu", *u.shape))
        d_silu = scan.output(chunk, scratch).mul_(g)
        torch.ops.aten.silu_backward.grad_input(d_silu, chunk.z, grad_input=chunk.z)
        g.mul_(silu)

    # Gradients of the states, from the last to the first.
    d_state = torch.mul(g.unsqueeze(2), chunk.C.unsqueeze(3), out=scan.buffer("d_state", *chunk.decay.shape))
    d_h = scan.in_order(d_state)
    d_h[-1].add_(carry)
    for t in reversed(range(len(d_h) - 1)):
        d_h[t].addcmul_(chunk.decays[t + 1], d_h[t + 1])
    torch.mul(chunk.decays[0], d_h[0], out=carry)

    # Each gradient overwrites a value that is no longer needed.
    d_dtu, dtu, d_dt = scratch, chunk.dtu, chunk.dtu
    _products(chunk.state, g.unsqueeze(3), chunk.C.unsqueeze(3))
    _products(chunk.B.unsqueeze(2), d_state, d_dtu.unsqueeze(2))
    _products(d_state, dtu.unsqueeze(3), chunk.B.unsqueeze(3))
    inner = chunk.decay.mul_(chunk.before).mul_(d_state)  # gradient of Δ·A
    torch.sum(torch.mul(inner, scan.A, out=d_state), 2, out=d_dt).addcmul_(d_dtu, u)
    of_chunk = scan.buffer("sum", *scan.A.shape)
    if trained[0]:
        sums["dA"].add_(torch.sum(inner.mul_(dt.unsqueeze(2)), (0, 1), out=of_chunk))
    if trained[1]:
        sums["dD"].add_(torch.sum(u.mul_(g), (0, 1), out=of_chunk[0]))
    torch.mul(d_dtu, dt, out=u)
    if scan.D is not None:
        u.addcmul_(g, scan.D)
    if delta_softplus:
        d_dt.mul_(dt.neg_().expm1_().neg_())  # softplus' = 1 - exp(-softplus)
    if trained[2]:
        sums["dbias"].add_(torch.sum(d_dt, (0, 1), out=of_chunk[0]))
    dt.copy_(d_dt)


def _products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Matrix product for every step and sample."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))


def _to_time_major(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copy (b, x, L) to (L, b, x), in the type of `out`."""
    # torch has a fast transposition for two axes, four times the speed of the general one.
    if source.shape[0] == 1:
        out[:, 0].copy_(source[0].t())
    else:
        out.copy_(source.permute(2, 0, 1))


def _from_time_major(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copy (L, b, x) to (b, x, L), in the type of `out`."""
    if out.shape[0] == 1:
        out[0].copy_(source[:, 0].t())
    else:
        out.copy_(source.permute(1, 2, 0))
