"""Other strategies for keeping activations, measured on the same training step.

Every peer answers the same question: one steady-state step of this model on this batch, at most so many
bytes.  All are judged by one ruler, `measured_step` in `peers_step.py`.

Fixed policies (`none`, `static`, `threshold`, `selective`) give one point; `held` says whether it fits.
Searches (`whole_blocks`, `rotor` in `peers_searches.py`; `micro_batches`) give the point with the fewest
recomputed FLOPs that fits, always one that was run; where none fits, `peak_bytes` is None and the note
names the smallest peak.  `compiled` is swept over ratios, each of which takes ten times a step; nothing
calls it by default.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from peers_chains import cell_of
from peers_searches import rotor, whole_blocks
from peers_step import (
    PeerResult,
    StepCost,
    Trace,
    fake_training,
    nothing,
    product_flops,
    result_of,
    smallest_note,
)
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from toolkit.budget import Checkpointing, TensorMemory, format_bytes
from toolkit.budget.checkpointing import Threshold
from toolkit.budget.flops import PHASES

TAUS = (0.50, 0.55, 0.65, 0.70)  # of arXiv 2607.02158's rule
MICRO_BATCHES = (32, 16, 8)


# Fixed policies


def none(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Nothing is checkpointed."""
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        return _fixed("none", cell.run(chain, chain.kept).cost, budgets)


def static(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Every block is checkpointed."""
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        return _fixed("static", cell.run(chain, chain.dropped).cost, budgets)


def selective(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """torch's selective checkpointing of every block: products and attention are kept.

    Twice, for LoRA's sake: with `mm`, and with `addmm` alone, which spares the adapters' products
    (their outputs are as large as the frozen layers').
    """
    results = []
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        for name, keep in (("selective mm", _keep_products), ("selective addmm", _keep_biased_products)):
            cost = cell.run(replace(chain, context_fn=keep), chain.dropped).cost
            results += _fixed(name, cost, budgets)
    return results


_BIASED_PRODUCTS = [
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]


def _keep_biased_products():
    return create_selective_checkpoint_contexts(_BIASED_PRODUCTS)


def _keep_products():
    return create_selective_checkpoint_contexts([*_BIASED_PRODUCTS, torch.ops.aten.mm.default])


def _fixed(peer: str, cost: StepCost, budgets: Sequence[int]) -> list[PeerResult]:
    return [result_of(peer, budget, cost) for budget in budgets]


def threshold(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """The rule of arXiv 2607.02158, `toolkit.budget.Checkpointing`'s "threshold", for each of `TAUS`.

    The rule compares tau * budget with the bytes live at each block's entry; two thresholds between the
    same readings give the same step, which is run once.
    """
    ranges: list[tuple[float, float, StepCost]] = []  # thresholds above the first, up to the second
    results = []
    with cell_of(model, images, labels, precision) as cell:
        for tau in TAUS:
            for budget in budgets:
                limit = tau * budget
                cost = next((cost for low, high, cost in ranges if low < limit <= high), None)
                if cost is None:
                    readings = _Readings()
                    around = partial(_threshold_rule, model, readings, tau, budget)
                    cost = cell.step(("threshold", limit), around=around).cost
                    low = max((r for r in readings.seen if r < limit), default=-math.inf)
                    high = min((r for r in readings.seen if r >= limit), default=math.inf)
                    ranges.append((low, high, cost))
                results.append(result_of(f"threshold {tau:.2f}", budget, cost))
    return results


class _Readings:
    """Hands on what a memory says and remembers it."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.memory: TensorMemory | None = None

    @property
    def allocated_bytes(self) -> int:
        self.seen.append(self.memory.allocated_bytes)
        return self.seen[-1]


def _threshold_rule(model, readings: _Readings, tau: float, budget: int, trace: Trace) -> Checkpointing:
    readings.memory = trace.memory
    return Checkpointing(model, Threshold(tau), memory=readings, budget_bytes=budget)


# Micro-batches


def micro_batches(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """No checkpointing, gradients accumulated over slices: the largest of `MICRO_BATCHES` that fits."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if any(norm.training for norm in norms):
        return nothing("micro_batches", budgets, "batch statistics couple the samples")
    results = []
    with cell_of(model, images, labels, precision) as cell:
        for budget in budgets:
            for size in MICRO_BATCHES:
                cost = cell.step(("micro-batch", size), micro_batch=size, slices=2).cost
                if cost.peak_bytes <= budget:
                    results.append(replace(result_of("micro_batches", budget, cost), note=f"{size} images"))
                    break
            else:
                results += nothing("micro_batches", [budget], smallest_note(cost))
    return results


# Peers that run elsewhere, or not at all, or slowly


def sac_milp(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """`torch.distributed._tools.sac_ilp`: whether the profilers that it needs get through a
    forward pass here, and if not, why.

    Without a GPU they do not (torch 2.14.1), nor with frozen parameters.  In a child process, since
    they leave hooks behind that disturb later steps.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_try_profilers, args=(sender, model, images, labels, precision))
    child.start()
    sender.close()
    try:
        note = receiver.recv()
    except EOFError:
        note = "its profilers ended the process"
    child.join()
    return nothing("sac_milp", budgets, note)


def _try_profilers(sender, model, images, labels, precision) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.sac_estimator import SACEstimator

    warnings.simplefilter("ignore")
    name = "MemTracker"
    with fake_training(model, images, labels, precision) as training:
        try:
            tracker = MemTracker()
            tracker.track_external(training.model, training.optimizer)
            with tracker:
                training.model(training.images)
            name = "SACEstimator"
            with SACEstimator()("operator-level-cost-model"):
                training.model(training.images)
            note = "its profilers start here; solving and applying its plans is not written"
        except Exception as error:
            note = f"{name}: {type(error).__name__}: {error}"
        sender.send(note)


def ckptplan(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """PyPI's ckptplan, version 0.1.0rc1: never run here, its profiler needs CUDA."""
    missing = importlib.util.find_spec("ckptplan") is None
    note = "is not installed (needs CUDA and torch < 2.14)" if missing else "needs CUDA to profile"
    return nothing("ckptplan", budgets, f"ckptplan {note}")


@dataclass(frozen=True)
class CompiledPoint:
    """A step through torch.compile's partitioner."""

    ratio: float  # activation_memory_budget: 0 keeps inputs only, below 1 the partitioner has a choice
    peak_bytes: int
    recompute_pct: float  # FLOPs beyond the plain step's, in percent of its forward pass


def compiled(model, images, labels, precision, ratios: Sequence[float]) -> list[CompiledPoint]:
    """The min-cut partitioner of `torch.compile` under `activation_memory_budget`, swept over `ratios`.

    Traced by AOTAutograd on fake tensors and run operator by operator, as the backend aot_eager does.
    Beside real compiled steps of demo_vit with LoRA, batch 16 (torch 2.14.1): equal to the byte in fp32;
    in bf16 a ratio means another choice, and peaks are up to 30 % higher than torch.compile's, so bf16
    figures are not a verdict on it.  Inductor's fusion would do without some of the temporaries.  10 to 20
    seconds per ratio for ViT-S.  Raises for batch norms in training mode.
    """
    with cell_of(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        plain = product_flops(cell.run(chain, chain.kept).counter, *PHASES)
        forward = cell.run(chain, chain.kept).cost.forward_flops
        points = []
        for ratio in ratios:
            trace = cell.compiled_step(ratio)
            # A compiled backward pass does not say what in it is recomputation.
            again = 100 * (product_flops(trace.counter, *PHASES) - plain) / forward
            points.append(CompiledPoint(ratio, trace.cost.peak_bytes, again))
    return points


def compiled_for_budgets(points: Sequence[CompiledPoint], budgets: Sequence[int]) -> list[PeerResult]:
    """The swept ratio with the fewest recomputed FLOPs that fits: what a user could find by trying."""
    results = []
    for budget in budgets:
        fitting = [point for point in points if point.peak_bytes <= budget]
        if fitting:
            best = min(fitting, key=lambda point: (point.recompute_pct, point.peak_bytes))
            note = f"ratio {best.ratio}"
            results.append(PeerResult("compiled", budget, best.peak_bytes, best.recompute_pct, True, note))
        else:
            smallest = min(point.peak_bytes for point in points)
            results += nothing("compiled", [budget], f"smallest swept peak {format_bytes(smallest)}")
    return results


# By name; `compare` runs them all.
PEERS = {
    peer.__name__: peer
    for peer in (none, static, threshold, whole_blocks, rotor, micro_batches, selective, sac_milp, ckptplan)
}


def compare(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Every peer at every budget (bytes); about a minute for ViT-S and 10 budgets."""
    return [result for peer in PEERS.values() for result in peer(model, images, labels, precision, budgets)]
