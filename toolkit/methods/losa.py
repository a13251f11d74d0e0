"""LoSA: low-rank mixers refine the features of a frozen backbone (Mercea, Gritsenko, Schmid, Arnab 2024,
"Time-, Memory- and Parameter-Efficient Visual Adaptation", arXiv 2402.02887).

    y_0 = the features that the head reads,   y_i = y_(i-1) + g_i(b_i + y_(i-1)),   b_i: what block i returned
    g(X) = C + T,   C = gelu(LN(X) W1) W2,   T = (gelu(LN(X + C)^T V1) V2)^T

C mixes channels and T tokens.  W2 and V2 start at zero: training starts from the linear probe, bit for bit.
Our reading, as the official code is not released: that y_0 are the final features and g has no residual of
its own (then it would not start from them); no scale or shift in LN, since W1 and V1 can have both;
features of other widths go through a trained low-rank map first, and maps are averaged to the final
positions (see `taps`).
"""

from __future__ import annotations

import torch
from torch import nn

from toolkit.errors import check_name
from toolkit.methods.side import SideModel, check_positive, low_rank, silent, to_four_bits
from toolkit.methods.taps import Survey, taps_of

EPS = 1e-6  # of layer norms, as in vision transformers
STARTS, MIXERS = ("last", "first"), ("both", "channels", "tokens")


def losa(
    model: nn.Module,
    side_rank: int = 8,
    side_taps: int = 0,
    losa_start: str = "last",
    losa_mixer: str = "both",
    four_bit_backbone: bool = False,
) -> SideModel:
    """A mixer of rank `side_rank` for each of `side_taps` blocks (0: all) beside `model`, which is used up.

    `losa_start`: "last" as above; "first": y_0 is what the first tapped block returned, the final features
    are mixed in last, and training does not start from the linear probe.  `losa_mixer`: "channels" or
    "tokens" alone, or both.
    """
    check_positive(side_rank=side_rank)
    check_name("losa_start", losa_start, STARTS)
    check_name("losa_mixer", losa_mixer, MIXERS)
    survey = Survey.of(model)
    taps = taps_of(model, survey, side_taps)
    if four_bit_backbone:
        to_four_bits(model)
    parameter = next(model.parameters())
    with torch.device(parameter.device):
        side = Refinement(taps.widths, taps.positions, side_rank, losa_start == "first", losa_mixer)
    return SideModel(model, survey, taps, side)


class Refinement(nn.Module):
    """Mixers, one per tapped block: features of `widths`, (B, N, C_i), the final ones last -> (B, N, C)."""

    def __init__(self, widths: tuple[int, ...], positions: int, rank: int, from_first: bool, mixes: str):
        super().__init__()
        first, *others = widths
        final = widths[-1]
        self.from_first = from_first
        self.start = low_rank(first, final, rank) if from_first and first != final else nn.Identity()
        read = others if from_first else widths[:-1]
        self.mixers = nn.ModuleList(Mixer(width, final, positions, rank, mixes) for width in read)

    def forward(self, unread: list[torch.Tensor]) -> torch.Tensor:
        y = self.start(unread.pop(0 if self.from_first else -1))
        for mixer in self.mixers:
            y = mixer(unread.pop(0), y)
        return y


class Mixer(nn.Module):
    """y + g(b + y) for features b (B, N, C_b) and y (B, N, C)."""

    def __init__(self, width_in: int, width: int, positions: int, rank: int, mixes: str):
        super().__init__()
        self.widen = low_rank(width_in, width, rank) if width_in != width else nn.Identity()
        for name, size in (("channels", width), ("tokens", positions)):
            if mixes in ("both", name):
                setattr(self, f"{name}_in", nn.Linear(size, rank))
                setattr(self, f"{name}_out", silent(nn.Linear(rank, size, bias=False)))
            else:
                setattr(self, f"{name}_in", None)
                setattr(self, f"{name}_out", None)

    def forward(self, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled(y.device.type)
        dtype = torch.get_autocast_dtype(y.device.type) if autocast else y.dtype
        weights = []
        for name in ("channels", "tokens"):
            inner, outer = getattr(self, f"{name}_in"), getattr(self, f"{name}_out")
            weights += [None] * 3 if inner is None else [inner.weight, inner.bias, outer.weight]
        return _Mix.apply(self.widen(b), y, dtype, *weights)


class _Mix(torch.autograd.Function):
    """y + g(b + y), computed in `dtype`; all that backward gets of full size is b + y.

    b, y (B, N, C); channels: W1 (r, C), its bias (r,), W2 (C, r); tokens: V1 (r, N), its bias (r,), V2
    (N, r); either may be None.  Norms and sums of the products are computed again.
    """

    @staticmethod
    def forward(ctx, b, y, dtype, w1, w1_bias, w2, v1, v1_bias, v2):
        with torch.autocast(y.device.type, enabled=False):
            x = (b + y).to(dtype)
            out, mixed, channels, tokens = y, x, None, None
            if w1 is not None:
                channels = torch.addmm(w1_bias.to(dtype), _rows(_normed(x)[0]), w1.to(dtype).t())  # (B·N, r)
                update = _channel_update(channels, w2, x.shape)
                out = out + update
                mixed = update.add_(x) if v1 is not None else None
                del update
            if v1 is not None:
                normed = _normed(mixed)[0]
                del mixed
                tokens = _bmm(v1.to(dtype), normed).add_(v1_bias.to(dtype)[:, None])  # (B, r, C)
                del normed
                update = _bmm(v2.to(dtype), nn.functional.gelu(tokens))
                out = out + update if out is y else out.add_(update)
        ctx.save_for_backward(x, channels, tokens, w1, w1_bias, w2, v1, v1_bias, v2)
        ctx.dtypes = b.dtype, y.dtype
        return out

    @staticmethod
    def backward(ctx, grad):
        x, channels, tokens, w1, w1_bias, w2, v1, v1_bias, v2 = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None] * 6
        grad_out = grad.to(x.dtype)
        grad_x = None  # of x as the norms read it
        if v1 is not None:
            mixed = x if w1 is None else _channel_update(channels, w2, x.shape).add_(x)
            normed, mean, rstd = _normed(mixed)
            codes = nn.functional.gelu(tokens)
            grad_tokens = torch.ops.aten.gelu_backward(_bmm(v2.to(x.dtype).t(), grad_out), tokens)
            grads[3] = torch.matmul(grad_tokens, normed.transpose(1, 2)).sum(0).to(v1.dtype)
            grads[4] = grad_tokens.sum((0, 2)).to(v1_bias.dtype)
            grads[5] = torch.matmul(grad_out, codes.transpose(1, 2)).sum(0).to(v2.dtype)
            del normed
            grad_x = _norm_backward(_bmm(v1.to(x.dtype).t(), grad_tokens), mixed, mean, rstd)
            del mixed
        if w1 is not None:
            rows = _rows(grad_out if grad_x is None else grad_out + grad_x)  # of C, that T read too
            grad_channels = torch.ops.aten.gelu_backward(rows @ w2.to(x.dtype), channels)
            grads[2] = (rows.t() @ nn.functional.gelu(channels)).to(w2.dtype)
            del rows
            normed, mean, rstd = _normed(x)
            grads[0] = (grad_channels.t() @ _rows(normed)).to(w1.dtype)
            grads[1] = grad_channels.sum(0).to(w1_bias.dtype)
            del normed
            through = _norm_backward((grad_channels @ w1.to(x.dtype)).view_as(x), x, mean, rstd)
            grad_x = through if grad_x is None else grad_x.add_(through)
            del through
        b_dtype, y_dtype = ctx.dtypes
        grad_b = grad_x.to(b_dtype) if ctx.needs_input_grad[0] else None
        grad_y = (grad + grad_x).to(y_dtype) if ctx.needs_input_grad[1] else None
        return grad_b, grad_y, None, *grads


def _bmm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(n, k) times each (k, C) of (B, k, C); matmul would copy x, to make it a single product."""
    return torch.bmm(weight.expand(len(x), -1, -1), x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer norm over channels without scale and shift; its means and reciprocal deviations."""
    return torch.native_layer_norm(x, [x.shape[-1]], None, None, EPS)


def _norm_backward(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> torch.Tensor:
    mask = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(grad, x, [x.shape[-1]], mean, rstd, None, None, mask)[0]


def _channel_update(channels: torch.Tensor, w2: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return (nn.functional.gelu(channels) @ w2.to(channels.dtype).t()).view(shape)
