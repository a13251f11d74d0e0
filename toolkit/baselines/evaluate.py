"""`evaluate_baseline()`: one foundation model on one data set, under the budget, as a record.

Three steps, which the notebook takes one by one: `prepare` (everything before the first test image),
`test` (one timed pass), `record_of`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2.functional import to_pil_image

from toolkit.baselines import contrastive, features, generative, probes, prompts
from toolkit.baselines.experiment import BaselineExperiment
from toolkit.baselines.matching import GenerationClassifier
from toolkit.baselines.memory_estimate import form_and_batch
from toolkit.baselines.prepared import Prepared
from toolkit.baselines.trie import TrieClassifier
from toolkit.budget import device_memory, is_out_of_memory, tensors_of
from toolkit.datasets import Splits, load_dataset, loader
from toolkit.measure import Meter, Window, total
from toolkit.measure.environment import environment
from toolkit.measure.quantities import NOT_ENDED
from toolkit.methods import summarize
from toolkit.methods.weights import weights_sha256
from toolkit.model import check_fits_weights, seed_everything
from toolkit.training.evaluation import Evaluation, attempt, evaluate
from toolkit.training.record import RunRecord

# Most validation images that a scoring rule is chosen on: the pass costs as much as a test.
CHOICE_IMAGES = 1000


def evaluate_baseline(
    name: str,
    dataset: str | Splits,
    *,
    budget: str | int | None = None,
    protocol: str | None = None,
    **parameters: object,
) -> RunRecord:
    """Evaluate the foundation model `name` on the test images of `dataset`, without training its backbone.

    `protocol`: one of the family's `PROTOCOLS`; other `parameters` as for `BaselineExperiment`.  Choices
    (probe, regularisation, scoring rule) are made on training and validation images.  Out of memory and
    scores that are not finite are statuses of the record.

    Raises `InputError` for unknown names, classes that cannot be told apart, weights that cannot be loaded,
    and, before anything is downloaded, for a model that does not fit the budget.
    """
    given = {"budget": budget, "protocol": protocol}
    parameters |= {key: value for key, value in given.items() if value is not None}
    own = isinstance(dataset, Splits)
    experiment = BaselineExperiment(baseline=name, dataset=dataset.name if own else dataset, **parameters)
    form_and_batch(experiment)  # raises before the data are downloaded, too
    splits = dataset if own else load_dataset(experiment.dataset)
    prepared = prepare(experiment, splits)
    return record_of(experiment, splits, prepared, test(experiment, prepared))


def prepare(experiment: BaselineExperiment, splits: Splits, meter: Meter | None = None) -> Prepared:
    """Load the model and get it ready for the test images of `splits`.

    Raises as `evaluate_baseline`; out of memory and features that are not finite are statuses.
    """
    form, batch_size, predicted = form_and_batch(experiment, prompts.class_names(splits))
    seed_everything(experiment.seed)
    device = torch.device(experiment.device)
    prepared = Prepared(
        form=form,
        batch_size=batch_size,
        predicted_peak_bytes=predicted,
        memory_source=device_memory(device).kind,
        environment=environment(device.type),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        _FAMILIES[experiment.family](prepared, experiment, splits, meter or Meter(device))
        prepared.weights_sha256 = weights_sha256(prepared.model)
    except FloatingPointError as error:
        prepared.fail("nan", str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        prepared.fail("oom", f"before the test: {str(error).splitlines()[0]}")
    return prepared


def test(experiment: BaselineExperiment, prepared: Prepared, meter: Meter | None = None) -> Evaluation | None:
    """One pass over the test images; None if that or the preparation failed, see `prepared.status`."""
    meter = meter or Meter(experiment.device)
    evaluation = attempt(prepared, lambda: evaluate(prepared.model, prepared.batches, meter=meter))
    if evaluation and experiment.protocol == "generate":
        unmatched = evaluation.predictions == len(prepared.model.names)
        prepared.unmatched_pct = 100 * unmatched.double().mean().item()
        # An answer names one class and has no probability.
        evaluation.scores["top5_pct"] = evaluation.loss = None
    return evaluation


def record_of(
    experiment: BaselineExperiment,
    splits: Splits,
    prepared: Prepared,
    evaluation: Evaluation | None,
) -> RunRecord:
    """Assemble the record of a baseline: a fine-tuned model's, with `prepare_*` for the work before the test.

    `evaluation`: of the test split, None if that failed.
    """
    params_total = summarize(prepared.model).total if prepared.model else None
    test = evaluation.window if evaluation else Window("test", reason=NOT_ENDED)
    windows = {"prepare": prepared.window, "test": test}
    sums = windows | {"whole": total(windows.values())}
    record = RunRecord.of_test(experiment, splits, prepared, params_total, sums, evaluation)
    record.quality |= {
        "val_top1_pct": prepared.val_top1_pct,
        "unmatched_pct": prepared.unmatched_pct,
        "selection_rule": prepared.selection_rule,
        "params_trainable": prepared.fitted,
    }
    record.time |= {"prepare_seconds": prepared.window.seconds, "prepare_cached": prepared.cached}
    within = evaluation and max(prepared.peak_bytes, evaluation.peak_bytes) <= experiment.budget_bytes
    record.memory |= {
        "prepare_peak_bytes": prepared.peak_bytes,
        "within_budget": within,
        "micro_batch_images": prepared.batch_size,
        "weights_form": prepared.form,
    }
    if not evaluation:
        del windows["test"]
    record.curves = {
        "choices": prepared.choices,
        "windows": {name: window.to_dict() for name, window in windows.items()},
    }
    record.score({"inference": "test"})
    record.explain({"predicted_peak_bytes": "predictions are for published weights, not for a folder"})
    return record


def _contrastive(prepared: Prepared, experiment: BaselineExperiment, splits: Splits, meter: Meter) -> None:
    device, templates = torch.device(experiment.device), prompts.templates(splits.name)
    both = contrastive.load(experiment.weights_source, dtype=prepared.dtype)
    check_fits_weights(both.model.visual, experiment.budget_bytes)
    model, prepared.window, prepared.peak_bytes = contrastive.zero_shot(
        both, prompts.class_names(splits), templates, device=device, meter=meter
    )
    prepared.model = model
    # The model does not compute on the same cores on a GPU.
    workers = min(4, os.cpu_count() or 1) if device.type == "cuda" else 0
    prepared.batches = _batches(
        splits.test, functools.partial(_stacked, model.preprocess), prepared.batch_size, workers
    )
    prepared.choices = {"templates": len(templates)}
    prepared.selection_rule = "nothing to choose: published prompts"


def _features(prepared: Prepared, experiment: BaselineExperiment, splits: Splits, meter: Meter) -> None:
    device = torch.device(experiment.device)
    extractor = features.extractor(
        experiment.weights_source, dtype=prepared.dtype, image_size=experiment.image_size
    )
    check_fits_weights(extractor, experiment.budget_bytes)
    extractor.to(device)
    parts = [
        features.features(
            extractor, getattr(splits, split), splits.hashes[split], splits.policy,
            layers=experiment.protocol == "linear_grid", batch_size=prepared.batch_size, meter=meter,
        )
        for split in ("train", "val")
    ]  # fmt: skip
    memory = device_memory(device)
    memory.track(tensors_of(extractor))
    with meter.window("fit") as window:
        train, val = ((part.x.to(device), part.y.to(device)) for part in parts)
        memory.track([*train, *val])
        with memory:
            probe = probes.fit_probe(
                experiment.protocol, train, val, len(splits.classes), seed=experiment.seed
            )
    prepared.model = features.Frozen(extractor, probe)
    prepared.batches = loader(
        splits.test, extractor.data_config, splits.policy, batch_size=prepared.batch_size
    )
    prepared.window = total([*(part.window for part in parts), window], "prepare")
    prepared.peak_bytes = max(memory.peak_bytes, *(part.peak_bytes for part in parts))
    prepared.cached = all(part.cached for part in parts)
    prepared.choices, prepared.val_top1_pct = probe.choices, probe.val_top1_pct
    if experiment.protocol != "centroid":  # it has only a scale
        prepared.selection_rule = "highest validation accuracy"
    prepared.fitted = sum(tensor.numel() for tensor in tensors_of(probe))


def _generative(prepared: Prepared, experiment: BaselineExperiment, splits: Splits, meter: Meter) -> None:
    device, names = torch.device(experiment.device), prompts.class_names(splits)
    baseline, question = experiment.entry, prompts.question(splits.name)
    memory = device_memory(device)
    memory.reset_peak()
    vlm = generative.load(
        experiment.weights_source,
        baseline.kind,
        dtype=prepared.dtype,
        four_bit=prepared.form.startswith("nf4"),
        revision=None if experiment.source else baseline.revision,
    )
    if prepared.form == "nf4_pruned":
        generative.prune_vocabulary(vlm, vlm.used_tokens(question, names))
    check_fits_weights(vlm, experiment.budget_bytes)
    vlm.to(device)
    memory.track(tensors_of(vlm))
    inputs = functools.partial(vlm.inputs, question=question)
    prepared.batches = _batches(splits.test, inputs, prepared.batch_size)
    if experiment.protocol == "generate":
        with meter.window("prepare") as prepared.window:
            prepared.model = GenerationClassifier(vlm, names)
        prepared.selection_rule = "greedy decoding, label matching"
    else:
        model = TrieClassifier(vlm, question, names)
        generator = torch.Generator().manual_seed(experiment.seed)
        rows = torch.randperm(len(splits.val), generator=generator)[:CHOICE_IMAGES].tolist()
        batches = _batches(Subset(splits.val, rows), inputs, prepared.batch_size)
        with torch.no_grad(), memory:  # before the clock starts: counting takes time
            model(next(iter(batches))[0].to(device))
        with meter.window("prepare") as prepared.window:
            model.choose(batches)
        prepared.model = model
        prepared.choices = model.choices | {"aggregation": model.aggregation, "images": len(rows)}
        prepared.val_top1_pct = model.choices[model.aggregation]
        prepared.selection_rule = "aggregation of the highest validation accuracy"
    prepared.peak_bytes = memory.peak_bytes


_FAMILIES = {"contrastive": _contrastive, "features": _features, "generative": _generative}


def _batches(split: Dataset, inputs: Callable, size: int, workers: int = 0) -> DataLoader:
    """Batches `(inputs(images), labels)` in the order of `split`; `images`: a list of PIL images."""
    collate = functools.partial(_collated, inputs)
    return DataLoader(split, batch_size=size, collate_fn=collate, num_workers=workers)


def _collated(inputs: Callable, rows: list[tuple[torch.Tensor, int]]) -> tuple[object, torch.Tensor]:
    images, labels = zip(*rows)
    return inputs([to_pil_image(image) for image in images]), torch.tensor(labels)


def _stacked(preprocess: Callable, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([preprocess(image) for image in images])
