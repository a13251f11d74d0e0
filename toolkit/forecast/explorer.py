"""The effect of any budget on an experiment's training step, before anything trains.

`Explorer` answers for every budget; `widgets.BudgetExplorer` is its slider.  Answers are kept on disk: a step
is profiled only once.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm.auto import tqdm

from toolkit.budget import STRATEGIES, Plan, format_bytes, parse_bytes
from toolkit.budget.memory import CARDS_BYTES
from toolkit.cache import kept
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.files import CACHE, NOTEBOOKS, write_atomically
from toolkit.forecast.forecasts import Forecast, TrainingStep, classes_of
from toolkit.measure import Nvml, SensorError
from toolkit.measure.memory import context_bytes

ANSWERS = CACHE / "explorer"
CONTEXT_BYTES = 500 * 2**20  # of CUDA, where it cannot be measured
FRAGMENTED = 0.05  # of what the context leaves
STOPS = 40  # positions of the slider
_MOMENTS = 1500  # resolution of a picture


@dataclass(frozen=True)
class BlockUse:
    """The work of one block in a planned step."""

    name: str
    kind: str  # keep, recompute norms and cheap operators, ...
    kept_bytes: int  # for the backward pass
    recompute_pct: float  # recomputed FLOPs as a percentage of the block's own
    slices: int  # number of slices of its batch


@dataclass(frozen=True)
class StepPicture:
    """The data of a picture of a planned step."""

    budget_bytes: int
    fixed_bytes: int  # weights, batch, optimizer state
    memory_bytes: list[int]  # highest bytes at each moment
    without_bytes: list[int]  # the same of the step without checkpointing
    blocks: list[BlockUse]


def picture_of(plan: Plan, without_bytes: Sequence[int] = ()) -> StepPicture:
    """The picture of `plan`; `without_bytes`: memory at each operator of the step without checkpointing."""
    blocks = []
    for name, option in zip(plan.segments, plan.options):
        if not name:
            continue
        kind = plan.levels[name].split(" (")[0].split(", in ")[0]
        flops = sum(op.flops for op in option.segment.ops)
        recompute_pct = 100 * option.level.flops / flops if option.level.flops else 0.0
        blocks.append(BlockUse(name, kind, int(option.kept), recompute_pct, option.slices))
    return StepPicture(
        plan.budget_bytes - plan.reserve_bytes,
        sum(plan.fixed.get(kind, 0) for kind in ("weights", "batch", "optimizer")),
        _few(plan.memory),
        _few(without_bytes),
        blocks,
    )


def _few(values: Sequence[int]) -> list[int]:
    """At most `_MOMENTS` values, each the maximum of its neighbours."""
    values = np.asarray(values, np.int64)
    if len(values) > _MOMENTS:
        starts = np.linspace(0, len(values), _MOMENTS, endpoint=False).astype(int)
        values = np.maximum.reduceat(values, starts)
    return values.tolist()


def kinds_of(pictures: Sequence[StepPicture]) -> list[str]:
    """All kinds of blocks in these pictures, from keeping everything to recomputing the most."""
    kinds = {block.kind for picture in pictures for block in picture.blocks}
    return sorted(kinds, key=lambda kind: (kind != "keep", len(kind)))


class Explorer:
    """All plans of one training step of `experiment` on images of `num_classes` classes (0: of its data set).

    Weights are random and tensors fake: no download, and no memory except for the weights and one batch.  The
    experiment's own budget and checkpointing are ignored.  Budgets are bytes or text like "2GB", and hold
    tensors only: the context of a GPU needs additional memory.  `folder`: where answers are kept.  Raises
    `InputError` for a model that cannot be built, adapted or profiled.
    """

    def __init__(self, experiment: Experiment, num_classes: int, folder: Path = ANSWERS):
        self.experiment = experiment.variant(checkpointing="planned")
        self.num_classes, self.folder = num_classes or classes_of(experiment.dataset), folder
        # With the options that `experiment` has for its own strategy.
        self._by_rule = [
            experiment.variant(checkpointing=name)
            for name, strategy in STRATEGIES.items()
            if not strategy.plans
        ]
        self._training = TrainingStep(self.experiment, self.num_classes)
        self._answers: dict[int, tuple[pd.DataFrame, StepPicture]] = {}  # by budget
        self._range = tuple(self._kept("range", self._find_range))
        for stop in tqdm(self.stops, desc="budgets", unit="budget", leave=False):
            self._answer(stop)

    def range(self) -> tuple[int, int]:
        """Bytes of the smallest budget with a plan, and of the step without checkpointing."""
        return self._range

    @property
    def stops(self) -> list[int]:
        """Budgets for a slider: evenly spaced logarithms over the range, and the cards of 2, 4, 6, 8 GB."""
        low, high = self._range
        cards = [card for card in CARDS_BYTES if low <= card <= high]
        return sorted({*map(int, np.ceil(np.geomspace(low, high, STOPS))), *cards})

    def on_card(self, card: int | str) -> str:
        """Whether a card with this much memory holds the step, in a sentence, with the budget to choose.

        A GPU that is here tells the bytes of its context; otherwise `CONTEXT_BYTES` are assumed.  A part of
        the rest, `FRAGMENTED`, is left to the allocator.
        """
        context, source = _context_bytes()
        left = int((parse_bytes(card) - context) * (1 - FRAGMENTED))
        low, high = self._range
        e = self.experiment
        step = f"{e.method} on {e.backbone} in batches of {e.batch_size} with {self.num_classes} classes"
        takes = (
            f"it takes {format_bytes(high)} without checkpointing and at least {format_bytes(low)} planned"
        )
        room = (
            f"{format_bytes(context)} are the CUDA context ({source}), {FRAGMENTED:.0%} are for fragmentation"
        )
        if left < low:
            return f"A card of {card} does not hold {step}: {takes}; {room}. Take smaller batches."
        how = "as it is" if left >= high else f"by computing {self.plan(left).recompute_pct:.0f} % again"
        return f"A card of {card} holds {step}, {how}: {takes}; {room}. Budget: {format_bytes(left)}."

    def plan(self, budget: int | str) -> Plan:
        """The fastest plan, in micro-batches where these are faster.  Raises `InputError` if nothing fits."""
        micro_batches = self.experiment.micro_batch_size or True
        return self._training.planner.plan(parse_bytes(budget), micro_batches=micro_batches)

    def table(self, budget: int | str) -> pd.DataFrame:
        """One row per strategy: strategy, budget_bytes, peak_bytes (predicted), recompute_pct (of the
        forward pass's FLOPs), step_seconds (estimated), micro_batch_size, within_budget.

        Only "planned" chooses its micro-batches; the others take the experiment's, if it has any.
        """
        return self._answer(parse_bytes(budget))[0]

    def curve(self, budget: int | str) -> pd.DataFrame:
        """The planned rows of `table` at all stops, and the rows of the other strategies at `budget`."""
        planned = [self.table(stop)[-1:] for stop in self.stops]
        return pd.concat([*planned, self.table(budget)[:-1]], ignore_index=True)

    def summary(self, budget: int | str) -> pd.DataFrame:
        """`table` with formatted values."""
        table = self.table(budget)
        return pd.DataFrame(
            {
                "strategy": table.strategy,
                "predicted peak": table.peak_bytes.map(format_bytes),
                "recomputed": table.recompute_pct.map("{:.1f} %".format),
                "step, estimated": (1000 * table.step_seconds).map("{:.1f} ms".format),
                "images per pass": table.micro_batch_size,
                "within budget": table.within_budget.map({True: "yes", False: "no"}),
            }
        )

    def picture(self, budget: int | str) -> StepPicture:
        """Memory over the planned step, and the work of each block."""
        return self._answer(parse_bytes(budget))[1]

    @property
    def kinds(self) -> list[str]:
        """All kinds of blocks in the pictures so far, including those of all stops."""
        return kinds_of([picture for _, picture in self._answers.values()])

    def write(self, budget: int | str, path: Path) -> str:
        """Write the experiment with this budget to `path`; returns the command that runs it.

        The file holds the parameters of `1_finetune.ipynb`, in the YAML that papermill reads.  Raises
        `InputError` if no plan fits the budget, or `path` is a folder.
        """
        path = Path(path).resolve()
        if path.is_dir():
            raise InputError(f"parameters cannot be written to {path}: it is a folder; name a file in it.")
        size = parse_bytes(budget)
        self._answer(size)
        chosen = replace(self.experiment, budget=size)
        # Not json.dumps: it writes 5e-05, which YAML takes for text.
        write_atomically(path, yaml.safe_dump(chosen.to_dict(), sort_keys=False).encode())
        notebook, output = NOTEBOOKS / "1_finetune.ipynb", path.with_suffix(".ipynb")
        return shlex.join(["papermill", str(notebook), str(output), "-f", str(path)])

    def batch_sizes(self) -> pd.DataFrame:
        """Peaks by the number of images in one pass: strategy, images, peak_bytes.

        "planned" is the smallest peak of any plan.  Sizes are 1 (2 if a batch norm uses statistics of the
        batch), the experiment's, and the size at which plans exceed 8 GB.  In between, linear interpolation
        is an upper bound: the first images may fit into memory that gradients need anyway.
        """
        rows = self._kept("batch sizes", self._batch_sizes)
        frame = pd.DataFrame(rows, columns=["strategy", "images", "peak_bytes"])
        return frame.sort_values("images", kind="stable", ignore_index=True)

    def images_that_fit(self) -> pd.DataFrame:
        """Images in one pass on cards of 2, 4, 6 and 8 GB, one row per strategy.

        Interpolated linearly between the rows of `batch_sizes`, so at least as many fit.
        """
        return pd.DataFrame(
            {
                strategy: {
                    f"{card // 10**9} GB": int(np.interp(card, rows.peak_bytes, rows.images, left=0))
                    for card in CARDS_BYTES
                }
                for strategy, rows in self.batch_sizes().groupby("strategy", sort=False)
            }
        ).T

    def _batch_sizes(self) -> list[tuple[str, int, int]]:
        smallest = 2 if self._training.chain(self.experiment.batch_size).profile.batch_statistics else 1
        size = max(self.experiment.batch_size, 8)
        with tqdm(total=3, desc="batch sizes", unit="size", leave=False) as bar:
            low, high = self._peaks(smallest, bar), self._peaks(size, bar)
            growth = (high[-1][2] - low[-1][2]) / (size - smallest)  # of the last row, which is "planned"
            largest = math.ceil(size + (1.01 * CARDS_BYTES[-1] - high[-1][2]) / growth)
            return low + high + (self._peaks(largest, bar) if largest > size else [])

    def _peaks(self, images: int, bar: tqdm) -> list[tuple[str, int, int]]:
        """A row of `batch_sizes` for each strategy, the planned one last."""
        training = self._training.of_images(images)
        e = replace(self.experiment, batch_size=images, micro_batch_size=0)  # all images in one pass
        peaks = {
            strategy: training.by_rule(e.variant(checkpointing=strategy)).peak_bytes
            for strategy in ("none", "static")
        }
        peaks["planned"] = training.planner.smallest_bytes()
        bar.update()
        return [(strategy, images, peak) for strategy, peak in peaks.items()]

    def _find_range(self) -> tuple[int, int]:
        plain = self._training.by_rule(self.experiment.variant(checkpointing="none"))
        smallest = self._training.smallest_bytes(self.experiment.micro_batch_size)
        return smallest, max(smallest, plain.peak_bytes)

    def _answer(self, size: int) -> tuple[pd.DataFrame, StepPicture]:
        """The table and the picture of a budget, from disk if they are kept there."""
        if size not in self._answers:
            rows, picture = self._kept(size, lambda: self._find(size))
            picture["blocks"] = [BlockUse(**block) for block in picture["blocks"]]
            self._answers[size] = pd.DataFrame(rows), StepPicture(**picture)
        return self._answers[size]

    def _find(self, size: int) -> tuple[list[dict], dict]:
        plan = self.plan(size)
        rows = [_row(e, self._training.by_rule(replace(e, budget=size))) for e in self._by_rule]
        rows.append(_row(self.experiment, Forecast.of_plan(plan)))
        return rows, asdict(picture_of(plan, self._training.plain_memory()))

    def _kept(self, asked: str | int, make: Callable) -> list:
        """The answer to a question about this step; it does not depend on the experiment's own budget."""
        question = {
            **self._training.key,
            "asked": asked,
            "micro_batch_size": self.experiment.micro_batch_size,
            "strategies": {e.checkpointing: asdict(e.strategy) for e in self._by_rule},
        }
        return kept(self.folder, question, lambda: {"found": make()})["found"]


def _context_bytes() -> tuple[int, str]:
    """Bytes of a CUDA context, and whether they are measured."""
    device = torch.device("cuda")
    with contextlib.suppress(SensorError):
        if torch.cuda.is_available():
            torch.zeros(1, device=device)  # makes the context
            return context_bytes(Nvml.of(device), device), "measured"
    return CONTEXT_BYTES, "assumed"


def _row(experiment: Experiment, forecast: Forecast) -> dict:
    """A row of `Explorer.table`."""
    shown = ("budget_bytes", "peak_bytes", "recompute_pct", "step_seconds", "micro_batch_size")
    figures = {name: getattr(forecast, name) for name in shown}
    return {"strategy": experiment.checkpointing} | figures | {"within_budget": forecast.fits}
