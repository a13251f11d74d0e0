"""The selective scan as two Triton kernels, with the arguments, results and kept states of `scan_torch`.

One program computes BD channels of a sample, chunk after chunk; within a chunk the recurrence is an
associative scan of pairs (decay, addition).  Backward goes from the last chunk to the first and starts each
from its kept state.  Values of neighbouring steps are loaded again rather than moved between threads, and
h_{t-1} is scanned itself: h_t - x_t would cancel where the decay is strong.

Gradients of B and C are sums over channels: every program adds those of its own channels, one group after
the other, to its own part, and the parts are summed at the end.  No atomics are used, so equal runs give
equal bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from toolkit.backbones.scan_torch import chunk_length, compute_type, empty_gradients, empty_states
from toolkit.budget.memory import rounded

_TILE = 1024  # elements of a (T, D, N) tile; a thread of four warps holds 8 of each such tensor


def forward(u, dt, A, B, C, D, z, delta_bias, delta_softplus, reverse):
    """Compute y, like u, and the states at the chunk starts."""
    y, starts = torch.empty_like(u), empty_states(u, A)
    tile = _tile(u, A)
    grid = (u.shape[0], triton.cdiv(u.shape[1], tile["BD"]))
    with torch.cuda.device_of(u):
        _forward_kernel[grid](
            *map(_strided, (u, dt, A, B, C, D, z, delta_bias, y)),
            starts,
            *_sizes(u, A),
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            **tile,
        )
    return y, starts


def backward(grad, u, dt, A, B, C, D, z, delta_bias, starts, delta_softplus, reverse, trained):
    """Gradients of the eight tensors, without elements if absent or (A, D, delta_bias) not `trained`."""
    du, ddt, dA, dB, dC, dD, dz, dbias = empty_gradients(u, dt, A, B, C, D, z, delta_bias, trained)
    parts = {
        name: u.new_zeros(shape, dtype=compute_type(u)) for name, shape in _part_shapes(u, A, trained).items()
    }
    tile = _tile(u, A)
    with torch.cuda.device_of(u):
        _backward_kernel[u.shape[0], _programs(u, A)](
            *map(_strided, (grad, u, dt, A, B, C, D, z, delta_bias, du, ddt, None if z is None else dz)),
            starts,
            *map(parts.get, ("dB", "dC", "dA", "dD", "dbias")),
            *_sizes(u, A),
            SOFTPLUS=delta_softplus,
            REVERSE=reverse,
            **tile,
        )
    for name, result in (("dB", dB), ("dC", dC)):
        result.copy_(parts[name].sum(1))
    for name, result in (("dA", dA), ("dD", dD), ("dbias", dbias)):
        if name in parts:
            result.copy_(parts[name].sum(0))
    return du, ddt, dA, dB, dC, dD, dz, dbias


def workspace_bytes(u: torch.Tensor, A: torch.Tensor, gated: bool, trained=None) -> int:
    """Bytes that `forward` allocates besides its outputs: none; with `trained`, `backward`: the parts and the
    sum of one.
    """
    if trained is None:
        return 0
    shapes = _part_shapes(u, A, trained)
    sums = [(u.shape[0], A.shape[1], u.shape[2])] + [A.shape] * ("dA" in shapes)
    counts = [math.prod(shape) for shape in shapes.values()] + [max(map(math.prod, sums))]
    item = compute_type(u).itemsize
    return sum(rounded(count * item) for count in counts)


def _strided(x: torch.Tensor | None):
    """A tensor with its strides, as kernels expect it."""
    return None if x is None else (x, *x.stride())


def _sizes(u: torch.Tensor, A: torch.Tensor) -> tuple[int, ...]:
    batch, channels, length = u.shape
    return batch, channels, A.shape[1], length, chunk_length(length)


def _tile(u: torch.Tensor, A: torch.Tensor) -> dict:
    steps = max(triton.next_power_of_2(chunk_length(u.shape[2])), 2)
    states = triton.next_power_of_2(A.shape[1])
    channels = min(max(_TILE // (steps * states), 1), triton.next_power_of_2(u.shape[1]))
    dtype = tl.float64 if compute_type(u) == torch.float64 else tl.float32
    return {"TYPE": dtype, "BT": steps, "BD": channels, "BN": states}


def _programs(u: torch.Tensor, A: torch.Tensor) -> int:
    """Programs per sample in backward: as many as keep the parts of dB together no larger than u."""
    groups = triton.cdiv(u.shape[1], _tile(u, A)["BD"])
    return min(groups, max(u.shape[1] // A.shape[1], 1))


def _part_shapes(u, A, trained) -> dict[str, tuple[int, ...]]:
    (batch, channels, length), states = u.shape, A.shape[1]
    shapes = dict.fromkeys(("dB", "dC"), (batch, _programs(u, A), states, length))
    wanted = zip(("dA", "dD", "dbias"), ((channels, states), (channels,), (channels,)), trained)
    return shapes | {name: (batch, *shape) for name, shape, want in wanted if want}


# Kernels.  x = (pointer, strides) of a tensor (batch, x, L); tiles are (T, D), (T, N) or (T, D, N).


@triton.jit
def _combine(decay, x, next_decay, next_x):
    return decay * next_decay, next_decay * x + next_x


@triton.jit
def _pointers(x, sample, lanes, times):
    return x[0] + sample * x[1] + lanes[None, :] * x[2] + times[:, None] * x[3]


@triton.jit
def _load(x, sample, lanes, times, mask, TYPE: tl.constexpr):
    return tl.load(_pointers(x, sample, lanes, times), mask, 0.0).to(TYPE)


@triton.jit
def _delta(dt, bias, sample, d, times, mask, SOFTPLUS: tl.constexpr, TYPE: tl.constexpr):
    """Δ, zero outside the mask, which keeps the state, and its derivative by dt."""
    delta = _load(dt, sample, d, times, mask, TYPE) + bias[None, :]
    slope = tl.full(delta.shape, 1.0, TYPE)
    if SOFTPLUS:
        slope = 1 / (1 + tl.exp(-delta))
        e = tl.exp(tl.minimum(delta, 20.0))
        one = 1 + e
        # log(1 + e) without loss where e is small: the rounding of 1 + e cancels.
        log = tl.where(one == 1, e, tl.log(one) * (e / tl.where(one == 1, 1.0, one - 1)))
        delta = tl.where(delta > 20, delta, log)
    return tl.where(mask, delta, 0.0), slope


@triton.jit
def _per_channel(x, d, inside, TYPE: tl.constexpr):
    """Values of a (channels,) tensor, zero if it is absent."""
    values = tl.zeros(d.shape, TYPE)
    if x is not None:
        values = tl.load(x[0] + d * x[1], inside, 0.0).to(TYPE)
    return values


@triton.jit
def _times(steps, length, REVERSE: tl.constexpr):
    """The times of steps of the scan."""
    times = steps
    if REVERSE:
        times = length - 1 - steps
    return times


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, z, bias, y, starts,
    batch, channels, states, length, chunk,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TYPE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n, row = tl.arange(0, BN), tl.arange(0, BT)
    in_d, in_n = d < channels, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    a = tl.load(A[0] + d[:, None] * A[1] + n[None, :] * A[2], in_dn, 0.0).to(TYPE)
    skip, shift = _per_channel(D, d, in_d, TYPE), _per_channel(bias, d, in_d, TYPE)
    state_at = starts + (sample * states + n[None, :]) * channels + d[:, None]
    h = tl.zeros((BD, BN), TYPE)
    for first in range(0, length, chunk):
        if first > 0:
            tl.store(state_at, h, in_dn)
            state_at += batch * states * channels
        steps = first + row
        valid = (row < chunk) & (steps < length)
        t = _times(steps, length, REVERSE)
        in_td, in_tn = valid[:, None] & in_d[None, :], valid[:, None] & in_n[None, :]
        delta, _ = _delta(dt, shift, sample, d, t, in_td, SOFTPLUS, TYPE)
        x = _load(u, sample, d, t, in_td, TYPE)
        added = (delta * x)[:, :, None] * _load(B, sample, n, t, in_tn, TYPE)[:, None, :]
        decay = tl.exp(delta[:, :, None] * a[None, :, :])
        decay, added = tl.associative_scan((decay, added), 0, _combine)
        hs = decay * h[None, :, :] + added
        out = tl.sum(hs * _load(C, sample, n, t, in_tn, TYPE)[:, None, :], 2) + skip[None, :] * x
        if z is not None:
            gate = _load(z, sample, d, t, in_td, TYPE)
            out *= gate / (1 + tl.exp(-gate))
        tl.store(_pointers(y, sample, d, t), out, in_td)
        # Steps outside the chunk leave the state as it is.
        h = tl.sum(tl.where((row == BT - 1)[:, None, None], hs, 0.0), 0)


@triton.jit
def _backward_kernel(
    grad, u, dt, A, B, C, D, z, bias, du, ddt, dz, starts, dB, dC, dA, dD, dbias,
    batch, channels, states, length, chunk,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, TYPE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    program, programs = tl.program_id(1), tl.num_programs(1)
    n, row = tl.arange(0, BN), tl.arange(0, BT)
    in_n = n < states
    part = ((sample * programs + program) * states + n[None, :]) * length
    for group in range(program, tl.cdiv(channels, BD), programs):
        tl.debug_barrier()  # the group before has added to dB and dC
        d = group * BD + tl.arange(0, BD)
        in_d = d < channels
        in_dn = in_d[:, None] & in_n[None, :]
        a = tl.load(A[0] + d[:, None] * A[1] + n[None, :] * A[2], in_dn, 0.0).to(TYPE)
        skip, shift = _per_channel(D, d, in_d, TYPE), _per_channel(bias, d, in_d, TYPE)
        carry = tl.zeros((BD, BN), TYPE)
        sum_a = tl.zeros((BD, BN), TYPE)
        sum_d, sum_bias = tl.zeros((BD,), TYPE), tl.zeros((BD,), TYPE)
        chunks = tl.cdiv(length, chunk)
        for index in range(chunks - 1, -1, -1):
            steps = index * chunk + row
            valid = (row < chunk) & (steps < length)
            t = _times(steps, length, REVERSE)
            in_td, in_tn = valid[:, None] & in_d[None, :], valid[:, None] & in_n[None, :]

            # h_{t-1}: the scan of the steps before.
            at = starts + (((index - 1) * batch + sample) * states + n[None, :]) * channels + d[:, None]
            h = tl.load(at, in_dn & (index > 0), 0.0)
            before = valid & (row > 0)
            t_before = _times(steps - 1, length, REVERSE)
            mask = before[:, None] & in_d[None, :]
            delta, _ = _delta(dt, shift, sample, d, t_before, mask, SOFTPLUS, TYPE)
            added = (delta * _load(u, sample, d, t_before, mask, TYPE))[:, :, None]
            added *= _load(B, sample, n, t_before, before[:, None] & in_n[None, :], TYPE)[:, None, :]
            decay = tl.exp(delta[:, :, None] * a[None, :, :])
            decay, added = tl.associative_scan((decay, added), 0, _combine)
            h_before = decay * h[None, :, :] + added

            # h_t and the output.
            delta, slope = _delta(dt, shift, sample, d, t, in_td, SOFTPLUS, TYPE)
            x, g = _load(u, sample, d, t, in_td, TYPE), _load(grad, sample, d, t, in_td, TYPE)
            b, c = _load(B, sample, n, t, in_tn, TYPE), _load(C, sample, n, t, in_tn, TYPE)
            kept = tl.exp(delta[:, :, None] * a[None, :, :]) * h_before
            hs = kept + (delta * x)[:, :, None] * b[:, None, :]
            if z is not None:
                gate = _load(z, sample, d, t, in_td, TYPE)
                sigmoid = 1 / (1 + tl.exp(-gate))
                out = tl.sum(hs * c[:, None, :], 2) + skip[None, :] * x
                d_gate = g * out * sigmoid * (1 + gate * (1 - sigmoid))
                tl.store(_pointers(dz, sample, d, t), d_gate, in_td)
                g *= gate * sigmoid

            # Gradients of the states: from the next step through its decay, from this one through C.
            after = valid & (steps + 1 < length)
            t_after = _times(steps + 1, length, REVERSE)
            mask = after[:, None] & in_d[None, :]
            delta_after, _ = _delta(dt, shift, sample, d, t_after, mask, SOFTPLUS, TYPE)
            decay = tl.exp(delta_after[:, :, None] * a[None, :, :])
            from_c = g[:, :, None] * c[:, None, :]
            decay, from_c = tl.associative_scan((decay, from_c), 0, _combine, reverse=True)
            d_h = decay * carry[None, :, :] + from_c
            carry = tl.sum(tl.where((row == 0)[:, None, None], d_h, 0.0), 0)

            d_b = tl.sum(d_h * (delta * x)[:, :, None], 1)
            d_c = tl.sum(hs * g[:, :, None], 1)
            at = part + t[:, None]
            tl.store(dB + at, tl.load(dB + at, in_tn, 0.0) + d_b, in_tn)
            tl.store(dC + at, tl.load(dC + at, in_tn, 0.0) + d_c, in_tn)
            d_dtu = tl.sum(d_h * b[:, None, :], 2)
            inner = d_h * kept  # gradient of Δ·A
            d_dt = (tl.sum(inner * a[None, :, :], 2) + d_dtu * x) * slope
            tl.store(_pointers(du, sample, d, t), d_dtu * delta + skip[None, :] * g, in_td)
            tl.store(_pointers(ddt, sample, d, t), d_dt, in_td)
            sum_a += tl.sum(inner * delta[:, :, None], 0)
            sum_d += tl.sum(g * x, 0)
            sum_bias += tl.sum(tl.where(in_td, d_dt, 0.0), 0)
        if dA is not None:
            tl.store(dA + (sample * channels + d[:, None]) * states + n[None, :], sum_a, in_dn)
        if dD is not None:
            tl.store(dD + sample * channels + d, sum_d, in_d)
        if dbias is not None:
            tl.store(dbias + sample * channels + d, sum_bias, in_d)
