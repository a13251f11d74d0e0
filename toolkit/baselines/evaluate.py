"""`evaluate_baseline()`: one foundation model on one data set, under the budget, as a record.

Three steps, which the notebook takes one by one: `prepare` (everything before the first test image),
`test` (one pass, timed), `RunRecord.of_baseline`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as pictures

from toolkit.baselines import contrastive, features, generative, need, probes, prompts
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.matching import GenerationClassifier
from toolkit.baselines.registry import Baseline, baseline_named
from toolkit.baselines.trie import TrieClassifier
from toolkit.budget import device_memory, is_out_of_memory, tensors_of
from toolkit.datasets import Splits, load_dataset, loader
from toolkit.environment import environment
from toolkit.evaluation import Evaluation, evaluate
from toolkit.measure import Meter, Window, total
from toolkit.records import RunRecord
from toolkit.training import check_fits_weights, seed_everything
from toolkit.weights import weights_sha256

CHOICE_IMAGES = 1000  # validation images, at most, that a scoring rule is chosen on: a pass costs as a test
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Prepared:
    """A baseline ready for its test pass, and what that took.  `status`: ok | oom | nan."""

    model: nn.Module  # forward(inputs) -> scores, float32 (B, classes)
    batches: DataLoader  # of the test split
    window: Window  # everything before the first test image, without loading the weights
    peak_bytes: int  # device memory, highest moment of that time
    memory_source: str
    form: str  # of the weights
    batch_size: int
    environment: dict
    started_at: str  # UTC
    predicted_peak_bytes: int | None = None
    choices: dict = field(default_factory=dict)  # what was chosen, and the validation accuracies behind it
    val_top1_pct: float | None = None  # of the choice
    selection_rule: str = "nothing to choose"
    features_cached: bool | None = None  # then `window` holds what they cost when they were computed
    fitted: int = 0  # numbers that were fitted to training images
    unmatched_pct: float | None = None  # test images whose generated answer names no class
    weights_sha256: str = ""
    status: str = "ok"
    error: str | None = None


def evaluate_baseline(
    name: str,
    dataset: str | Splits,
    *,
    budget: str | int | None = None,
    protocol: str | None = None,
    **parameters: object,
) -> RunRecord:
    """Evaluate the foundation model `name` on the test images of `dataset`, never training on its backbone.

    `protocol`: one of the family's `PROTOCOLS`; other `parameters` as of `BaselineExperiment`.  What is
    chosen (probe, regularisation, scoring rule) is chosen on training and validation images.  Out of
    memory and scores that are not finite are statuses of the record.

    Raises `InputError` for unknown names, classes that cannot be told apart, weights that cannot be had,
    and, before anything is downloaded, for a model that cannot fit the budget.
    """
    given = {"budget": budget, "protocol": protocol}
    parameters |= {key: value for key, value in given.items() if value is not None}
    own = isinstance(dataset, Splits)
    experiment = BaselineExperiment(baseline=name, dataset=dataset.name if own else dataset, **parameters)
    form_and_batch(experiment)  # raises before the data are downloaded, too
    splits = dataset if own else load_dataset(experiment.dataset)
    try:
        prepared = prepare(experiment, splits)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return RunRecord.of_failure(experiment, f"before the test: {str(error).splitlines()[0]}", "oom")
    return RunRecord.of_baseline(experiment, splits, prepared, test(experiment, prepared))


def form_and_batch(experiment: BaselineExperiment, classes: int = 100) -> tuple[str, int, int | None]:
    """Form of the weights, images at a time and predicted peak bytes, from the architecture alone.

    Weights from a folder are what they are: nothing is predicted for them (None).  Raises `InputError`
    where no form, or not the one that was asked for, fits the budget.
    """
    auto = experiment.form == "auto"
    if experiment.source:
        first = "fp32" if experiment.device == "cpu" else "bf16"
        return first if auto else experiment.form, experiment.batch_size, None
    sizes = {"classes": classes, "image_size": experiment.image_size}
    name, budget, form = experiment.baseline, experiment.budget_bytes, experiment.form
    if auto:
        form = need.first_form_that_fits(name, budget, experiment.device, **sizes)
        if form == "nf4_pruned" and experiment.protocol == "generate":
            form = "nf4"  # answers need every token; the next line says what that takes
    batch = need.largest_batch(name, form, budget, experiment.batch_size, **sizes)
    return form, batch, need.need(name, form, batch_size=batch, **sizes).total_bytes


def prepare(experiment: BaselineExperiment, splits: Splits, meter: Meter | None = None) -> Prepared:
    """Load the model and get it ready for the test images of `splits`.

    Raises as `evaluate_baseline`, and what torch raises where memory runs out.
    """
    baseline = baseline_named(experiment.baseline)
    prompts.check_classes(prompts.class_names(splits))
    form, batch_size, predicted = form_and_batch(experiment, len(splits.classes))
    seed_everything(experiment.seed)
    task = _Task(experiment, baseline, splits, form, batch_size, meter or Meter(experiment.device))
    family = {"contrastive": _contrastive, "features": _features, "generative": _generative}[baseline.family]
    prepared = family(task)
    check_fits_weights(prepared.model, experiment.budget_bytes)
    prepared.predicted_peak_bytes = predicted
    prepared.weights_sha256 = weights_sha256(prepared.model)
    return prepared


def test(experiment: BaselineExperiment, prepared: Prepared, meter: Meter | None = None) -> Evaluation | None:
    """One pass over the test images; None if it did not end well, which `prepared.status` says then."""
    try:
        evaluation = evaluate(prepared.model, prepared.batches, meter=meter or Meter(experiment.device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        prepared.status, prepared.error = "oom", f"in the test: {str(error).splitlines()[0]}"
        return None
    if not math.isfinite(evaluation.loss):
        prepared.status, prepared.error = "nan", f"test loss {evaluation.loss}"
        return None
    if experiment.protocol == "generate":
        unmatched = evaluation.predictions == len(prepared.model.names)
        prepared.unmatched_pct = 100 * unmatched.double().mean().item()
        evaluation.top5_pct = evaluation.loss = None
    return evaluation


@dataclass
class _Task:
    """What a family needs to prepare itself."""

    experiment: BaselineExperiment
    baseline: Baseline
    splits: Splits
    form: str
    batch_size: int
    meter: Meter

    def __post_init__(self):
        self.device = torch.device(self.experiment.device)
        self.memory = device_memory(self.device)
        self.started_at = datetime.now(UTC).isoformat(timespec="seconds")
        self.environment = environment(self.device.type)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.form, torch.bfloat16)  # of what NF4 leaves as it is

    @property
    def names(self) -> list[str]:
        return prompts.class_names(self.splits)

    def batches(self, split: Dataset, inputs: Callable, workers: bool = False) -> DataLoader:
        """Of `(inputs(images), labels)`; `images`: a list of PIL images.

        With `workers`, up to four processes prepare them, if the model does not compute on the same cores.
        """
        rows = [
            list(range(start, min(start + self.batch_size, len(split))))
            for start in range(0, len(split), self.batch_size)
        ]
        processes = min(4, os.cpu_count() or 1) if workers and self.device.type == "cuda" else 0
        return DataLoader(_Pictures(split, inputs), sampler=rows, batch_size=None, num_workers=processes)

    def prepared(self, model: nn.Module, batches: DataLoader, window: Window, **fields) -> Prepared:
        return Prepared(
            model, batches, window, self.memory.peak_bytes, self.memory.kind, self.form, self.batch_size,
            self.environment, self.started_at, **fields,
        )  # fmt: skip


def _contrastive(task: _Task) -> Prepared:
    experiment = task.experiment
    source = f"local-dir:{experiment.source}" if experiment.source else task.baseline.source
    both = contrastive.load(source, dtype=task.dtype)
    templates = prompts.templates(task.splits.name)
    with task.meter.window("prepare") as window:
        model = contrastive.zero_shot(both, task.names, templates, memory=task.memory, device=task.device)
    return task.prepared(
        model,
        task.batches(task.splits.test, functools.partial(_stacked, model.preprocess), workers=True),
        window,
        choices={"templates": len(templates)},
        selection_rule="nothing to choose: published prompts",
    )


def _features(task: _Task) -> Prepared:
    experiment, splits = task.experiment, task.splits
    source = f"local-dir:{experiment.source}" if experiment.source else task.baseline.source
    extractor = features.extractor(
        source, device=task.device, dtype=task.dtype, image_size=experiment.image_size
    )
    parts = {
        split: features.features(
            extractor, getattr(splits, split), splits.hashes[split], splits.policy,
            layers=experiment.protocol == "linear_grid", batch_size=task.batch_size, meter=task.meter,
        )
        for split in ("train", "val")
    }  # fmt: skip
    task.memory.track(tensors_of(extractor))
    with task.meter.window("fit") as window:
        train, val = ((part.x.to(task.device), part.y.to(task.device)) for part in parts.values())
        task.memory.track([*train, *val])
        with task.memory:
            probe = probes.fit_probe(
                experiment.protocol, train, val, len(splits.classes), seed=experiment.seed
            )
    prepared = task.prepared(
        features.Frozen(extractor, probe),
        loader(splits.test, extractor.data_config, splits.policy, batch_size=task.batch_size),
        total([*(part.window for part in parts.values()), window], "prepare"),
        choices=probe.choices,
        val_top1_pct=probe.val_top1_pct,
        selection_rule="highest validation accuracy" if probe.choices else "nothing to choose",
        features_cached=all(part.cached for part in parts.values()),
        fitted=sum(tensor.numel() for tensor in tensors_of(probe)),
    )
    prepared.peak_bytes = max(prepared.peak_bytes, *(part.peak_bytes for part in parts.values()))
    return prepared


def _generative(task: _Task) -> Prepared:
    experiment, baseline = task.experiment, task.baseline
    question = prompts.question(task.splits.name)
    vlm = generative.load(
        experiment.source or baseline.source,
        baseline.kind,
        dtype=task.dtype,
        device=torch.device("cpu"),
        four_bit=task.form.startswith("nf4"),
        revision=None if experiment.source else baseline.revision,
    )
    if task.form == "nf4_pruned":
        generative.prune_vocabulary(vlm, vlm.used_tokens(question, task.names))
    vlm.to(task.device)

    def inputs(images: list[Image.Image]):
        return vlm.inputs(images, question)

    test_batches = task.batches(task.splits.test, inputs)
    task.memory.track(tensors_of(vlm))
    if experiment.protocol == "generate":
        with task.meter.window("prepare") as window, task.memory:
            model = GenerationClassifier(vlm, task.names)
        return task.prepared(model, test_batches, window, selection_rule="greedy decoding, label matching")
    rows = torch.randperm(len(task.splits.val), generator=torch.Generator().manual_seed(experiment.seed))
    some = Subset(task.splits.val, rows[:CHOICE_IMAGES].tolist())
    with task.meter.window("prepare") as window, task.memory:
        model = TrieClassifier(vlm, question, task.names)
        model.choose(task.batches(some, inputs))
    return task.prepared(
        model,
        test_batches,
        window,
        choices=model.choices | {"aggregation": model.aggregation, "images": len(some)},
        val_top1_pct=model.choices[model.aggregation],
        selection_rule="aggregation of the highest validation accuracy",
    )


def _stacked(preprocess: Callable, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([preprocess(image) for image in images])


class _Pictures(Dataset):
    """Indexed by the rows of a batch: `(inputs(images), labels)`."""

    def __init__(self, split: Dataset, inputs: Callable):
        self.split, self.inputs = split, inputs

    def __getitem__(self, rows: list[int]) -> tuple[object, torch.Tensor]:
        images, labels = zip(*(self.split[row] for row in rows))
        return self.inputs([pictures.to_pil_image(image) for image in images]), torch.tensor(labels)
