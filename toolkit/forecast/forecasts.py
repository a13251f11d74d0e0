"""Forecasts of experiments before they run: memory, time, and which cards they fit.

`forecast` predicts one training step, `what_fits` compares methods and backbones, `batch.dry_run` predicts
all runs of a sweep.  Weights are random and tensors fake: nothing is downloaded or trained.  Answers are kept
on disk until the code that made them changes.  Bytes count tensors: the context of a GPU needs additional
memory.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from toolkit.budget import Plan, Planner, format_bytes, parse_bytes
from toolkit.budget.solver import Chain
from toolkit.cache import kept
from toolkit.datasets import find_dataset, load_dataset
from toolkit.errors import InputError, one_line
from toolkit.experiment import Experiment
from toolkit.files import CACHE, digest
from toolkit.forecast.step import AtLimit, Step, StepCost, step_of, step_under
from toolkit.measure.environment import PACKAGES, code_sha256, device_name, installed_packages
from toolkit.methods import METHODS
from toolkit.model import check_fits_weights
from toolkit.training.progress import live_notebook
from toolkit.training.step import held_bytes

FORECASTS = CACHE / "forecasts"
SHOWN_BACKBONES = ("demo_vit", "vit_small", "tiny_vit", "vim_small", "mambavision_t")

DETECTORS = "the memory of a detector depends on the boxes in its images: it is measured, not predicted"
_FAILURES = (InputError, RuntimeError)  # these would end a run, too


@dataclass(frozen=True)
class Forecast:
    """The predicted memory and time of an experiment's training step.

    A run that would be refused has a `reason` and no `peak_bytes`; so has a detector, which runs nevertheless
    (`DETECTORS`).  A run that exceeds its budget has both: it runs, because only "planned" keeps budgets.
    """

    budget_bytes: int
    peak_bytes: int | None = None  # predicted for all full batches, including the first
    smallest_bytes: int | None = None  # smallest budget with a plan, if "planned" is refused
    recompute_pct: float | None = None  # percentage of the forward pass's FLOPs
    step_seconds: float | None = None  # the planner's estimate; on a CPU for its reference device
    micro_batch_size: int | None = None  # images per forward pass
    reason: str | None = None  # why the budget is not kept, or the model not built

    @classmethod
    def of_plan(cls, plan: Plan) -> Forecast:
        """The forecast of a plan that keeps its budget."""
        return cls(
            plan.budget_bytes, int(plan.peak_bytes), None, float(plan.recompute_pct),
            float(plan.plain_seconds + plan.extra_seconds), plan.micro_batch_size,
        )  # fmt: skip

    def explain(self) -> str:
        """The prediction in words."""
        if self.peak_bytes is None:
            return f"no prediction: {self.reason}"
        return (
            f"{self.micro_batch_size} images per pass\n"
            f"predicted peak {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}\n"
            f"recomputed {self.recompute_pct:.1f} % of the forward pass"
        )

    @property
    def fits(self) -> bool:
        """Whether the step is predicted to stay within the budget."""
        return self.reason is None

    @property
    def refused(self) -> bool:
        """Whether the run would end before its first step."""
        return self.peak_bytes is None and self.reason != DETECTORS


def forecast(experiment: Experiment, num_classes: int, folder: Path = FORECASTS) -> Forecast:
    """The forecast of `experiment` on images of `num_classes` classes; `folder`: where it is kept.

    An experiment that cannot be built, adapted or planned has a `reason`; nothing is raised.
    """
    return forecasts([experiment], lambda _: num_classes, folder)[0]


def preview(experiment: Experiment, num_classes: int) -> str:
    """A forecast in words where a person waits for it; in batch, where seconds count, how to get one."""
    if not live_notebook():
        return "not predicted in batch; `python -m toolkit sweep --dry-run` does that for a whole sweep"
    return forecast(experiment, num_classes).explain()


def forecasts(
    experiments: Sequence[Experiment],
    num_classes_of: Callable[[str], int] | Mapping[str, int],
    folder: Path = FORECASTS,
    tell: Callable[[Experiment, Forecast], None] = lambda experiment, found: None,
) -> list[Forecast]:
    """`forecast` of each, in order; `num_classes_of`: data set -> number of classes.

    `tell` is called with each as soon as it is made.  Experiments that differ in budget, strategy, seed or
    schedule only share one profile.
    """
    classes = num_classes_of.__getitem__ if isinstance(num_classes_of, Mapping) else num_classes_of
    by_step: dict[str, tuple[TrainingStep, list[int]]] = {}
    for place, e in enumerate(experiments):
        step = TrainingStep(e, classes(e.dataset))
        by_step.setdefault(digest(step.key), (step, []))[1].append(place)
    found: dict[int, Forecast] = {}
    with tqdm(total=len(experiments), desc="forecasts", unit="run", leave=False) as bar:
        while by_step:  # one at a time, so that only one model is in memory
            step, places = by_step.pop(next(iter(by_step)))
            for place in places:
                bar.set_description(experiments[place].describe().split(",")[0], refresh=False)
                found[place] = step.forecast(experiments[place], folder)
                tell(experiments[place], found[place])
                bar.update()
    return [found[place] for place in range(len(experiments))]


class TrainingStep:
    """A training step of `experiment` and of all that differ in budget, strategy, seed or schedule.

    Built and profiled when first needed.
    """

    def __init__(self, experiment: Experiment, num_classes: int):
        if num_classes < 1:
            raise InputError(f"num_classes must be at least 1, got {num_classes}.")
        self.experiment, self.num_classes = experiment, num_classes
        self._ran: dict[int, list[StepCost]] = defaultdict(list)  # by images per pass

    @property
    def key(self) -> dict:
        """The cache key of its profile: everything that the profile depends on."""
        e = self.experiment
        return made_by() | {
            "backbone": e.backbone,
            "head": e.head,
            "pixels": e.resolution or find_dataset(e.dataset).image_pixels,
            "cached_features": bool(e.feature_cache),
            "method": e.method,
            **e.method_options,
            "batch_size": e.batch_size,
            "precision": e.precision,
            "num_classes": self.num_classes,
            "device": e.device if e.device == "cpu" else device_name(e.device),
        }

    def key_of(self, e: Experiment) -> dict:
        """The cache key of the forecast of `e`; its seed, learning rate and epochs do not matter."""
        own = {"strategy": e.checkpointing, **asdict(e.strategy)}
        return self.key | own | {"budget": e.budget, "micro_batch": e.micro_batch_size}

    def forecast(self, e: Experiment, folder: Path) -> Forecast:
        """The forecast of `e`, which has this step, from `folder` if it is kept there."""
        if e.task == "detection":
            return Forecast(e.budget_bytes, reason=DETECTORS)
        try:
            return Forecast(**kept(folder, self.key_of(e), lambda: asdict(self._forecast(e))))
        except _FAILURES as error:
            return Forecast(e.budget_bytes, reason=one_line(error))

    def smallest(self, folder: Path) -> tuple[dict[str, int | None], str]:
        """The smallest budgets of "none" and "planned", from `folder` if kept there, or why not."""

        def make() -> dict[str, int]:
            plain = self._rule_step(self.experiment.batch_size, math.inf)
            return {"none": plain.peak_bytes, "planned": self.smallest_bytes(0)}

        try:
            return kept(folder, self.key | {"strategy": "smallest"}, make), ""
        except _FAILURES as error:
            return {"none": None, "planned": None}, one_line(error)

    def smallest_bytes(self, micro_batch_size: int) -> int:
        """The smallest budget with a plan in micro-batches of this size (0: any size).

        If batch norms compute statistics, the batch stays whole.
        """
        whole = self.experiment.batch_size
        if micro_batch_size:
            return self.planner.smallest_bytes(min(micro_batch_size, whole))
        pieces = {whole}  # may need less than micro-batches, whose gradients accumulate
        if not self.chain(whole).profile.batch_statistics:
            pieces.add(1)
        return min(map(self.planner.smallest_bytes, pieces))

    def plain_memory(self) -> tuple[int, ...]:
        """Allocated bytes at every operator of the step without checkpointing."""
        return self._rule_step(self.experiment.batch_size, math.inf).memory_bytes

    def of_images(self, images: int) -> TrainingStep:
        """The same model's step with a batch of another size."""
        if images == self.experiment.batch_size:
            return self
        other = TrainingStep(
            replace(self.experiment, batch_size=images, micro_batch_size=0), self.num_classes
        )
        # Empty, because zeros would touch the memory.
        batch = tuple(part.new_empty(images, *part.shape[1:]) for part in self.step.batch)
        other.step = replace(self.step, batch=batch)
        return other

    @cached_property
    def step(self) -> Step:
        with _models_own_errors("built"):
            return step_of(self.experiment, self.num_classes)

    def chain(self, images: int) -> Chain:
        """The profile of a step on `images` images of the batch."""
        with _models_own_errors("profiled"):
            return self.planner.chain(images, False)

    @cached_property
    def planner(self) -> Planner:
        return Planner(
            self.step.model, self.step.batch, loss=self.step.loss, optimizer=self.step.optimizer,
            precision=self.experiment.precision, held_bytes=self._held_bytes(plans=True),
        )  # fmt: skip

    def _held_bytes(self, plans: bool) -> int:
        return held_bytes(self.step.model, self.step.hooks, plans)

    def _forecast(self, e: Experiment) -> Forecast:
        check_fits_weights(self.step.whole, e.budget_bytes)
        if not e.strategy.plans:
            return self.by_rule(e)
        self.chain(min(e.micro_batch_size or e.batch_size, e.batch_size))
        try:
            plan = self.planner.plan(e.budget_bytes, micro_batches=e.micro_batch_size or True)
        except InputError as error:
            smallest = self.smallest_bytes(e.micro_batch_size)
            return Forecast(e.budget_bytes, smallest_bytes=smallest, reason=one_line(error))
        return Forecast.of_plan(plan)

    def by_rule(self, e: Experiment) -> Forecast:
        """The forecast of `e`, which has this step and a strategy that does not plan."""
        held = self._held_bytes(plans=False)
        size = e.micro_batch_size or e.batch_size
        chain = self.chain(size)
        ran = self._step_under(e, size, held)
        # A strategy sees less in the very first step, without the optimizer's and the method's state, and
        # more in all but the first micro-batch of a step: the gradients of those before.
        besides = [0, -chain.profile.fixed["optimizer"] - held]
        if size < e.batch_size:
            besides += [beside + chain.profile.fixed["gradients"] for beside in besides]
        peak = max(self._step_under(e, size, held + beside).peak_bytes + beside for beside in besides)
        passes = 3 + ran.recompute_pct / 100  # forward and backward together count as three
        ops = round(len(chain.profile.ops) * passes / 3)
        seconds = self.planner.speed.step_seconds(passes * chain.plain_seconds, ops)
        above = f"predicted {format_bytes(peak)}, above the budget of {format_bytes(e.budget_bytes)}"
        return Forecast(
            e.budget_bytes, peak, None, ran.recompute_pct, math.ceil(e.batch_size / size) * seconds, size,
            above if peak > e.budget_bytes else None,
        )  # fmt: skip

    def _step_under(self, e: Experiment, size: int, extra_bytes: int) -> StepCost:
        """A step of `size` images under the strategy of `e`, which sees `extra_bytes` besides tensors."""
        limit = e.strategy.limit_bytes(e.budget_bytes)
        if limit is not None:
            return self._rule_step(size, limit - extra_bytes)
        with _models_own_errors("profiled"):
            part, precision = self._part(size), self.experiment.precision
            return step_under(part, precision, e.strategy, e.budget_bytes, extra_bytes)

    def _rule_step(self, size: int, limit: float) -> StepCost:
        """A step of `size` images whose blocks are checkpointed from this limit on."""
        for ran in self._ran[size]:
            if ran.above < limit <= ran.up_to:
                return ran
        with _models_own_errors("profiled"):
            self._ran[size].append(step_under(self._part(size), self.experiment.precision, AtLimit(limit)))
        return self._ran[size][-1]

    def _part(self, size: int) -> Step:
        return replace(self.step, batch=tuple(tensor[:size] for tensor in self.step.batch))


def what_fits(
    budgets: Iterable[int | str],
    backbones: Iterable[str] = SHOWN_BACKBONES,
    methods: Iterable[str] = tuple(name for name, m in METHODS.items() if "classification" in m.tasks),
    *,
    batch_size: int = 64,
    precision: str = "bf16",
    num_classes: int = 100,
    folder: Path = FORECASTS,
) -> pd.DataFrame:
    """The smallest budget in which a step of each backbone and method runs, without and with a plan.

    Columns: `backbone`, `method`; `strategy`: none (whole batch, nothing checkpointed) or planned (in
    micro-batches if batch norms allow them); `smallest_bytes`, `card` (the smallest of `budgets` that is
    large enough, an ordered categorical; missing if none is), and the `reason` if there is no number.
    """
    limits = sorted(set(map(parse_bytes, budgets)))
    cards = [f"{limit / 1e9:g} GB" for limit in limits]
    rows = []
    with tqdm([(b, m) for b in backbones for m in methods], unit="step", leave=False) as bar:
        for backbone, method in bar:
            bar.set_description(f"{method} on {backbone}", refresh=False)
            e = Experiment(backbone=backbone, method=method, batch_size=batch_size, precision=precision)
            found, reason = TrainingStep(e, num_classes).smallest(folder)
            for strategy, smallest in found.items():
                holds = [card for card, limit in zip(cards, limits) if smallest and smallest <= limit]
                rows.append((backbone, method, strategy, smallest, next(iter(holds), None), reason))
    frame = pd.DataFrame(rows, columns=["backbone", "method", "strategy", "smallest_bytes", "card", "reason"])
    return frame.astype({"smallest_bytes": "Int64", "card": pd.CategoricalDtype(cards, ordered=True)})


def classes_of(dataset: str) -> int:
    """The number of classes of a data set, without a download where it is published."""
    entry = find_dataset(dataset)
    return entry.classes if entry.train_images is not None else len(load_dataset(dataset).classes)


def made_by() -> dict:
    """Versions of the code that makes the answers."""
    packages = {name: installed_packages().get(name) for name in (*PACKAGES, "open_clip_torch")}
    return {"packages": packages, "code_sha256": code_sha256()}


@contextlib.contextmanager
def _models_own_errors(done: str) -> Iterator[None]:
    """Raise every error of a model's code as an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the model cannot be {done}: {type(error).__name__}: {error}") from error
