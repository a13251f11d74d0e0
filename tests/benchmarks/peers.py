"""What else decides which activations to keep, measured on the same training step.

Every peer answers the same question: one steady-state step of this model on this batch, at most so many
bytes.  All are judged by one ruler, `measured_step`: highest live tensor bytes (`TensorMemory`) and
recomputed forward FLOPs of products (`FlopCounter`, norms left out) of a step on fake CPU tensors, so
nothing here needs a GPU or the memory that it speaks of.

Fixed policies (`none`, `static`, `threshold`, `selective`) give one point; `held` says whether it fits.
Searches (`whole_blocks`, `rotor`, `micro_batches`) give the point with the fewest recomputed FLOPs that
fits, always one that was run; where none fits, `peak_bytes` is None and the note names the smallest peak.
`compiled` is swept over ratios, each of which takes ten times a step; nothing calls it by default.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import multiprocessing
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F
from functorch.compile import aot_function, min_cut_rematerialization_partition
from timm.models.vision_transformer import Block
from torch import nn
from torch._dynamo.backends.debugging import boxed_nop
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from toolkit import adapt, build_backbone
from toolkit.budget import Checkpointing, TensorMemory, find_blocks, format_bytes
from toolkit.budget.fake_step import on_fake_tensors
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.phases import PHASES
from toolkit.errors import check_name
from toolkit.evaluation import autocast
from toolkit.training import set_train_mode

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
IMAGE_SIZES = {"vit_small": 224, "tiny_vit": 224, "resnet18": 224, "demo_vit": 32}  # pixels
TAUS = (0.50, 0.55, 0.65, 0.70)  # of arXiv 2607.02158's rule
MICRO_BATCHES = (32, 16, 8)
VERIFICATIONS = 4  # runs that a search may spend on one budget
ROTOR_SLOTS = 16384  # of the dynamic programme's byte grid

# A plan: stages by index; a tuple is a group that runs under one checkpoint, groups may be nested.
Plan = tuple["int | Plan", ...]


@dataclass(frozen=True)
class StepCost:
    """Of one training step."""

    peak_bytes: int  # all live tensors: weights, batch, gradients, optimizer state, activations
    forward_flops: int
    recompute_flops: int

    @property
    def recompute_pct(self) -> float:
        """Recomputed in percent of the forward pass."""
        return 100 * self.recompute_flops / self.forward_flops


@dataclass(frozen=True)
class PeerResult:
    """What one peer makes of one budget."""

    peer: str
    budget_bytes: int
    peak_bytes: int | None  # None where the peer offers nothing
    recompute_pct: float | None  # recomputed FLOPs in percent of the forward pass
    held: bool
    note: str = ""


def build(
    name: str, method: str, batch_size: int, precision: str
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Model in training mode, images (B, 3, H, W) and labels (B,).

    `name`: vit_small, tiny_vit, resnet18 (100 classes, 224 px) or demo_vit (10 classes, 32 px), with
    random weights of seed 0.  Weights and images are fp32 under both precisions, as in training.
    """
    check_name("model", name, IMAGE_SIZES)
    check_name("precision", precision, PRECISIONS)
    torch.manual_seed(0)
    classes, pixels = (10 if name == "demo_vit" else 100), IMAGE_SIZES[name]
    model = adapt(build_backbone(name, classes, pretrained=False), method)
    set_train_mode(model)
    images = torch.zeros(batch_size, 3, pixels, pixels)
    return model, images, torch.arange(batch_size) % classes


# The step that everything is measured on


def product_flops(counter: FlopCounter, *phases: str) -> int:
    """FLOPs counted so far in these phases, norms left out, as a plan counts them."""
    return sum(n for phase in phases for op, n in counter.counts[phase].items() if op not in NORMS)


def measured_step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
    *,
    setup: Callable[[], AbstractContextManager] = nullcontext,
    micro_batch: int | None = None,
) -> StepCost:
    """Cost of the second of two training steps on fake tensors (the first lacks the optimizer's state).

    `setup()` is entered around both, once `model` holds fake tensors.  `micro_batch`: images per slice,
    gradients accumulated over the slices.
    """
    with _fake_training(model, images, labels, precision) as training, setup():
        training.step(micro_batch=micro_batch)
        return training.step(micro_batch=micro_batch).cost


@dataclass(frozen=True)
class _Mark:
    """A moment of a step."""

    name: str
    live_bytes: int  # then
    peak_bytes: int  # since the mark before
    forward_flops: int  # so far
    recompute_flops: int  # so far


class _Trace:
    """Peaks and FLOPs of one step, cut at marks."""

    def __init__(self, memory: TensorMemory, counter: FlopCounter):
        self.memory, self.counter = memory, counter
        self.marks: list[_Mark] = []

    def mark(self, name: str) -> None:
        """End a stretch of the step here and begin the next."""
        flops = (product_flops(self.counter, phase) for phase in ("forward", "recompute"))
        self.marks.append(_Mark(name, self.memory.allocated_bytes, self.memory.peak_bytes, *flops))
        self.memory.reset_peak()

    @property
    def cost(self) -> StepCost:
        """Of the whole step, once it ended."""
        last = self.marks[-1]
        return StepCost(max(m.peak_bytes for m in self.marks), last.forward_flops, last.recompute_flops)


class _Training:
    """A model with its optimizer; `step` is `toolkit.training`'s, without reading the loss."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str):
        self.model, self.images, self.labels, self.precision = model, images, labels, precision
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step(
        self,
        around: Callable[[_Trace], AbstractContextManager] = nullcontext,
        *,
        forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        micro_batch: int | None = None,
        slices: int | None = None,
    ) -> _Trace:
        """One step inside `around(trace)`, with `forward` (default: the model) as the network.

        `slices`: run only so many micro-batches; from the second on, each repeats the one before.
        """
        forward = self.model if forward is None else forward
        micro = micro_batch or len(self.labels)
        memory = TensorMemory(CPU)
        memory.track([*self.model.parameters(), *self.model.buffers()])
        memory.track(value for state in self.optimizer.state.values() for value in state.values())
        memory.reset_peak()
        with memory, FlopCounter() as counter:
            trace = _Trace(memory, counter)
            with around(trace):
                parts = zip(self.images.split(micro), self.labels.split(micro))
                for x, y in itertools.islice(parts, slices):
                    memory.track([x, y])
                    with autocast(CPU, self.precision):
                        logits = forward(x)
                        loss = F.cross_entropy(logits, y) * (len(y) / len(self.labels))
                        trace.mark("loss")  # autocast's cached weights die on leaving it
                    trace.mark("backward")
                    hits = (logits.detach().argmax(1) == y).sum()
                    del x, y, logits
                    loss.backward()
                    del loss, hits
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            trace.mark("end")
        return trace


@contextlib.contextmanager
def _fake_training(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str
) -> Iterator[_Training]:
    with on_fake_tensors(model, (images, labels)) as (fake_images, fake_labels):
        yield _Training(model, fake_images, fake_labels, precision)


# Chains of stages and plans for them


@dataclass(frozen=True)
class _Chain:
    """Stages in the order in which they run; each belongs to one block."""

    blocks: list[nn.Module]
    stages: list[Callable]
    owners: list[int]  # of each stage: index of its block
    linked: list[bool]  # of each stage: its output, and nothing else, enters the next stage
    context_fn: Callable = noop_context_fn  # of torch's checkpoint

    @property
    def kept(self) -> Plan:
        """The plan that checkpoints nothing."""
        return tuple(range(len(self.stages)))

    @property
    def dropped(self) -> Plan:
        """The plan that checkpoints each stage by itself."""
        return tuple((stage,) for stage in range(len(self.stages)))

    @contextlib.contextmanager
    def running(self, plan: Plan, trace: _Trace | None = None) -> Iterator[None]:
        """The blocks run as `plan` says: a group runs whole in the block of its first stage."""
        items: list[list[tuple[int, int | Plan]]] = [[] for _ in self.blocks]
        for position, item in enumerate(plan):
            items[self.owners[_first(item)]].append((position, item))
        for block, own_items in zip(self.blocks, items):
            block.forward = partial(self._run_block, own_items, trace)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _run_block(self, items: list[tuple[int, int | Plan]], trace: _Trace | None, *args, **kwargs):
        for position, item in items:
            if trace:
                trace.mark(f"enter {position}")
            output = self._run_item(item, *args, **kwargs)
            if trace:
                trace.mark(f"leave {position}")
                _mark_backward(trace, position, output)
            args, kwargs = (output,), {}
            del output
        return args[0]

    def _run_item(self, item: int | Plan, *args, **kwargs):
        if isinstance(item, int):
            return self.stages[item](*args, **kwargs)
        return checkpoint(
            self._run_group, item, *args, use_reentrant=False, context_fn=self.context_fn, **kwargs
        )

    def _run_group(self, items: Plan, *args, **kwargs):
        for item in items:
            args, kwargs = (self._run_item(item, *args, **kwargs),), {}
        return args[0]


def _first(item: int | Plan) -> int:
    return item if isinstance(item, int) else _first(item[0])


def _mark_backward(trace: _Trace, position: int, output) -> None:
    """Mark the moment when the backward pass reaches `output`, a nest of tensors."""
    name = f"back {position}"

    def reached(gradient: torch.Tensor) -> None:
        if all(mark.name != name for mark in trace.marks):
            trace.mark(name)

    for tensor in tree_iter(output):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(reached)


def _block_chain(training: _Training) -> _Chain:
    """The blocks that `find_blocks` names, in the order of a forward pass."""
    calls = []
    blocks = list(find_blocks(training.model).values())
    hooks = [
        block.register_forward_hook(
            lambda block, args, kwargs, output: calls.append((block, args, kwargs, output)), with_kwargs=True
        )
        for block in blocks
    ]
    with torch.no_grad(), autocast(CPU, training.precision):
        training.model(training.images)
    for hook in hooks:
        hook.remove()
    order = [block for block, *_ in calls]
    if len(set(order)) < len(order):
        raise NotImplementedError("a block that runs twice in a step is no stage of a chain.")
    linked = [
        len(args) == 1 and args[0] is output and not kwargs
        for (*_, output), (_, args, kwargs, _) in itertools.pairwise(calls)
    ]
    return _Chain(order, [b.forward for b in order], list(range(len(order))), [*linked, False])


def _half_block_chain(chain: _Chain) -> _Chain:
    """timm's transformer blocks cut into their attention and MLP halves, other blocks left whole."""
    stages, owners, linked = [], [], []
    for index, block in enumerate(chain.blocks):
        halves = [partial(_attention_half, block), partial(_mlp_half, block)]
        own = halves if type(block) is Block else [chain.stages[index]]
        stages += own
        owners += [index] * len(own)
        linked += [True] * (len(own) - 1) + [chain.linked[index]]
    return _Chain(chain.blocks, stages, owners, linked)


def _attention_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def _mlp_half(block: Block, x: torch.Tensor) -> torch.Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


KEPT, DROPPED = 0, 1  # rows of a profile's arrays


@dataclass(frozen=True)
class _Profile:
    """Bytes and FLOPs of each stage, from a step that keeps all activations and one that drops all.

    Arrays (2, stages): with every stage kept, with every stage checkpointed.
    """

    enter: np.ndarray  # live bytes on entering; (2, stages + 1), the last at the loss
    forward_peak: np.ndarray  # from entering until the next stage is entered
    back: np.ndarray  # live bytes when the backward pass arrives; 0 where it never does
    backward_peak: np.ndarray  # from then until it arrives at the stage before; 0 where it never does
    stem_peak: int  # before the first stage
    head_peak: np.ndarray  # (2,), from the loss until the backward pass arrives at the last stage
    forward_flops: np.ndarray  # (stages,)
    recompute_flops: np.ndarray  # (stages,); fewer: torch stops at the last tensor that was saved
    kept_peak: int  # of the whole step with every stage kept


def _profile(kept: _Trace, dropped: _Trace, stages: range) -> _Profile:
    runs = [_Stretches(kept.marks), _Stretches(dropped.marks)]
    return _Profile(
        enter=np.array([[*(run.live(f"enter {i}") for i in stages), run.live("loss")] for run in runs]),
        forward_peak=np.array(
            [[max(run.peak(f"enter {i}"), run.peak(f"leave {i}")) for i in stages] for run in runs]
        ),
        back=np.array([[run.live(f"back {i}") for i in stages] for run in runs]),
        backward_peak=np.array([[run.peak(f"back {i}") for i in stages] for run in runs]),
        stem_peak=runs[KEPT].marks[0].peak_bytes,
        head_peak=np.array([run.peak("backward") for run in runs]),
        forward_flops=np.array([runs[KEPT].flops(f"enter {i}")[0] for i in stages]),
        recompute_flops=np.array([runs[DROPPED].flops(f"back {i}")[1] for i in stages]),
        kept_peak=kept.cost.peak_bytes,
    )


class _Stretches:
    """A step's stretches between marks, by the mark that begins them."""

    def __init__(self, marks: list[_Mark]):
        self.marks = marks
        self.ends = {begin.name: (begin, end) for begin, end in itertools.pairwise(marks)}

    def live(self, name: str) -> int:
        """Bytes at this mark; 0 if the step never came by it."""
        return self.ends[name][0].live_bytes if name in self.ends else 0

    def peak(self, name: str) -> int:
        """Highest bytes of a stretch; 0 if the step never came there."""
        return self.ends[name][1].peak_bytes if name in self.ends else 0

    def flops(self, name: str) -> tuple[int, int]:
        """Forward and recomputed FLOPs of a stretch; 0 if the step never came there."""
        if name not in self.ends:
            return 0, 0
        begin, end = self.ends[name]
        return end.forward_flops - begin.forward_flops, end.recompute_flops - begin.recompute_flops


# What was measured for a model, batch and precision


class _Cell:
    """Fake steps of one model on one batch in a steady state (the optimizer has its moments)."""

    def __init__(self, known: dict, training: _Training):
        self._known, self._training = known, training  # `known` outlives the fake tensors

    def _once(self, key: object, compute: Callable):
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def chain(self, *, halves: bool) -> _Chain:
        """Blocks as stages, or transformer blocks in halves."""
        if halves:
            return self._once("halves", lambda: _half_block_chain(self.chain(halves=False)))
        return self._once("blocks", lambda: _block_chain(self._training))

    def run(self, chain: _Chain, plan: Plan) -> _Trace:
        """A step under `plan`."""
        key = len(chain.stages), chain.context_fn, plan
        return self._once(key, lambda: self._training.step(partial(chain.running, plan)))

    def profile(self, chain: _Chain) -> _Profile:
        """From two steps."""
        runs = self.run(chain, chain.kept), self.run(chain, chain.dropped)
        return _profile(*runs, range(len(chain.stages)))

    def step(self, key: object, **how) -> _Trace:
        """A step as `_Training.step` takes it, remembered as `key`."""
        return self._once(key, lambda: self._training.step(**how))

    def compiled_step(self, ratio: float) -> _Trace:
        """A step through AOTAutograd with min-cut partitioning under `activation_memory_budget`."""
        return self._once(("compiled", ratio), partial(self._compiled_step, ratio))

    def _compiled_step(self, ratio: float) -> _Trace:
        model = self._training.model
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        network = aot_function(
            lambda tensors, x: torch.func.functional_call(model, tensors, (x,)),
            fw_compiler=boxed_nop,
            bw_compiler=boxed_nop,
            partition_fn=min_cut_rematerialization_partition,
        )
        with torch._functorch.config.patch(activation_memory_budget=ratio):
            self._training.step(forward=partial(network, tensors))  # traces
            return self._training.step(forward=partial(network, tensors))


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _cell(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Iterator[_Cell]:
    """Steps that an earlier peer ran are not run again: the model must not change between peers."""
    known = _KNOWN.setdefault(model, {}).setdefault((precision, images.shape), {})
    with _fake_training(model, images, labels, precision) as training:
        training.step()
        yield _Cell(known, training)


# Fixed policies


def none(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Nothing is checkpointed."""
    with _cell(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        return _fixed("none", cell.run(chain, chain.kept).cost, budgets)


def static(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Every block is checkpointed."""
    with _cell(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        return _fixed("static", cell.run(chain, chain.dropped).cost, budgets)


def selective(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """torch's selective checkpointing of every block: products and attention are kept.

    Twice, for LoRA's sake: with `mm`, and with `addmm` alone, which spares the adapters' products
    (their outputs are as large as the frozen layers').
    """
    results = []
    with _cell(model, images, labels, precision) as cell:
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
    return [_result(peer, budget, cost) for budget in budgets]


def _result(peer: str, budget: int, cost: StepCost) -> PeerResult:
    return PeerResult(peer, budget, cost.peak_bytes, cost.recompute_pct, cost.peak_bytes <= budget)


def threshold(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """The rule of arXiv 2607.02158, `toolkit.budget.Checkpointing`'s "threshold", for each of `TAUS`.

    The rule compares tau * budget with the bytes live at each block's entry; two thresholds between the
    same readings give the same step, which is run once.
    """
    ranges: list[tuple[float, float, StepCost]] = []  # thresholds above the first, up to the second
    results = []
    with _cell(model, images, labels, precision) as cell:
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
                results.append(_result(f"threshold {tau:.2f}", budget, cost))
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


def _threshold_rule(model, readings: _Readings, tau: float, budget: int, trace: _Trace) -> Checkpointing:
    readings.memory = trace.memory
    return Checkpointing(model, "threshold", memory=readings, budget_bytes=budget, threshold=tau)


def micro_batches(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """No checkpointing, gradients accumulated over slices: the largest of `MICRO_BATCHES` that fits."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    if any(norm.training for norm in norms):
        return _nothing("micro_batches", budgets, "batch statistics couple the samples")
    results = []
    with _cell(model, images, labels, precision) as cell:
        for budget in budgets:
            for size in MICRO_BATCHES:
                cost = cell.step(("micro-batch", size), micro_batch=size, slices=2).cost
                if cost.peak_bytes <= budget:
                    results.append(replace(_result("micro_batches", budget, cost), note=f"{size} images"))
                    break
            else:
                results += _nothing("micro_batches", [budget], _smallest_note(cost))
    return results


def _nothing(peer: str, budgets: Sequence[int], note: str) -> list[PeerResult]:
    return [PeerResult(peer, budget, None, None, False, note) for budget in budgets]


def _smallest_note(cost: StepCost) -> str:
    return f"smallest feasible peak {format_bytes(cost.peak_bytes)}"


# Searches


def whole_blocks(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """The set of checkpointed blocks with the fewest recomputed FLOPs, from a model of the peak."""
    with _cell(model, images, labels, precision) as cell:
        chain = cell.chain(halves=False)
        find = _BlockSets(cell.profile(chain))
        return _verified("whole_blocks", budgets, find, lambda plan: cell.run(chain, plan).cost)


def rotor(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Optimal nested checkpoints of a chain, after Beaumont et al. 2019 (arXiv 1911.13214).

    Stages are blocks, of timm's ViTs half blocks.  A group of stages may share a checkpoint where their
    blocks follow each other with nothing in between.
    """
    with _cell(model, images, labels, precision) as cell:
        chain = cell.chain(halves=True)
        find = _NestedGroups(cell.profile(chain), chain.linked)
        return _verified("rotor", budgets, find, lambda plan: cell.run(chain, plan).cost)


def _verified(
    peer: str,
    budgets: Sequence[int],
    find: _BlockSets | _NestedGroups,
    measure: Callable[[Plan], StepCost],
) -> list[PeerResult]:
    """The best plan for each budget that a step confirmed.

    Where a step shows more than the search foresaw, the search gets that much less until it finds
    something else, for at most `VERIFICATIONS` plans.
    """
    results = []
    for budget in budgets:
        cost = _first_that_holds(budget, find, measure)
        results += (
            [_result(peer, budget, cost)]
            if cost
            else _nothing(peer, [budget], _smallest_note(measure(find.smallest())))
        )
    return results


def _first_that_holds(
    budget: int, find: _BlockSets | _NestedGroups, measure: Callable[[Plan], StepCost]
) -> StepCost | None:
    target, tried = budget, set()
    while len(tried) < VERIFICATIONS and (plan := find(target)):
        tried.add(plan)
        cost = measure(plan)
        if cost.peak_bytes <= budget:
            return cost
        while find(target) in tried:
            target -= cost.peak_bytes - budget
    return None


class _BlockSets:
    """Which blocks to checkpoint one by one.

    Before block i runs, in either direction, a step holds what blocks 0..i-1 keep; the rest is as in
    whichever of the profile's two steps treats block i alike.  So both peaks of block i are known for
    any plan from the kept bytes before it.  Those differ between the directions: under autocast the
    forward pass also holds the cast weights of checkpointed blocks.

    Exact for all 16 plans of demo_vit (full, bitfit, lora, linear; fp32, bf16); up to 3 % off for
    resnet18 (whose blocks end in an activation that the next block saves too: likely the cause).
    """

    def __init__(self, profile: _Profile):
        self.profile = profile
        self.forward_savings = np.diff(profile.enter[KEPT] - profile.enter[DROPPED])
        self.backward_savings = np.diff(profile.back[KEPT] - profile.back[DROPPED], prepend=0)
        # Peaks at block i if every block before it is checkpointed.
        before = np.cumsum(self.forward_savings) - self.forward_savings
        self.forward_needs = profile.forward_peak - np.outer([1, 0], before)
        before = np.cumsum(self.backward_savings) - self.backward_savings
        self.backward_needs = profile.backward_peak - np.outer([1, 0], before)

    def __call__(self, budget: int) -> Plan | None:
        """The plan with the fewest recomputed FLOPs; None if none fits."""
        if self.profile.stem_peak > budget:
            return None
        # Recomputed FLOPs, kept bytes in the forward and in the backward pass -> plan.
        states: dict[tuple[int, int, int], Plan] = {(0, 0, 0): ()}
        for i, recomputed in enumerate(self.profile.recompute_flops):
            following = {}
            for (flops, forward, backward), plan in states.items():
                for way, item in ((KEPT, i), (DROPPED, (i,))):
                    if forward + self.forward_needs[way, i] > budget:
                        continue
                    if backward + self.backward_needs[way, i] > budget:
                        continue
                    if way == KEPT:
                        kept = self.forward_savings[i], self.backward_savings[i]
                        state = flops, forward + kept[0], backward + kept[1]
                    else:
                        state = flops + recomputed, forward, backward
                    following[state] = (*plan, item)
            states = _undominated(following)
        head = self.profile.head_peak[DROPPED]
        return next((plan for (_, _, kept), plan in states.items() if kept + head <= budget), None)

    def smallest(self) -> Plan:
        """The plan with the lowest peak."""
        low, high = 0, self.profile.kept_peak
        while high - low > 512:
            middle = (low + high) // 2
            low, high = (low, middle) if self(middle) else (middle, high)
        return self(high)


def _undominated(states: dict[tuple[int, int, int], Plan]) -> dict[tuple[int, int, int], Plan]:
    """Sorted, without states that another, cheaper in FLOPs, also undercuts in bytes."""
    left, leanest = {}, (math.inf, math.inf)
    for state in sorted(states):
        _, forward, backward = state
        if forward >= leanest[0] and backward >= leanest[1]:
            continue
        left[state] = states[state]
        if backward < leanest[1]:
            leanest = forward, backward
    return left


class _NestedGroups:
    """Which groups of stages to checkpoint, and which groups inside them when they run again.

    `C(s, end)[m]` is the least recomputation, in FLOPs, for stages s..end-1 with m slots of memory above
    what is live when stage s is entered: either stage s is kept, or stages s..r are dropped and later
    run again by the best plan for them (Beaumont et al. 2019, theorem 1; here transient bytes are
    measured).  The outermost chain ends in the head and runs for the first time, which is no
    recomputation; within a group, gradients are alive while stages run again.
    """

    def __init__(self, profile: _Profile, linked: list[bool]):
        self.profile, self.linked = profile, linked
        self.stages = len(linked)
        self.top = self.stages + 1  # as `end`: the whole chain with the head
        self.base = int(profile.enter[DROPPED, 0])
        self.slot_bytes = math.ceil(1.25 * (profile.kept_peak - self.base) / ROTOR_SLOTS)
        self.slots = np.arange(ROTOR_SLOTS + 1)
        self.tables: dict[tuple[int, int], np.ndarray] = {}
        for length in range(1, self.stages + 1):
            for s in range(self.stages - length + 1):
                if all(linked[s : s + length - 1]):
                    self.tables[s, s + length] = self._table(s, s + length)
        head = self._in_slots(profile.head_peak[DROPPED] - profile.enter[DROPPED, -1])
        self.tables[self.stages, self.top] = np.where(self.slots >= head, 0.0, np.inf)
        for s in reversed(range(self.stages)):
            self.tables[s, self.top] = self._table(s, self.top)

    def __call__(self, budget: int) -> Plan | None:
        """The plan with the fewest recomputed FLOPs in this model; None if none fits."""
        slots = min((budget - self.base) // self.slot_bytes, ROTOR_SLOTS)
        if self.profile.stem_peak > budget or slots < 0 or np.isinf(self.tables[0, self.top][slots]):
            return None
        return self._plan(0, self.top, slots)

    def smallest(self) -> Plan:
        """The plan with the lowest peak in this model."""
        return self._plan(0, self.top, int(np.isfinite(self.tables[0, self.top]).argmax()))

    def _in_slots(self, count: float) -> int:
        return math.ceil(count / self.slot_bytes)

    def _options(self, s: int, end: int) -> Iterator[tuple[int | None, np.ndarray, int]]:
        """(last stage of a dropped group, or None; FLOPs by slots; slots that stay occupied after it)."""
        p, first_run = self.profile, end == self.top
        enter, rerun = p.enter[DROPPED], 0 if first_run else 1
        gradients = 0 if first_run else p.back[DROPPED, end - 1] - enter[end - 1]
        if not first_run and end - s == 1:
            need = max(p.forward_peak[DROPPED, s], p.backward_peak[DROPPED, s]) - enter[s]
            yield None, self._flops(need, p.recompute_flops[s]), 0
            return
        need = max(p.forward_peak[KEPT, s] + gradients, p.backward_peak[KEPT, s]) - p.enter[KEPT, s]
        stays = self._in_slots(p.enter[KEPT, s + 1] - p.enter[KEPT, s])
        yield None, self._flops(need, rerun * p.forward_flops[s]) + self._less(s + 1, end, stays), stays
        need, flops, held = 0.0, 0, 0
        for r in range(s, self.stages if first_run else end - 1):
            need = max(need, p.forward_peak[DROPPED, r] - enter[r] + held + gradients)
            flops += rerun * p.forward_flops[r]
            held = enter[r + 1] - enter[r]
            stays = self._in_slots(held)
            again = self.tables[s, r + 1]
            yield r, self._flops(need, flops) + self._less(r + 1, end, stays) + again, stays
            if not self.linked[r]:
                return

    def _flops(self, need_bytes: float, flops: int) -> np.ndarray:
        return np.where(self.slots >= self._in_slots(need_bytes), float(flops), np.inf)

    def _less(self, s: int, end: int, occupied: int) -> np.ndarray:
        """C(s, end) by the slots there were before `occupied` of them were filled."""
        left = self.slots - occupied
        return np.where(left < 0, np.inf, self.tables[s, end][np.clip(left, 0, ROTOR_SLOTS)])

    def _table(self, s: int, end: int) -> np.ndarray:
        return np.min([flops for _, flops, _ in self._options(s, end)], axis=0)

    def _plan(self, s: int, end: int, slots: int) -> Plan:
        plan = []
        while s < min(end, self.stages):
            last, _, occupied = min(self._options(s, end), key=lambda option: option[1][slots])
            plan.append(s if last is None else self._plan(s, last + 1, slots))
            s = s + 1 if last is None else last + 1
            slots = min(slots - occupied, ROTOR_SLOTS)
        return tuple(plan)


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
    return _nothing("sac_milp", budgets, note)


def _try_profilers(sender, model, images, labels, precision) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed._tools.sac_estimator import SACEstimator

    warnings.simplefilter("ignore")
    name = "MemTracker"
    with _fake_training(model, images, labels, precision) as training:
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
    return _nothing("ckptplan", budgets, f"ckptplan {note}")


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
    in bf16 a ratio gives another choice, and peaks are up to 30 % higher than torch.compile's, so bf16
    figures are no verdict on it.  Inductor's fusion would do without some of the temporaries.  10 to 20
    seconds per ratio for ViT-S.  Raises for batch norms in training mode.
    """
    with _cell(model, images, labels, precision) as cell:
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
            results += _nothing("compiled", [budget], f"smallest swept peak {format_bytes(smallest)}")
    return results


# By name; `compare` runs them all.
PEERS = {
    peer.__name__: peer
    for peer in (none, static, threshold, whole_blocks, rotor, micro_batches, selective, sac_milp, ckptplan)
}


def compare(model, images, labels, precision, budgets: Sequence[int]) -> list[PeerResult]:
    """Every peer at every budget (bytes); about a minute for ViT-S and 10 budgets."""
    return [result for peer in PEERS.values() for result in peer(model, images, labels, precision, budgets)]
