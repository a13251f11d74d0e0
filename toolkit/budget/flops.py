"""Floating-point operations of a step, in the forward pass, the backward pass and recomputation.

Two per multiply-add of matrix products, convolutions (grouped and depthwise ones too), attention and
registered operators (4-bit products, selective scans), and the arithmetic of batch, layer and group norms (5
% of a MobileNet's step).  Not counted: activations, softmax, additions of residuals and biases, pooling,
resampling, RMS norms, the optimizer, and work that a kernel repeats internally (flash attention's scores), so
that a model has the same count with every kernel.  Not counted but named in `Flops.uncounted`: other products
(fused recurrent and bilinear layers, distances, Fourier transforms, 8-bit products) and custom operators.

Most formulas are torch.utils.flop_counter's.  Ours replace: the weight gradient of grouped convolutions,
which it multiplies by the number of groups (2.14.1; pytorch pull request 183405); attention's backward pass,
where it counts flash attention's repetition; attention on the CPU and matrix-vector products, which it leaves
out.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from toolkit.budget.fakes import on_fake_tensors, swept
from toolkit.budget.step import call, split_batch, sum_of
from toolkit.budget.tape import recomputing

PHASES = ("forward", "backward", "recompute")


def current_phase() -> str:
    """The phase of the operator that a dispatch mode is handling.

    During backward the engine runs a graph task.  Operators in it are recomputation if gradients are enabled,
    if a tape (`budget.tape`) runs them, or under the saved-tensor hooks that torch's non-reentrant checkpoint
    sets while it repeats a forward pass (there the forward of an autograd function runs without gradients).
    Gradients of gradients (`create_graph`) look the same and count as recomputation.
    """
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    if torch.is_grad_enabled() or recomputing():
        return "recompute"
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    repeats = hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
    return "recompute" if repeats else "backward"


@dataclass(frozen=True)
class Flops:
    """Counts of one step of a whole batch; `macs`: multiply-adds of the forward pass, without norms."""

    forward: int
    backward: int
    recompute: int
    macs: int
    by_operator: dict[str, dict[str, int]]  # phase -> operator -> count
    uncounted: dict[str, int]  # operator without a formula, a product or a custom one -> calls

    @property
    def total(self) -> int:
        """All three phases."""
        return self.forward + self.backward + self.recompute

    def __str__(self) -> str:
        giga = (f"{phase} {getattr(self, phase) / 1e9:.3f}" for phase in PHASES)
        missing = f"; not counted: {', '.join(self.uncounted)}" if self.uncounted else ""
        return f"GFLOP: {', '.join(giga)}; forward {self.macs / 1e9:.3f} GMAC{missing}"


@swept
def flops(model: nn.Module, batch) -> Flops:
    """Count one training step of `model`, in its present mode, without computing anything.

    `batch`: a tensor (B, ...), a dict of keyword arguments, or (inputs, targets), whose targets are not
    needed: the loss is the sum of all outputs.  Frozen layers have no weight gradient, and no input gradient
    below the first trained layer.  Recomputation of checkpointed parts counts under `recompute`.  Raises
    `InputError` if the model cannot run on fake tensors; then count a real step with `FlopCounter`.
    """
    with on_fake_tensors(model, batch) as fake_batch, FlopCounter() as counter:
        inputs, _ = split_batch(fake_batch)
        loss = sum_of(call(model, inputs))
        if loss.requires_grad:
            loss.backward()
    return counter.flops


# Queries of fake tensors, which are not operators.
_QUERIES = {
    *(f"aten.{q}" for q in ("is_contiguous", "sym_is_contiguous", "is_strides_like_format", "size", "dim")),
    *(f"aten.{q}" for q in ("is_non_overlapping_and_dense", "sym_size", "stride", "sym_stride", "numel")),
    *("aten.sym_numel", "aten.storage_offset", "aten.sym_storage_offset", "prim.layout", "prim.device"),
}

# torch's operators that compute products; interpolation and the gates of recurrent cells are elementwise.
_PRODUCT = re.compile(
    r"mm(_|$)|conv(?!ert)|linear(_|$)|(rnn|lstm|gru)(?!_cell)|attention|matmul|vdot|addr|dist_(for|back)ward"
    r"|_fft_|linalg_(?!vector_norm|cross|check)|cholesky|triangular_solve|ormqr|geqrf"
)


@functools.cache
def _is_uncounted(name: str) -> bool:
    """Whether operator `name`, which has no formula, computes products or is not one of torch's."""
    library, _, operator = name.partition(".")
    if operator.startswith(("quantize", "dequantize")):
        return False
    return library not in ("aten", "prim", "prims", "profiler") or bool(_PRODUCT.search(operator))


class FlopCounter(TorchDispatchMode):
    """Counts the operators that run while it is entered; `flops` holds the counts.

    `formulas` replace or add to the built-in ones: operator name ("aten.mm") -> function of the
    operator's arguments and its output, giving a count.
    """

    supports_higher_order_operators = True

    def __init__(self, formulas: dict[str, Callable] | None = None):
        super().__init__()
        self._formulas = FORMULAS | NORMS | (formulas or {})
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.uncounted: Counter = Counter()
        self._fastpaths: list[bool] = []

    def __enter__(self) -> FlopCounter:
        # In evaluation torch's attention layers are one fused operator, for which there is no formula.
        self._fastpaths.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpaths.pop())
        super().__exit__(*exc)

    @property
    def flops(self) -> Flops:
        """The counts so far."""
        products = sum(n for name, n in self.counts["forward"].items() if name not in NORMS)
        return Flops(
            **{phase: sum(self.counts[phase].values()) for phase in PHASES},
            macs=products // 2,
            by_operator={phase: dict(counts) for phase, counts in self.counts.items() if counts},
            uncounted=dict(self.uncounted),
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        name = str(packet)
        if name in _QUERIES:
            return NotImplemented
        if name in self._formulas:
            out = func(*args, **kwargs)
            self.counts[current_phase()][name] += self._formulas[name](*args, out_val=out, **kwargs)
        elif packet in flop_registry:
            out = func(*args, **kwargs)
            self.counts[current_phase()][name] += flop_registry[packet](*args, out_val=out, **kwargs)
        else:
            out = self._decomposed(func, args, kwargs)
            if out is NotImplemented:
                out = func(*args, **kwargs)
                if _is_uncounted(name):
                    self.uncounted[name] += 1
        return out

    def _decomposed(self, func, args, kwargs):
        """Decompose composite operators (`linear`), which arrive whole in inference mode."""
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)


def operator_flops(func, args: tuple, kwargs: dict, out) -> int:
    """Floating-point operations of the products in one operator call, without norms."""
    packet = getattr(func, "_overloadpacket", func)
    formula = FORMULAS.get(str(packet)) or flop_registry.get(packet)
    return formula(*args, out_val=out, **kwargs) if formula else 0


def _convolution_backward(
    grad, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask, *, out_val
) -> int:
    """Input and weight gradient each take the multiply-adds of the forward pass."""
    pixels = math.prod((x if transposed else grad).shape[2:])
    return 2 * grad.shape[0] * pixels * math.prod(weight.shape) * (mask[0] + mask[1])


def _attention(q, k, v, *rest, out_val, **options) -> int:
    """Q·Kᵀ and P·V; shapes (B, heads, tokens, width).  Masked products count too."""
    return 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])


def _attention_backward(grad, q, k, v, *rest, out_val, **options) -> int:
    """Gradients of Q, K, V and P: twice the forward pass, without repeating the scores."""
    return 2 * _attention(q, k, v, out_val=out_val)


def _gemm_4bit(x, weight, shape, *rest, out_val, **options) -> int:
    """`x` (..., in) times the unpacked weight of `shape` (out, in); unpacking is not counted."""
    return 2 * x.numel() * shape[0]


# Two per multiply-add, by the name of the operator.
FORMULAS: dict[str, Callable] = {
    "aten.convolution_backward": _convolution_backward,
    "aten.mv": lambda matrix, vector, *, out_val, **_: 2 * matrix.numel(),
    "aten.addmv": lambda bias, matrix, vector, *, out_val, **scales: 2 * matrix.numel(),
    "aten.dot": lambda a, b, *, out_val, **_: 2 * a.numel(),
    "aten.addbmm": lambda bias, a, b, *, out_val, **_: 2 * a.numel() * b.shape[2],
    "bitsandbytes.gemm_4bit": _gemm_4bit,
    "bitsandbytes.gemv_4bit": _gemm_4bit,
}
for _name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv"):
    _packet = getattr(torch.ops.aten, _name)
    _formula = FORMULAS.get(f"aten.{_name}") or flop_registry[_packet]
    FORMULAS[f"aten.{_name}_"] = _formula  # in place
for _kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    FORMULAS[f"aten._scaled_dot_product_{_kind}"] = _attention
    FORMULAS[f"aten._scaled_dot_product_{_kind}_backward"] = _attention_backward


def register_flops(formulas: dict[str, Callable]) -> None:
    """Count more operators: name ("library.operator") -> function of its arguments and `out_val`."""
    FORMULAS.update(formulas)


def _norm(x: torch.Tensor, affine) -> int:
    """Mean 1, variance 3, normalise 2, scale and shift 2 per element."""
    return x.numel() * (8 if affine is not None else 6)


def _norm_backward(x: torch.Tensor, affine, mask) -> int:
    """Per element: scaled gradient 1, its two sums 3, input gradient 4; weight 2, bias 1."""
    return x.numel() * ((7 + (affine is not None)) * mask[0] + 2 * mask[1] + mask[2])


def _batch_norm(x, weight, bias, mean, var, training, *rest, out_val, **options) -> int:
    """With running statistics a norm is one multiply-add per element."""
    return _norm(x, weight) if training else 2 * x.numel()


def _batch_norm_backward(grad, x, weight, mean, var, saved, saved_too, train, eps, mask, *, out_val) -> int:
    """In training the sums are the gradients of weight and bias; scaling is per channel."""
    if train:
        return x.numel() * (7 if mask[0] else 3)
    return x.numel() * (mask[0] + 2 * mask[1] + mask[2])


NORMS: dict[str, Callable] = {
    "aten.native_batch_norm": _batch_norm,
    "aten.cudnn_batch_norm": _batch_norm,
    "aten.native_batch_norm_backward": _batch_norm_backward,
    "aten.cudnn_batch_norm_backward": lambda x, grad, weight, *rest, out_val: 7 * x.numel(),
    "aten.native_layer_norm": lambda x, shape, weight, *rest, out_val, **_: _norm(x, weight),
    "aten.native_layer_norm_backward": lambda grad, x, shape, mean, rstd, weight, bias, mask, *, out_val: (
        _norm_backward(x, weight, mask)
    ),
    "aten.native_group_norm": lambda x, weight, *rest, out_val, **_: _norm(x, weight),
    "aten.native_group_norm_backward": lambda grad, x, mean, rstd, weight, n, c, hw, g, mask, *, out_val: (
        _norm_backward(x, weight, mask)
    ),
}
