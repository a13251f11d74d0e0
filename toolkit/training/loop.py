"""`fit()`: a plain training loop.

Everything that happens to the model in a step stands in `_train_step`.  Around it: the schedule,
micro-batches, snapshots (a killed run goes on bit for bit on the CPU), and the ways in which a run can
end, which are results with a status and not lost runs.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from toolkit.backbones import data_config
from toolkit.budget import (
    AutoCheckpoint,
    Checkpointing,
    device_memory,
    is_out_of_memory,
    release_failed_backward,
    tensors_of,
)
from toolkit.budget.memory import rounded
from toolkit.budget.step import autocast, call
from toolkit.datasets import Splits, loader
from toolkit.datasets.tasks import TASKS, split_targets
from toolkit.errors import InputError
from toolkit.experiment import Experiment
from toolkit.measure import FlopCounter, Meter, SensorError
from toolkit.measure.environment import environment
from toolkit.measure.memory import MemoryTrace, context_bytes
from toolkit.methods import METHODS, Hooks, adapt, check_batch_norms, set_train_mode
from toolkit.methods.weights import trained_state, weights_sha256
from toolkit.model import build_model, check_fits_weights, optimizer_of, seed_everything
from toolkit.training.evaluation import evaluate
from toolkit.training.feature_cache import CachedFeatures, cached_features
from toolkit.training.progress import Progress, ProgressView, View, plain_view
from toolkit.training.result import FitResult, RunWindows
from toolkit.training.resume import Interrupt, Snapshots, claim

SNAPSHOT_FORMAT = 6  # of `_Run.state`
OUT_OF_MEMORY_RETRIES = 5  # of one step, under `planned`; each for a peak lower by a twentieth
_NO_SUMS = {"loss": 0.0, "correct": 0, "images": 0}  # over the images of an epoch


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
) -> FitResult:
    """Train `model` on `splits.train` as `experiment` says; validate after each epoch.

    AdamW or GaLore (norms and biases without weight decay), linear warm-up and cosine to zero, the loss of
    `splits.task`.  With `experiment.feature_cache` the frozen features are computed once, of images that
    are not augmented, and the steps train on these: on a GPU without the backbone, which waits in the host's
    memory, so on the CPU, where it is the same memory, the peak leaves it out, too.
    With a `folder`, the state is saved there at most every `snapshot_seconds` (less often where saving
    takes more than 2 % of the time), and a run that finds a snapshot goes on from it.  Time and energy
    are those of `meter` (default: a new one); what a killed process measured after its last snapshot is
    lost with the steps themselves.

    `view` shows the run (default: a moving bar or printed lines, see `progress.plain_view`) and may pause
    it between two steps: memory stays taken, but the wait counts into no time and no energy but those
    of the window "pause".

    Under `planned` nothing starts that cannot fit, and a step that runs out of memory all the same is
    repeated, with the same random numbers, on a tighter plan; the batch never changes.  Otherwise out of
    memory, a loss that is not finite, and an interrupt (Ctrl-C, Jupyter's stop button, the view's;
    at the end of the step) end the run with that status.  Raises `InputError` if the weights exceed the
    budget, no plan fits it, a batch norm that updates its statistics would meet a single value, or another
    process trains in `folder`.
    """
    check_fits_weights(model, experiment.budget_bytes)
    check_batch_norms(model, batch_sizes(experiment, len(splits.train)), data_config(model)["input_size"])
    snapshots = Snapshots(folder, snapshot_seconds)
    with claim(folder), Interrupt() as interrupt, ProgressView(view or plain_view(), interrupt) as screen:
        run = _Run(model, splits, experiment, snapshots, workers, meter or Meter(experiment.device))
        try:
            run.prepare()
            try:
                with run.checkpointing():
                    run.train(screen)
            finally:
                run.hooks.end(run.optimizer)
        except _NotFinite as error:
            run.result.status, run.result.error = "nan", str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.result.status, run.result.error = "oom", str(error).split("\n")[0]
            run.read_peaks()
        run.result.windows = run.windows.totals()
        run.read_context()
        run.bring_back()
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


class _Run:
    """The state of one training run; what must survive a kill goes through `state()`."""

    def __init__(self, model, splits, experiment, snapshots, workers, meter):
        self.model, self.experiment, self.splits, self.workers = model, experiment, splits, workers
        self.meter = meter
        self.windows = RunWindows(meter)
        self.device = torch.device(experiment.device)
        self.memory = device_memory(self.device)
        self.task = TASKS[splits.task]
        self.data_config = data_config(model)
        self.stepped = model  # what a step calls; with cached features, the part that reads these
        self.features: CachedFeatures | None = None
        self.counted_steps = Counter()  # by batch size, and the kind of step under the method
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
        self.epoch_sums = dict(_NO_SUMS)
        self.shown_sums = dict(_NO_SUMS)  # as far as `progress` has told of them
        self.hits: torch.Tensor | None = None  # right answers of the present forward pass
        self.penalty: torch.Tensor | None = None  # the method's part of its loss
        self.hooks = METHODS[experiment.method].hooks(model)
        self.snapshots = snapshots

    def prepare(self) -> None:
        """Put everything on the device and go on from the newest snapshot, if there is one."""
        self.model.to(self.device)
        if self.experiment.feature_cache:
            self._cache_features()
        self.optimizer = optimizer_of(self.model, self.experiment)
        self.hooks.begin(self.total_steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.experiment.precision == "fp16")
        torch.manual_seed(self.experiment.seed)
        self._resume()
        self.memory.track(tensors_of(self.stepped))
        self.memory.track(value for s in self.optimizer.state.values() for value in s.values())
        self.memory.track(self.hooks.tensors)
        self.memory.reset_peak()

    def _cache_features(self) -> None:
        """Train on features from now on, without the backbone on the device.  Computing them is no training,
        as validation is none."""
        experiment = self.experiment
        self.features = cached_features(
            self.model, self.splits, budget_bytes=experiment.feature_cache,
            batch_size=experiment.batch_size, precision=experiment.precision, meter=self.meter,
        )  # fmt: skip
        self.model.to("cpu")  # the backbone has no more to do; what trains comes back
        self.stepped = self.features.model.to(self.device)
        self.windows.earlier["features"] = self.features.window.to_dict()
        self.result.features_cached = self.features.cached

    def checkpointing(self) -> Checkpointing | AutoCheckpoint:
        """The experiment's strategy on this model, for a with statement."""
        experiment = self.experiment
        if experiment.strategy.plans:
            set_train_mode(self.stepped)  # which the plan is for
            size = min(experiment.batch_size, len(self.splits.train))
            _, *sides = shape = self.data_config["input_size"]
            targets = tree_map(lambda t: t.to(self.device), self.task.zeros(size, *sides))
            if self.features:
                rows, _ = self.features.train[0]
                images = rows.new_zeros(size, len(rows), device=self.device)
            else:
                images = torch.zeros(size, *shape, device=self.device)
            self.blocks = AutoCheckpoint(
                self.stepped,
                experiment.budget_bytes,
                (self.task.inputs(images, targets), targets),
                loss=self._loss,
                optimizer=self.optimizer,
                precision=experiment.precision,
                micro_batches=experiment.micro_batch_size or True,
                held_bytes=held_bytes(self.model, self.hooks, plans=True),
            )
            self.result.predicted_peak_bytes = self.blocks.plan.peak_bytes
            self.hits = self.penalty = None
        else:
            self.blocks = Checkpointing(
                self.stepped,
                experiment.strategy,
                memory=self.memory,
                budget_bytes=experiment.budget_bytes,
            )
        return self.blocks

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
        """Train to the last step or until a pause or stop is requested; return whether it is a pause."""
        while self.result.steps < self.total_steps:
            if screen.stop_wanted:
                self._save()
                self.result.status = "interrupted"
                return False
            if screen.paused:
                return True
            epoch, first_batch = divmod(self.result.steps, self.steps_per_epoch)
            set_train_mode(self.stepped)
            with self.windows.window("train"):
                self._train_epoch(screen, epoch, first_batch)
            if self.result.steps == (epoch + 1) * self.steps_per_epoch:
                with self.windows.window("validation"):
                    self._end_epoch(epoch)
                screen.epoch(self.result.history[-1])
                if self.snapshots.due or self.result.steps == self.total_steps:
                    self._save()
        return False

    def _train_epoch(self, screen: ProgressView, epoch: int, first_batch: int) -> None:
        """Run the steps of an epoch from `first_batch` on, until a pause or stop is requested."""
        asked_at = time.perf_counter()
        for images, targets in self._train_loader(epoch, first_batch):
            self.result.data_seconds += time.perf_counter() - asked_at
            self._train_step(images, targets)
            screen.step()
            if screen.stop_wanted or screen.paused:
                return
            if self.snapshots.due and self.result.steps % self.steps_per_epoch:  # otherwise after validation
                self._save()
            asked_at = time.perf_counter()

    def progress(self) -> Progress:
        """Where the run stands."""
        fit, shown = self.windows.measured("fit"), self.shown_sums
        self.shown_sums = dict(self.epoch_sums)
        images = self.epoch_sums["images"] - shown["images"]
        return Progress(
            step=self.result.steps,
            total_steps=self.total_steps,
            epoch=max(1, math.ceil(self.result.steps / self.steps_per_epoch)),
            epochs=self.experiment.epochs,
            loss=(self.epoch_sums["loss"] - shown["loss"]) / images if images else None,
            score_pct=100 * (self.epoch_sums["correct"] - shown["correct"]) / images
            if images and self.task.hits
            else None,
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
        saved = "the state is saved, fit goes on from here" if self.snapshots.folder else "nothing is saved"
        return f"stopped after step {result.steps} of {self.total_steps}; {saved}"

    def bring_back(self) -> None:
        """With cached features: the backbone beside what trained, where that is, in the place of its
        optimizer's state."""
        if self.features:
            self.model.zero_grad(set_to_none=True)
            self.optimizer = None
            self.model.to(self.device)

    def read_context(self) -> None:
        """Book what the device holds beside this process's tensors, while the kernels are loaded."""
        if self.device.type != "cuda":
            self.result.context_reason = "the CPU has no context"
            return
        free, total_bytes = torch.cuda.mem_get_info(self.device)
        self.result.device_used_bytes = total_bytes - free
        try:
            if self.meter.gpu is None:
                raise SensorError(self.meter.reason)
            self.result.context_bytes = context_bytes(self.meter.gpu, self.device)
        except SensorError as error:
            self.result.context_reason = str(error)

    def _train_step(self, images: torch.Tensor, targets) -> None:
        """One optimizer step on one batch."""
        self._set_lr()
        tracing = not self.result.memory_trace and self.result.steps == min(1, self.total_steps - 1)
        trace = MemoryTrace(self.memory, self.stepped) if tracing else contextlib.nullcontext()
        counter = FlopCounter() if tracing else contextlib.nullcontext()
        with self._counted(len(images)), trace, counter:
            batch_loss, correct = self._forward_and_backward(images, targets)
            if not math.isfinite(batch_loss):
                raise _NotFinite(f"loss {batch_loss} at step {self.result.steps + 1}")
            if tracing:
                trace.start_optimizer()
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.hooks.after_step(self.result.steps + 1, finite=self.scaler.get_scale() >= scale)
            self.optimizer.zero_grad(set_to_none=True)
        if tracing:
            self.result.memory_trace = trace.segments
            counts = counter.flops
            self.result.step_flops = {
                phase: getattr(counts, phase) / len(images) for phase in ("forward", "backward", "recompute")
            }
        self.epoch_sums["loss"] += batch_loss * len(images)
        self.epoch_sums["correct"] += correct
        self.epoch_sums["images"] += len(images)
        self.result.steps += 1
        self.result.checkpointed_blocks = len(self.blocks.checkpointed)
        self.read_peaks()
        if isinstance(self.blocks, AutoCheckpoint):
            self.blocks.check(self.memory.peak_bytes)

    def _forward_and_backward(self, images: torch.Tensor, targets) -> tuple[float, float]:
        """Gradients of one batch; returns its loss and the right answers in images.

        Under `planned` a pass that runs out of memory is undone and repeated on a tighter plan.
        """
        if not isinstance(self.blocks, AutoCheckpoint):
            return self._passes(images, targets)
        before = self._before_passes()
        for _ in range(OUT_OF_MEMORY_RETRIES):
            try:
                return self._passes(images, targets)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.result.out_of_memory_retries += 1
            self._undo_passes(before)
            with contextlib.suppress(InputError):  # no tighter plan is left: what was freed may be enough
                self.blocks.tighten(self.blocks.plan.peak_bytes * 19 // 20)
        return self._passes(images, targets)

    def _passes(self, images: torch.Tensor, targets) -> tuple[float, float]:
        """Forward and backward pass, slice by slice if there are micro-batches."""
        micro = self.experiment.micro_batch_size or len(images)
        if isinstance(self.blocks, AutoCheckpoint):
            micro = self.blocks.plan.micro_batch_size
        self.result.micro_batch_size = micro
        batch_loss, correct = 0.0, 0
        for image_slice, target_slice in zip(images.split(micro), split_targets(targets, micro)):
            share = len(image_slice) / len(images)
            x = image_slice.to(self.device, non_blocking=True)  # (micro, 3, H, W)
            y = tree_map(lambda t: t.to(self.device, non_blocking=True), target_slice)
            self.memory.track([x, *tree_leaves(y)])
            with autocast(self.device, self.experiment.precision):
                outputs = call(self.stepped, self.task.inputs(x, y))
                # Weighted so that the slices' gradients add up to the whole batch's mean.
                loss = self._loss(outputs, y) * share
            self.scaler.scale(loss).backward()
            batch_loss += loss.item()
            if self.penalty is not None:
                batch_loss -= self.penalty.item() * share
            correct += 0 if self.hits is None else self.hits.item()
            self.hits = self.penalty = None
            del x, y, outputs, loss
        return batch_loss, correct

    def _loss(self, outputs, targets) -> torch.Tensor:
        """The task's loss, and the method's penalty; the right answers are counted in passing, so that plans
        know of their bytes."""
        if self.task.hits:
            self.hits = self.task.hits(outputs, targets)
        loss = self.task.loss(outputs, targets)
        penalty = self.hooks.penalty()
        if penalty is None:
            return loss
        self.penalty = penalty.detach()
        return loss + penalty

    def _before_passes(self) -> dict:
        """What forward and backward passes change beside gradients: random numbers, running statistics."""
        return {
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "buffers": [buffer.clone() for buffer in _running_buffers(self.model)],
        }

    def _undo_passes(self, before: dict) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        release_failed_backward()
        self.read_peaks()
        self.memory.reset_peak()  # what follows has another plan
        torch.set_rng_state(before["rng_cpu"])
        if before["rng_cuda"]:
            torch.cuda.set_rng_state_all(before["rng_cuda"])
            torch.cuda.empty_cache()
        with torch.no_grad():
            for buffer, value in zip(_running_buffers(self.model), before["buffers"]):
                buffer.copy_(value)

    def read_peaks(self) -> None:
        """Book the highest memory of the steps so far, this process's and those before."""
        self.result.peak_bytes = max(self.result.peak_bytes, self.memory.peak_bytes)
        reserved = self.memory.reserved_peak_bytes
        if reserved is not None:
            self.result.reserved_peak_bytes = max(self.result.reserved_peak_bytes or 0, reserved)

    def _counted(self, batch_size: int):
        """The memory counter where it has something to learn.

        Counting on the CPU slows a small step by a third.  Equal shapes take equal bytes, so the first
        two steps of each batch size and of each kind that the method knows are enough (the very first lacks
        the optimizer's state), unless the strategy reads the counter in every step.
        """
        kind = batch_size, self.hooks.step_kind(self.optimizer)
        if self.experiment.strategy.reads_memory or self.counted_steps[kind] < 2:
            self.counted_steps[kind] += 1
            return self.memory
        return contextlib.nullcontext()

    def _set_lr(self) -> None:
        """Linear warm-up to the peak learning rate, then a cosine to zero."""
        step, warmup = self.result.steps + 1, self.experiment.warmup_fraction * self.total_steps
        if step < warmup:
            factor = step / warmup
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.experiment.lr * factor

    def _end_epoch(self, epoch: int) -> None:
        # Validation is not training: its memory must not show up in the training peak.
        validation = evaluate(
            self.stepped,
            self._val_loader(),
            task=self.task,
            num_classes=len(self.splits.classes),
            precision=self.experiment.precision,
            meter=self.meter,
            costs=False,
        )
        self.memory.reset_peak()
        if validation.loss is not None and not math.isfinite(validation.loss):
            raise _NotFinite(f"validation loss {validation.loss} after epoch {epoch + 1}")
        images = self.epoch_sums["images"]
        row = {"epoch": epoch + 1, "train_loss": self.epoch_sums["loss"] / images}
        if self.task.train_metric:
            row[f"train_{self.task.train_metric}"] = 100 * self.epoch_sums["correct"] / images
        if validation.loss is not None:
            row["val_loss"] = validation.loss
        row |= {f"val_{name}": value for name, value in validation.scores.items()}
        self.result.history.append(row)
        self.epoch_sums, self.shown_sums = dict(_NO_SUMS), dict(_NO_SUMS)

    def _train_loader(self, epoch: int, first_batch: int) -> DataLoader:
        order = {"seed": self.experiment.seed, "epoch": epoch, "first_batch": first_batch}
        if self.features:
            return self.features.loader("train", batch_size=self.experiment.batch_size, **order)
        return loader(
            self.splits.train, self.data_config, self.splits.policy,
            batch_size=self.experiment.batch_size, workers=self.workers, **order,
        )  # fmt: skip

    def _val_loader(self) -> DataLoader:
        if self.features:
            return self.features.loader("val", batch_size=self.experiment.batch_size)
        return loader(
            self.splits.val, self.data_config, self.splits.policy,
            batch_size=self.experiment.batch_size, workers=self.workers,
        )  # fmt: skip

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
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.hooks.state(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "epoch_sums": self.epoch_sums,
            "result": vars(self.result),
        }

    def _inputs(self) -> dict:
        """What a snapshot must agree on with the run that goes on from it."""
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
                "use another folder, or remove it to start anew."
            )
        self.model.load_state_dict(state["model"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.hooks.load_state(state["method"])
        torch.set_rng_state(state["rng_cpu"])
        if state["rng_cuda"]:
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        self.epoch_sums = state["epoch_sums"]
        current, self.result = self.result, FitResult(**state["result"])
        self.windows.earlier = self.result.windows | self.windows.earlier
        self.result.status, self.result.error = "ok", None
        self.result.environment, self.result.idle_watts = current.environment, current.idle_watts
        self.result.resumes += 1
        print(f"resumed at step {self.result.steps} of {self.total_steps}")


def batch_sizes(experiment: Experiment, images: int) -> set[int]:
    """Images of all forward passes that an experiment asks for; plans choose smaller ones only where
    batch norms allow it."""
    batches = {min(experiment.batch_size, images), images % experiment.batch_size}
    micro = experiment.micro_batch_size
    passes = {size for batch in batches for size in (min(micro, batch), batch % micro)} if micro else batches
    return passes - {0}


def held_bytes(model: nn.Module, hooks: Hooks, plans: bool) -> int:
    """Bytes that `fit` holds during a step besides model, batch and optimizer: tensors of the method, and
    under a plan copies of buffers for repeating the step."""
    copied = _running_buffers(model) if plans else []
    return sum(rounded(b.nbytes) for b in copied) + hooks.held_bytes


def _running_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that a forward pass may change: of modules in training mode, so not of frozen batch norms."""
    return [b for module in model.modules() if module.training for b in module.buffers(recurse=False)]


class _NotFinite(Exception):
    pass
