"""`Experiment`: the validated parameters of one fine-tuning run, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import torch

from toolkit.budget import STRATEGIES, format_bytes, parse_bytes
from toolkit.datasets import find_dataset, task_of
from toolkit.errors import InputError, check_name
from toolkit.methods import (
    BATCH_NORMS,
    CACHEABLE,
    DENSE_METHODS,
    METHODS,
    SIDE_METHODS,
    check_statistics,
    options_not_of,
)
from toolkit.methods.learning_rates import hyperparameters
from toolkit.methods.losa import MIXERS
from toolkit.methods.losa import STARTS as LOSA_STARTS
from toolkit.methods.lst import STARTS as LST_STARTS

DEVICES = ("auto", "cpu", "cuda")


class Parameters:
    """Base of frozen dataclasses with the fields `dataset`, `budget`, `device` and `seed`, among others.

    Raises `InputError` for a value of another type, and for a budget or device that cannot be had.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            self._set(field.name, _checked_type(field, getattr(self, field.name)))
        self._set("budget", str(parse_bytes(self.budget)))
        check_name("device", self.device, DEVICES)
        if self.device == "auto":
            self._set("device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device 'cuda': torch sees no CUDA device here; use device 'cpu' or 'auto'.")
        if self.dataset.startswith("folder:"):  # kernels start in another folder than the command line
            path = Path(self.dataset.removeprefix("folder:")).expanduser().resolve()
            self._set("dataset", f"folder:{path}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_ranges(self, **bounds: tuple[float, float]) -> None:
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} must lie between {low} and {high}, got {value}.")

    @classmethod
    def from_namespace(cls, namespace: dict) -> Self:
        """Build from a notebook's parameters cell: `Experiment.from_namespace(globals())`."""
        missing = [field.name for field in fields(cls) if field.name not in namespace]
        if missing:
            raise InputError(f"the parameters cell lacks {', '.join(missing)}.")
        return cls(**{field.name: namespace[field.name] for field in fields(cls)})

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return int(self.budget)

    def to_dict(self) -> dict:
        """The parameters as plain JSON values; `Experiment(**e.to_dict()) == e`."""
        return dataclasses.asdict(self)

    @property
    def config(self) -> dict:
        """What a record keeps of them."""
        return self.to_dict()

    @property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of all parameters."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    def _folder_name(self, model: str, *rest: str) -> str:
        dataset = "".join(c if c.isalnum() else "-" for c in self.dataset)[-40:].strip("-")
        model = "".join(c if c.isalnum() or c == "_" else "-" for c in model)[:40]
        return "-".join([dataset, model, *rest, f"s{self.seed}", self.id])


def _checked_type(field: dataclasses.Field, value: object) -> object:
    """`value` if it has the field's type; an int is welcome where a float, a path where text is asked for."""
    expected = {"str": str, "int": int, "float": float, "bool": bool}[field.type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if field.name == "budget" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if expected is str and isinstance(value, Path):
        value = str(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise InputError(f"{field.name} must be {field.type}, got {value!r} ({type(value).__name__}).")
    return value


PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Experiment(Parameters):
    """One fine-tuning run.  Raises `InputError` for a value that cannot be run.

    Options that the chosen method does not have are set back to their defaults: equal runs are one run.
    """

    notebook: ClassVar = "finetune"  # that runs it
    phase: ClassVar = "training"

    dataset: str = "digits"  # a name of `datasets.DATASETS`, such as dtd | digits-c:mixed:3 | folder:PATH
    head: str = ""  # of dense tasks: fpn | upernet | retinanet | faster_rcnn | mask_rcnn; "": the first
    backbone: str = "demo_vit"  # a name of `backbones.BACKBONES` | any timm name | small:NAME
    pretrained: bool = True
    method: str = "lora"
    checkpointing: str = "planned"  # none | static | threshold | planned
    budget: str = "2GB"  # device memory that training may take; stored as whole bytes
    threshold: float = 0.55  # tau of `checkpointing="threshold"`, a fraction of the budget
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_targets: str = ""  # regular expression of whole names of layers to adapt; "": the backbone's own
    clip_rank: bool = False  # layers too narrow for `lora_rank` take the most that they allow
    depthwise: str = "train"  # beside adapters of convolutions: train | freeze those with groups
    double_quantisation: bool = False  # of `method="qlora"`: the scales of packed weights are packed too
    galore_rank: int = 32  # of the subspace in which GaLore keeps the optimizer's state
    galore_gap: int = 50  # steps from one choice of it to the next
    galore_scale: float = 1.0  # of the update
    galore_spectrum: float = 0.0  # share of the squared singular values that it holds, at most `galore_rank`
    # of them; 0: always `galore_rank`
    side_rank: int = 8  # of LoSA's mixers, DTL's path, and both factors of E3VA's adapters
    side_reduction: int = 8  # LST's width and the inside of E3VA's adapters: the backbone's over this
    side_taps: int = 0  # blocks that LoSA and LST read, spread evenly, the last included; 0: all
    losa_start: str = "last"  # features that LoSA refines: those that the head reads, or the first tapped
    losa_mixer: str = "both"  # both | channels | tokens
    lst_init: str = "auto"  # pruned | random | auto, pruned where the backbone's blocks allow it
    dtl_feedback: int = 0  # last blocks that DTL's path feeds back into; 0: half of those on the path
    dtl_backprop: bool = True  # gradients run through these blocks, as published
    four_bit_backbone: bool = False  # of side methods: linear layers in the frozen blocks are packed
    feature_cache: str = ""  # bytes on disk for features that are computed once; "": in every epoch
    batch_norm: str = "auto"  # statistics: frozen | updated | auto, updated by the methods that train all
    epochs: int = 5
    batch_size: int = 64
    micro_batch_size: int = 0  # images per forward pass; 0: the plan's choice, without one the whole batch
    lr: float = 0.0  # peak learning rate; 0 = that of `hyperparameters.TABLE`
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1  # of all steps, linear; cosine to zero afterwards
    precision: str = "fp32"
    seed: int = 0
    device: str = "auto"  # stored as cpu or cuda

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("method", self.method, METHODS)
        check_name("checkpointing strategy", self.checkpointing, STRATEGIES)
        check_name("precision", self.precision, PRECISIONS)
        if self.precision == "fp16" and self.device == "cpu":
            raise InputError("precision 'fp16' needs a GPU; on the CPU use 'fp32' or 'bf16'.")
        if self.backbone.startswith("small:"):  # shrunk: there are no weights of that shape
            self._set("pretrained", False)
        if self.lr == 0:
            self._set("lr", hyperparameters(self.backbone, self.method).lr)
        check_name("depthwise", self.depthwise, ("train", "freeze"))
        check_name("batch_norm", self.batch_norm, BATCH_NORMS)
        check_statistics(self.method, self.batch_norm)
        check_name("losa_start", self.losa_start, LOSA_STARTS)
        check_name("losa_mixer", self.losa_mixer, MIXERS)
        check_name("lst_init", self.lst_init, LST_STARTS)
        if self.task == "detection" and self.checkpointing == "planned":
            raise InputError(
                "checkpointing 'planned' cannot predict detectors: what their losses compute depends on the "
                "boxes that they meet; choose 'none', 'static' or 'threshold'."
            )
        self._check_head()
        self._check_feature_cache()
        if self.method == "galore" and self.precision == "fp16":
            raise InputError(
                "method 'galore' cannot scale gradients, which precision 'fp16' needs: it has projected them "
                "by then; use 'bf16' or 'fp32'."
            )
        self._check_ranges(
            epochs=(1, 100_000),
            batch_size=(1, 1_000_000),
            micro_batch_size=(0, self.batch_size),
            lr=(0, 100),
            weight_decay=(0, 100),
            warmup_fraction=(0, 1),
            threshold=(0, 1),
            lora_rank=(1, 4096),
            lora_alpha=(1, 65536),
            lora_dropout=(0, 0.99),
            galore_rank=(1, 65536),
            galore_gap=(1, 1_000_000),
            galore_scale=(0, 1000),
            galore_spectrum=(0, 1),
            side_rank=(1, 4096),
            side_reduction=(1, 4096),
            side_taps=(0, 10_000),
            dtl_feedback=(0, 10_000),
            seed=(0, 2**31 - 1),
        )
        self._forget_what_is_ignored()

    def _check_head(self) -> None:
        heads = task_of(self.dataset).heads
        if not heads:
            if self.head:
                raise InputError(
                    f"head {self.head!r} is for dense tasks, and dataset {self.dataset!r} is for "
                    "classification: leave it empty."
                )
        else:
            self._set("head", check_name(f"head for {self.task}", self.head or heads[0], heads))
            if self.head == "mask_rcnn" and not find_dataset(self.dataset).instances:
                raise InputError(
                    f"head 'mask_rcnn' learns from masks of instances, which dataset {self.dataset!r} lacks; "
                    "choose 'faster_rcnn', or dataset 'digit_scenes'."
                )
            if self.feature_cache:
                raise InputError(f"feature_cache is for classification; {self.task} computes its features.")
        if self.method in DENSE_METHODS and not heads:
            raise InputError(
                f"method {self.method!r} is for dense tasks, and dataset {self.dataset!r} is for "
                "classification; choose 'losa', 'lst' or 'dtl'."
            )
        if heads and self.method in SIDE_METHODS:
            raise InputError(f"method {self.method!r} is for classification; for {self.task} choose 'e3va'.")

    def _check_feature_cache(self) -> None:
        if not self.feature_cache:
            return
        self._set("feature_cache", str(parse_bytes(self.feature_cache)))
        if self.method not in CACHEABLE:
            raise InputError(
                f"feature_cache: under method {self.method!r} features change as it trains; choose "
                f"{' or '.join(CACHEABLE)}, or leave it empty."
            )

    @property
    def task(self) -> str:
        """classification | segmentation | detection, by the data set."""
        return task_of(self.dataset).name

    def _forget_what_is_ignored(self) -> None:
        ignored = options_not_of(self.method)
        if self.batch_norm == METHODS[self.method].batch_norm:  # as "auto" says
            ignored.add("batch_norm")
        for field in fields(self):
            if field.name in ignored:
                self._set(field.name, field.default)

    @property
    def method_options(self) -> dict:
        """The parameters that `adapt(model, method, **options)` takes for this method."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}

    @property
    def optimizer_options(self) -> dict:
        """The parameters that `optimizer_for(model, method, **options)` takes for this method."""
        return {name: getattr(self, name) for name in METHODS[self.method].optimizer_options}

    @property
    def name(self) -> str:
        """A readable folder name that ends in the `id`."""
        return self._folder_name(self.backbone, self.method, self.checkpointing)

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.method} on {self.backbone}, {self.dataset}, checkpointing {self.checkpointing}, "
            f"budget {format_bytes(self.budget_bytes)}, {self.epochs} epochs of batch {self.batch_size}, "
            f"{self.precision} on {self.device}, seed {self.seed}"
        )
