"""`evaluate_baseline()`: one foundation model on one data set, under the budget, as a record.

Three steps, which the notebook takes one by one: `prepare` (everything before the first test image),
`test` (one pass, timed), `record_of`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as pictures

from toolkit.baselines import contrastive, features, generative, memory_estimate, probes, prompts
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.matching import GenerationClassifier
from toolkit.baselines.prepared import Prepared
from toolkit.baselines.record import record_of
from toolkit.baselines.registry import Baseline, baseline_named
from toolkit.baselines.trie import TrieClassifier
from toolkit.budget import DeviceMemory, device_memory, is_out_of_memory, tensors_of
from toolkit.datasets import Splits, load_dataset, loader
from toolkit.measure import Meter, total
from toolkit.measure.environment import environment
from toolkit.methods.weights import weights_sha256
from toolkit.model import check_fits_weights, seed_everything
from toolkit.training.evaluation import Evaluation, attempt, evaluate
from toolkit.training.record import RunRecord

CHOICE_IMAGES = 1000  # validation images, at most, that a scoring rule is chosen on: a pass costs as a test
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    prepared = prepare(experiment, splits)
    return record_of(experiment, splits, prepared, test(experiment, prepared))


def form_and_batch(
    experiment: BaselineExperiment, classes: Sequence[str] = ("a", "b")
) -> tuple[str, int, int | None]:
    """Form of the weights, images at a time and predicted peak bytes, from the architecture alone.

    `classes`: names; without them a lower bound.  The prediction is of the passes over images and class
    names: features that a probe is fitted to, and kNN's, come on top.  Weights from a folder are what they
    are: nothing is predicted for them (None), and `auto` is fp32 on the CPU and bf16 on a GPU.

    Raises `InputError` for unusable names, and where no form, or not the one that was asked for, fits the
    budget.
    """
    prompts.check_classes(classes)
    auto = experiment.form == "auto"
    if experiment.source:
        first = "fp32" if experiment.device == "cpu" else "bf16"
        return first if auto else experiment.form, experiment.batch_size, None
    sizes = {"classes": len(classes), "image_size": experiment.image_size}
    if baseline_named(experiment.baseline).family == "generative":
        sizes["class_tokens"] = sum(map(memory_estimate.estimated_tokens, classes))
    name, budget, form = experiment.baseline, experiment.budget_bytes, experiment.form
    if auto:
        form = memory_estimate.first_form_that_fits(name, budget, experiment.device, **sizes)
        if form == "nf4_pruned" and experiment.protocol == "generate":
            form = "nf4"  # answers need every token; the next line says what that takes
    batch = memory_estimate.largest_batch(name, form, budget, experiment.batch_size, **sizes)
    return form, batch, memory_estimate.estimate(name, form, batch_size=batch, **sizes).total_bytes


def prepare(experiment: BaselineExperiment, splits: Splits, meter: Meter | None = None) -> Prepared:
    """Load the model and get it ready for the test images of `splits`.

    Raises as `evaluate_baseline`; out of memory and features that are not finite are statuses.
    """
    baseline = baseline_named(experiment.baseline)
    form, batch_size, predicted = form_and_batch(experiment, prompts.class_names(splits))
    seed_everything(experiment.seed)
    device = torch.device(experiment.device)
    memory = device_memory(device)
    memory.reset_peak()
    prepared = Prepared(
        form,
        batch_size,
        predicted,
        memory.kind,
        environment(device.type),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    task = _Task(experiment, baseline, splits, prepared, meter or Meter(device), device, memory)
    try:
        {"contrastive": _contrastive, "features": _features, "generative": _generative}[baseline.family](task)
    except FloatingPointError as error:
        prepared.status, prepared.error = "nan", str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        prepared.status, prepared.error = "oom", f"before the test: {str(error).splitlines()[0]}"
    else:
        prepared.weights_sha256 = weights_sha256(prepared.model)
        return prepared
    prepared.model = None
    return prepared


def test(experiment: BaselineExperiment, prepared: Prepared, meter: Meter | None = None) -> Evaluation | None:
    """One pass over the test images; None if that or the preparation did not end well, see its status."""
    meter = meter or Meter(experiment.device)
    evaluation = attempt(prepared, lambda: evaluate(prepared.model, prepared.batches, meter=meter))
    if evaluation and experiment.protocol == "generate":
        unmatched = evaluation.predictions == len(prepared.model.names)
        prepared.unmatched_pct = 100 * unmatched.double().mean().item()
        evaluation.scores["top5_pct"] = evaluation.loss = evaluation.confidences = None
    return evaluation


@dataclass
class _Task:
    """What a family needs to complete `prepared`."""

    experiment: BaselineExperiment
    baseline: Baseline
    splits: Splits
    prepared: Prepared
    meter: Meter
    device: torch.device
    memory: DeviceMemory

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES.get(self.prepared.form, torch.bfloat16)  # of what NF4 leaves as it is

    @property
    def names(self) -> list[str]:
        return prompts.class_names(self.splits)

    def check_fits(self, model: nn.Module) -> None:
        """Raise `InputError` for weights that are larger than the budget, before they go to the device."""
        check_fits_weights(model, self.experiment.budget_bytes)

    def batches(self, split: Dataset, inputs: Callable, workers: bool = False) -> DataLoader:
        """Of `(inputs(images), labels)`; `images`: a list of PIL images.

        With `workers`, up to four processes prepare them, if the model does not compute on the same cores.
        """
        size = self.prepared.batch_size
        rows = [list(range(start, min(start + size, len(split)))) for start in range(0, len(split), size)]
        processes = min(4, os.cpu_count() or 1) if workers and self.device.type == "cuda" else 0
        return DataLoader(_Pictures(split, inputs), sampler=rows, batch_size=None, num_workers=processes)


def _contrastive(task: _Task) -> None:
    experiment, prepared = task.experiment, task.prepared
    source = f"local-dir:{experiment.source}" if experiment.source else task.baseline.source
    templates = prompts.templates(task.splits.name)
    both = contrastive.load(source, dtype=task.dtype)
    task.check_fits(both.model.visual)
    model, cost = contrastive.zero_shot(both, task.names, templates, device=task.device, meter=task.meter)
    prepared.model, prepared.window, prepared.peak_bytes = model, cost.window, cost.peak_bytes
    prepared.cached = cost.cached
    prepared.batches = task.batches(
        task.splits.test, functools.partial(_stacked, model.preprocess), workers=True
    )
    prepared.choices = {"templates": len(templates)}
    prepared.selection_rule = "nothing to choose: published prompts"


def _features(task: _Task) -> None:
    experiment, splits, prepared = task.experiment, task.splits, task.prepared
    source = f"local-dir:{experiment.source}" if experiment.source else task.baseline.source
    extractor = features.extractor(source, dtype=task.dtype, image_size=experiment.image_size)
    task.check_fits(extractor)
    extractor.to(task.device)
    parts = [
        features.features(
            extractor, getattr(splits, split), splits.hashes[split], splits.policy,
            layers=experiment.protocol == "linear_grid", batch_size=prepared.batch_size, meter=task.meter,
        )
        for split in ("train", "val")
    ]  # fmt: skip
    task.memory.track(tensors_of(extractor))
    with task.meter.window("fit") as window:
        train, val = ((part.x.to(task.device), part.y.to(task.device)) for part in parts)
        task.memory.track([*train, *val])
        with task.memory:
            probe = probes.fit_probe(
                experiment.protocol, train, val, len(splits.classes), seed=experiment.seed
            )
    prepared.model = features.Frozen(extractor, probe)
    prepared.batches = loader(
        splits.test, extractor.data_config, splits.policy, batch_size=prepared.batch_size
    )
    prepared.window = total([*(part.cost.window for part in parts), window], "prepare")
    prepared.peak_bytes = max(task.memory.peak_bytes, *(part.cost.peak_bytes for part in parts))
    prepared.cached = all(part.cost.cached for part in parts)
    prepared.choices, prepared.val_top1_pct = probe.choices, probe.val_top1_pct
    if experiment.protocol != "centroid":  # which has nothing but a scale
        prepared.selection_rule = "highest validation accuracy"
    prepared.fitted = sum(tensor.numel() for tensor in tensors_of(probe))


def _generative(task: _Task) -> None:
    experiment, baseline, prepared = task.experiment, task.baseline, task.prepared
    question = prompts.question(task.splits.name)
    vlm = generative.load(
        experiment.source or baseline.source,
        baseline.kind,
        dtype=task.dtype,
        device=torch.device("cpu"),
        four_bit=prepared.form.startswith("nf4"),
        revision=None if experiment.source else baseline.revision,
    )
    if prepared.form == "nf4_pruned":
        generative.prune_vocabulary(vlm, vlm.used_tokens(question, task.names))
    task.check_fits(vlm)
    vlm.to(task.device)

    def inputs(images: list[Image.Image]):
        return vlm.inputs(images, question)

    prepared.batches = task.batches(task.splits.test, inputs)
    task.memory.track(tensors_of(vlm))
    if experiment.protocol == "generate":
        with task.meter.window("prepare") as prepared.window:
            prepared.model = GenerationClassifier(vlm, task.names)
        prepared.selection_rule = "greedy decoding, label matching"
    else:
        model = TrieClassifier(vlm, question, task.names)
        generator = torch.Generator().manual_seed(experiment.seed)
        rows = torch.randperm(len(task.splits.val), generator=generator)[:CHOICE_IMAGES].tolist()
        batches = task.batches(Subset(task.splits.val, rows), inputs)
        with torch.no_grad(), task.memory:  # before the clock starts: counting takes time
            model(next(iter(batches))[0].to(task.device))
        with task.meter.window("prepare") as prepared.window:
            model.choose(batches)
        prepared.model = model
        prepared.choices = model.choices | {"aggregation": model.aggregation, "images": len(rows)}
        prepared.val_top1_pct = model.choices[model.aggregation]
        prepared.selection_rule = "aggregation of the highest validation accuracy"
    prepared.peak_bytes = task.memory.peak_bytes


def _stacked(preprocess: Callable, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([preprocess(image) for image in images])


class _Pictures(Dataset):
    """Indexed by the rows of a batch: `(inputs(images), labels)`."""

    def __init__(self, split: Dataset, inputs: Callable):
        self.split, self.inputs = split, inputs

    def __getitem__(self, rows: list[int]) -> tuple[object, torch.Tensor]:
        images, labels = zip(*(self.split[row] for row in rows))
        return self.inputs([pictures.to_pil_image(image) for image in images]), torch.tensor(labels)
