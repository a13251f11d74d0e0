"""The step that every peer is measured on, and what a peer reports of it.

`measured_step` is the one ruler: highest live tensor bytes (`TensorMemory`) and recomputed forward FLOPs of
products (`FlopCounter`, norms left out) of a step on fake CPU tensors, so nothing here needs a GPU or the
memory that it speaks of.  `fake_training` gives the same steps one by one, each as a `Trace` cut at marks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from toolkit import adapt, build_backbone
from toolkit.budget import TensorMemory, format_bytes
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.flops import NORMS, FlopCounter
from toolkit.budget.step import autocast
from toolkit.errors import check_name
from toolkit.methods import set_train_mode

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
IMAGE_SIZES = {"vit_small": 224, "tiny_vit": 224, "resnet18": 224, "demo_vit": 32}  # pixels


@dataclass(frozen=True)
class StepCost:
    """Costs of one training step."""

    peak_bytes: int  # all live tensors: weights, batch, gradients, optimizer state, activations
    forward_flops: int
    recompute_flops: int

    @property
    def recompute_pct(self) -> float:
        """Recomputed in percent of the forward pass."""
        return 100 * self.recompute_flops / self.forward_flops


@dataclass(frozen=True)
class PeerResult:
    """The result of one peer for one budget."""

    peer: str
    budget_bytes: int
    peak_bytes: int | None  # None where the peer offers nothing
    recompute_pct: float | None  # recomputed FLOPs in percent of the forward pass
    held: bool
    note: str = ""


def result_of(peer: str, budget: int, cost: StepCost) -> PeerResult:
    """A step of this cost as the answer to this budget."""
    return PeerResult(peer, budget, cost.peak_bytes, cost.recompute_pct, cost.peak_bytes <= budget)


def nothing(peer: str, budgets: Sequence[int], note: str) -> list[PeerResult]:
    """No step for any of these budgets, and why."""
    return [PeerResult(peer, budget, None, None, False, note) for budget in budgets]


def smallest_note(cost: StepCost) -> str:
    """Why not, where even the smallest peak that was run is too high."""
    return f"smallest feasible peak {format_bytes(cost.peak_bytes)}"


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
    with fake_training(model, images, labels, precision) as training, setup():
        training.step(micro_batch=micro_batch)
        return training.step(micro_batch=micro_batch).cost


@dataclass(frozen=True)
class Mark:
    """A moment of a step."""

    name: str
    live_bytes: int  # then
    peak_bytes: int  # since the mark before
    forward_flops: int  # so far
    recompute_flops: int  # so far


class Trace:
    """Peaks and FLOPs of one step, cut at marks."""

    def __init__(self, memory: TensorMemory, counter: FlopCounter):
        self.memory, self.counter = memory, counter
        self.marks: list[Mark] = []

    def mark(self, name: str) -> None:
        """End a stretch of the step here and begin the next."""
        flops = (product_flops(self.counter, phase) for phase in ("forward", "recompute"))
        self.marks.append(Mark(name, self.memory.allocated_bytes, self.memory.peak_bytes, *flops))
        self.memory.reset_peak()

    @property
    def cost(self) -> StepCost:
        """Costs of the whole step, after it has ended."""
        last = self.marks[-1]
        return StepCost(max(m.peak_bytes for m in self.marks), last.forward_flops, last.recompute_flops)


class Training:
    """A model with its optimizer; `step` is `toolkit.training.loop`'s, without reading the loss."""

    def __init__(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str):
        self.model, self.images, self.labels, self.precision = model, images, labels, precision
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def step(
        self,
        around: Callable[[Trace], AbstractContextManager] = nullcontext,
        *,
        forward: Callable[[torch.Tensor], torch.Tensor] | None = None,
        micro_batch: int | None = None,
        slices: int | None = None,
    ) -> Trace:
        """One step inside `around(trace)`, with `forward` (default: the model) as the network.

        `slices`: number of micro-batches to run; from the second on, each repeats the one before.
        """
        forward = self.model if forward is None else forward
        micro = micro_batch or len(self.labels)
        memory = TensorMemory(CPU)
        memory.track([*self.model.parameters(), *self.model.buffers()])
        memory.track(value for state in self.optimizer.state.values() for value in state.values())
        memory.reset_peak()
        with memory, FlopCounter() as counter:
            trace = Trace(memory, counter)
            with around(trace):
                parts = zip(self.images.split(micro), self.labels.split(micro))
                for x, y in itertools.islice(parts, slices):
                    memory.track([x, y])
                    with autocast(CPU, self.precision):
                        logits = forward(x)
                        loss = F.cross_entropy(logits, y) * (len(y) / len(self.labels))
                        trace.mark("loss")  # autocast's cached weights die on leaving it
                    trace.mark("backward")
                    loss.backward()
                    del x, y, logits, loss  # a plain loop's names live until then
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            trace.mark("end")
        return trace


@contextlib.contextmanager
def fake_training(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str
) -> Iterator[Training]:
    """Steps of `model`, which holds fake tensors inside; the optimizer begins without state."""
    with on_fake_tensors(model, (images, labels)) as (fake_images, fake_labels):
        yield Training(model, fake_images, fake_labels, precision)
