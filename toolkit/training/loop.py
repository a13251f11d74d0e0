"""`fit()`: a plain training loop.

What happens to the model in a step is in `step`.  Here are epochs and validation, snapshots (on the CPU a
killed run continues bit for bit), pauses, and the ways in which a run can end: each is a result with a
status, not a lost run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from toolkit.backbones import data_config
from toolkit.budget import device_memory, is_out_of_memory
from toolkit.datasets import Splits, loader
from toolkit.datasets.tasks import TASKS
from toolkit.errors import FileError, InputError
from toolkit.experiment import Experiment
from toolkit.measure import Meter, SensorError
from toolkit.measure.environment import environment
from toolkit.measure.memory import context_bytes
from toolkit.methods import adapt, check_batch_norms, set_train_mode
from toolkit.methods.weights import trained_state, weights_sha256
from toolkit.model import build_model, check_fits_weights, seed_everything
from toolkit.training.evaluation import evaluate
from toolkit.training.feature_cache import CachedFeatures, cached_features
from toolkit.training.progress import Plain, Progress, ProgressView, View
from toolkit.training.result import FitResult, RunWindows
from toolkit.training.resume import Interrupt, Snapshots, claim
from toolkit.training.step import NotFinite, Steps, rng_state, set_rng_state

SNAPSHOT_FORMAT = 8  # of `_Run.state`


def fit(
    model: nn.Module,
    splits: Splits,
    experiment: Experiment,
    *,
    folder: Path | None = None,
    snapshot_seconds: float = 5.0,
    workers: int | None = None,
    meter: Meter | None = None,
    view: View | None = None,
    skip_changed: bool = False,
) -> FitResult:
    """Train `model` on `splits.train` as `experiment` says; validate after each epoch.

    The optimizer is the method's, AdamW unless it has its own (norms and biases without weight decay), with
    linear warm-up, a cosine to zero, and the loss of `splits.task`.  With `experiment.feature_cache` the
    frozen features are computed once, from images without augmentation, and the steps train on them: on a GPU
    without the backbone, which waits in the host's memory, so on the CPU, where this is the same memory, the
    peak leaves it out too.

    With a `folder`, the state is saved there every `snapshot_seconds` or 5 % of the steps, whichever is less
    (but at most for 2 % of the time, unless more than a minute could be lost), and a run that finds a
    snapshot continues from it.  Time and energy are those of `meter` (default: a new one); what a killed
    process measured after its last snapshot is lost together with the steps themselves.

    `view` shows the run (default: `progress.Plain`) and may pause it between two steps: its memory stays
    allocated, and the wait is measured in the window "pause" only.

    Where an image's file has changed since the data set was checked, the run saves its state and ends as
    interrupted; with `skip_changed` it goes on without the image and counts it.

    Under a plan nothing starts that cannot fit, and a step that runs out of memory all the same is repeated,
    with the same random numbers, on a tighter plan; the batch never changes.  Otherwise out of memory, a loss
    that is not finite, and an interrupt (Ctrl-C, SIGTERM, SIGUSR1, Jupyter's stop button, the view's; at the
    end of the step) end the run with that status.  Raises `InputError` if the weights exceed the budget, no
    plan fits it, a batch norm that updates its statistics would meet a single value, or another process
    trains in `folder`.
    """
    check_fits_weights(model, experiment.budget_bytes)
    check_batch_norms(model, batch_sizes(experiment, len(splits.train)), data_config(model)["input_size"])
    total_steps = experiment.epochs * math.ceil(len(splits.train) / experiment.batch_size)
    snapshots = Snapshots(folder, snapshot_seconds, total_steps)
    interrupt = Interrupt()
    with claim(folder), ProgressView(view or Plain(), interrupt) as screen:
        data = {"workers": workers, "skip_changed": skip_changed}
        run = _Run(model, splits, experiment, snapshots, data, meter or Meter(experiment.device))
        with interrupt:
            run.end_well(screen, interrupt)
        run.result.windows = run.windows.totals()
        _read_context(run.result, run.meter)
        run.restore_model()
        screen.end(run.ending())
        return run.result


def train(experiment: Experiment, splits: Splits, **options: object) -> tuple[nn.Module, FitResult]:
    """Build, adapt and fit the model of `experiment`: the chain of `1_finetune.ipynb` in one call.

    `options`: further arguments of `fit`.
    """
    seed_everything(experiment.seed)
    model = build_model(experiment, len(splits.classes))
    model = adapt(model, experiment.method, **experiment.method_options)
    return model, fit(model, splits, experiment, **options)


class _Stopped(Exception):
    """A stop is requested, or what the message says prevents the next step; the state can be saved."""


@dataclass
class _Sums:
    """Sums over training images."""

    loss: float = 0.0
    hits: float = 0.0  # right answers
    images: int = 0

    def add(self, loss: float, hits: float, images: int) -> None:
        """Add a batch with its mean loss."""
        self.loss += loss * images
        self.hits += hits
        self.images += images


class _Run:
    """The state of one training run; what must survive a kill goes through `state()`."""

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        experiment: Experiment,
        snapshots: Snapshots,
        data: dict,
        meter: Meter,
    ):
        self.model, self.splits, self.experiment = model, splits, experiment
        self.snapshots, self.data, self.meter = snapshots, data, meter
        self.windows = RunWindows(meter)
        self.device = torch.device(experiment.device)
        self.memory = device_memory(self.device)
        self.task = TASKS[splits.task]
        self.data_config = data_config(model)
        self.features: CachedFeatures | None = None
        self.steps: Steps | None = None  # made by `prepare`
        self.steps_per_epoch = math.ceil(len(splits.train) / experiment.batch_size)
        self.total_steps = self.steps_per_epoch * experiment.epochs
        self.result = FitResult(
            status="ok",
            memory_source=self.memory.kind,
            weights_sha256=weights_sha256(model),
            idle_watts=meter.idle_watts,
            environment=environment(self.device.type),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self.epoch_sums = _Sums()
        self.unreported = _Sums()  # of the steps since the last progress

    def end_well(self, screen: ProgressView, interrupt: Interrupt) -> None:
        """Prepare and train; whatever may end a run becomes its status."""
        try:
            self.prepare()
            with self.steps.checkpointing(*self.blank_batch(), self.result):
                interrupt.deferred = True
                self.train(screen)
        except KeyboardInterrupt:
            if interrupt.deferred or not interrupt.wanted:
                raise
            self.result.status = "interrupted"
        except NotFinite as error:
            self.result.status, self.result.error = "nan", str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.result.status, self.result.error = "oom", str(error).split("\n")[0]
            self.result.read_peaks(self.memory)
        if self.result.status == "interrupted" and interrupt.wanted and not self.result.error:
            self.result.error = f"stopped by {interrupt.signal.name}"

    def prepare(self) -> None:
        """Put everything on the device and continue from the newest snapshot, if there is one."""
        self.model.to(self.device)
        stepped = self._cache_features() if self.experiment.feature_cache else self.model
        self.steps = Steps(self.model, stepped, self.task, self.experiment, self.memory, self.total_steps)
        torch.manual_seed(self.experiment.seed)
        self._resume()
        self.steps.track()

    def _cache_features(self) -> nn.Module:
        """Compute the frozen features and free the device of the backbone; returns the part that trains.

        Computing features is not part of training, as validation is not.
        """
        self.features = cached_features(
            self.model, self.splits, budget_bytes=self.experiment.feature_cache,
            batch_size=self.experiment.batch_size, precision=self.experiment.precision, meter=self.meter,
        )  # fmt: skip
        self.windows.earlier["features"] = self.features.window.to_dict()
        self.result.features_cached = self.features.cached
        self.model.to("cpu")
        return self.features.model.to(self.device)

    def blank_batch(self) -> tuple:
        """Images and targets of zeros in the largest batch's shapes, on the device."""
        size = min(self.experiment.batch_size, len(self.splits.train))
        _, height, width = shape = self.data_config["input_size"]
        targets = tree_map(lambda t: t.to(self.device), self.task.zeros(size, height, width))
        if self.features:
            rows, _ = self.features.train[0]
            return rows.new_zeros(size, len(rows), device=self.device), targets
        return torch.zeros(size, *shape, device=self.device), targets

    def train(self, screen: ProgressView) -> None:
        """Train until the last step, or until the user stops the run; pauses are not part of "fit"."""
        with self.windows.window("fit"):
            screen.begin(self.progress, self.result.history, saves=self.snapshots.folder is not None)
            paused = self._train_until_paused(screen)
        while paused:
            with self.windows.window("pause"):
                screen.wait()
            with self.windows.window("fit"):
                paused = self._train_until_paused(screen)

    def _train_until_paused(self, screen: ProgressView) -> bool:
        """Train to the last step or until a pause or stop is requested; returns whether it is a pause."""
        try:
            while (epochs_done := len(self.result.history)) < self.experiment.epochs:
                if screen.stop_wanted:
                    raise _Stopped
                if screen.paused:
                    return True
                trained, first_batch = divmod(self.result.steps, self.steps_per_epoch)
                if trained == epochs_done:
                    set_train_mode(self.steps.stepped)
                    with self.windows.window("train"):
                        self._train_epoch(screen, trained, first_batch)
                    continue
                with self.windows.window("validation"):
                    self._end_epoch(epochs_done, screen)
                screen.epoch(self.result.history[-1])
                if trained == self.experiment.epochs or self.snapshots.due(self.result.steps):
                    self._save()
        except _Stopped as stop:
            self._save()
            self.result.status, self.result.error = "interrupted", str(stop) or None
        return False

    def _train_epoch(self, screen: ProgressView, epoch: int, first_batch: int) -> None:
        """Run the steps of an epoch from `first_batch` on, until a pause or stop is requested."""
        asked_at = time.perf_counter()
        order = {"seed": self.experiment.seed, "epoch": epoch, "first_batch": first_batch}
        for images, targets in self._batches("train", **order):
            self.result.data_seconds += time.perf_counter() - asked_at
            rest = (
                len(self.splits.train) - self.result.steps % self.steps_per_epoch * self.experiment.batch_size
            )
            self.result.images_skipped += min(self.experiment.batch_size, rest) - len(images)
            loss, hits = self.steps.run(images, targets, self.result)
            for sums in (self.epoch_sums, self.unreported):
                sums.add(loss, hits, len(images))
            screen.step()
            if screen.stop_wanted or screen.paused:
                return
            if self.snapshots.due(self.result.steps):
                self._save()
            asked_at = time.perf_counter()

    def _end_epoch(self, epoch: int, screen: ProgressView) -> None:
        """Validate, and add the epoch's row to the history; raises `_Stopped` if a stop is requested."""

        def batches() -> Iterator[tuple]:
            for batch in self._batches("val"):
                if screen.stop_wanted:
                    raise _Stopped
                yield batch

        validation = evaluate(
            self.steps.stepped,
            batches(),
            task=self.task,
            num_classes=len(self.splits.classes),
            precision=self.experiment.precision,
            meter=self.meter,
            costs=False,
        )
        self.memory.reset_peak()  # the memory of validation is not part of training's peak
        if validation.loss is not None and not math.isfinite(validation.loss):
            raise NotFinite(f"validation loss {validation.loss} after epoch {epoch + 1}")
        sums = self.epoch_sums
        row = {"epoch": epoch + 1, "train_loss": sums.loss / sums.images}
        if self.task.train_metric:
            row[f"train_{self.task.train_metric}"] = 100 * sums.hits / sums.images
        if validation.loss is not None:
            row["val_loss"] = validation.loss
        row |= {f"val_{name}": value for name, value in validation.scores.items()}
        self.result.history.append(row)
        self.epoch_sums, self.unreported = _Sums(), _Sums()

    def _batches(self, split: str, **order: int) -> Iterator[tuple]:
        """The batches of a split; raises `_Stopped` where a file is not what it was."""
        try:
            yield from self._loader(split, **order)
        except FileError as error:
            raise _Stopped(str(error).splitlines()[-1].removeprefix("toolkit.errors.FileError: ")) from error

    def _loader(self, split: str, **order: int) -> DataLoader:
        size = self.experiment.batch_size
        if self.features:
            return self.features.loader(split, batch_size=size, **order)
        return loader(
            getattr(self.splits, split), self.data_config, self.splits.policy,
            batch_size=size, **self.data, **order,
        )  # fmt: skip

    def progress(self) -> Progress:
        """The state of the run, with the loss and score since the last call."""
        fit, sums = self.windows.measured("fit"), self.unreported
        self.unreported = _Sums()
        scored = sums.images and self.task.hits
        return Progress(
            step=self.result.steps,
            total_steps=self.total_steps,
            epoch=max(1, math.ceil(self.result.steps / self.steps_per_epoch)),
            epochs=self.experiment.epochs,
            loss=sums.loss / sums.images if sums.images else None,
            score_pct=100 * sums.hits / sums.images if scored else None,
            peak_bytes=self.result.peak_bytes,
            budget_bytes=self.experiment.budget_bytes,
            seconds=fit.seconds,
            energy_joules=fit.energy_joules,
            energy_source=fit.source,
            energy_reason=fit.reason,
        )

    def ending(self) -> str:
        """How training ended, in words."""
        result = self.result
        if result.status != "interrupted":
            return f"{result.status}: {result.error}" if result.error else f"finished: {result.steps} steps"
        saved = "the state is saved, fit continues from here" if self.snapshots.folder else "nothing is saved"
        return f"stopped after step {result.steps} of {self.total_steps}; {saved}"

    def restore_model(self) -> None:
        """With cached features: bring the backbone back to the device, in place of the optimizer's state."""
        if self.features:
            self.model.zero_grad(set_to_none=True)
            self.steps = None
            self.model.to(self.device)

    def _save(self) -> None:
        if self.snapshots.folder is None:
            return
        with self.windows.window("snapshot"):
            self.result.windows = self.windows.totals()
            self.snapshots.save(self.result.steps, self.state())

    def state(self) -> dict:
        """All that the rest of the run depends on; frozen weights are rebuilt, not stored."""
        return {
            "inputs": self._inputs(),
            "model": trained_state(self.model),
            "steps": self.steps.state(),
            "rng": rng_state(self.device),
            "epoch_sums": vars(self.epoch_sums),
            "result": vars(self.result),
        }

    def _inputs(self) -> dict:
        """What a snapshot and the run that continues from it must have in common."""
        return {
            "snapshot format": SNAPSHOT_FORMAT,
            "experiment": self.experiment.to_dict(),
            "train data": self.splits.hashes["train"],
            "weights": self.result.weights_sha256,
        }

    def _resume(self) -> None:
        state = self.snapshots.newest()
        if not state:
            return
        different = [name for name, value in self._inputs().items() if state["inputs"].get(name) != value]
        if different:
            raise InputError(
                f"{self.snapshots.folder} holds the state of a run with another {' and '.join(different)}; "
                "use another folder, or remove it to start from the beginning."
            )
        self.model.load_state_dict(state["model"], strict=False)
        self.steps.load_state(state["steps"])
        set_rng_state(state["rng"])
        self.epoch_sums = _Sums(**state["epoch_sums"])
        current, self.result = self.result, FitResult(**state["result"])
        self.windows.earlier = self.result.windows | self.windows.earlier
        self.result.status, self.result.error = "ok", None
        self.result.environment, self.result.idle_watts = current.environment, current.idle_watts
        self.result.resumes += 1
        print(f"resumed at step {self.result.steps} of {self.total_steps}")


def _read_context(result: FitResult, meter: Meter) -> None:
    """Note what the device holds in addition to the tensors of this process, while its kernels are loaded."""
    if result.memory_source != "cuda_allocator":
        result.context_reason = "the CPU has no context"
        return
    try:
        if meter.gpu is None:
            raise SensorError(meter.reason)
        result.context_bytes = context_bytes(meter.gpu, torch.device("cuda"))
    except SensorError as error:
        result.context_reason = str(error)


def batch_sizes(experiment: Experiment, images: int) -> set[int]:
    """Images of all forward passes that an experiment asks for; plans choose smaller ones only where
    batch norms allow it."""
    batches = {min(experiment.batch_size, images), images % experiment.batch_size}
    micro = experiment.micro_batch_size
    passes = {size for batch in batches for size in (min(micro, batch), batch % micro)} if micro else batches
    return passes - {0}
