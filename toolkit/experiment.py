"""`Experiment`: the validated parameters of one fine-tuning run, and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Self

import torch

from toolkit.budget import STRATEGIES, Strategy, format_bytes, parse_bytes
from toolkit.datasets import find_dataset, task_of
from toolkit.errors import InputError, Options, check_name, one_line, option, printable
from toolkit.methods import BATCH_NORMS, METHODS, check_statistics

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16", "fp16")
MOST_PATH_BYTES = 4096
Size = int | str  # bytes: a number, or text such as "2GB" or "1.5 GiB"; stored as a number


def identity(parameters: Mapping) -> str:
    """First 12 hex digits of the sha256 of the canonical JSON of all parameters of a run."""
    canonical = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _resolved(folder: str) -> Path:
    """The absolute path of a folder; raises `InputError` for what cannot be one."""
    try:
        if not folder or "\0" in folder or len(folder.encode()) > MOST_PATH_BYTES:
            raise ValueError("no path")
        return Path(folder).expanduser().resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a loop of links, no text, ...
        raise InputError(
            f"dataset {'folder:' + folder[:100]!r} names no folder ({one_line(error)}); write folder:PATH."
        ) from None


@dataclass(frozen=True)
class Parameters(Options):
    """Base of frozen dataclasses with the fields `dataset`, `budget`, `device` and `seed`, among others.

    Raises `InputError` for a value of another type or out of range, and for a budget or device that cannot
    be had.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("budget", parse_bytes(self.budget))
        check_name("device", self.device, DEVICES)
        if self.device == "auto":
            self._set("device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device 'cuda': torch sees no CUDA device here; use device 'cpu' or 'auto'.")
        if self.dataset.startswith("folder:"):  # kernels start in another folder than the command line
            self._set("dataset", f"folder:{_resolved(self.dataset.removeprefix('folder:'))}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def flat(cls, **values: object) -> Self:
        """Build from fields and options side by side, as command lines and sweep files name them."""
        return cls(**values)

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
        return self.budget

    def to_dict(self) -> dict:
        """The parameters as plain JSON values; `Experiment(**e.to_dict()) == e`."""
        return dataclasses.asdict(self)

    @classmethod
    def flat_types(cls) -> dict[str, str]:
        """Names and types of what `flat` takes."""
        return {field.name: field.type for field in fields(cls)}

    def flat_dict(self) -> dict:
        """Fields and options side by side."""
        return self.to_dict()

    @property
    def config(self) -> dict:
        """What a record keeps of them."""
        return self.to_dict()

    @property
    def id(self) -> str:
        """The `identity` of the parameters."""
        return identity(self.to_dict())

    def _folder_name(self, model: str, *rest: str) -> str:
        dataset = "".join(c if c.isalnum() else "-" for c in self.dataset)[-40:].strip("-")
        model = "".join(c if c.isalnum() or c == "_" else "-" for c in model)[:40]
        return "-".join([dataset, model, *rest, f"s{self.seed}", self.id])


@dataclass(frozen=True, kw_only=True)
class Experiment(Parameters):
    """One fine-tuning run.  Raises `InputError` for a value that cannot be run.

    `options` are those of the chosen method and checkpointing strategy, such as `{"rank": 4}`; defaults are
    filled in, so that equal runs are one run.
    """

    notebook: ClassVar = "1_finetune"  # that runs it
    phase: ClassVar = "training"

    dataset: str = option("digits", "data set: digits | textures | cifar100 | mosaics | folder:PATH | ...")
    head: str = option("", "head of dense tasks: fpn | upernet | retinanet | faster_rcnn | mask_rcnn")
    backbone: str = option("demo_vit", "demo_vit | vit_small | tiny_vit | ..., any timm name, or small:NAME")
    pretrained: bool = option(True, "start from pretrained weights: true | false")
    resolution: int = option(0, "side of the images in pixels; 0: the backbone's own", between=(0, 4096))
    method: str = option("lora", " | ".join(METHODS))
    options: dict = dataclasses.field(default_factory=dict)  # of the method and the strategy
    checkpointing: str = option("planned", " | ".join(STRATEGIES))
    budget: Size = option("2GB", "device memory for training, such as 2GB, 1.5GiB or plain bytes")
    batch_norm: str = option("auto", "statistics of batch norms; auto: the method's", choices=BATCH_NORMS)
    feature_cache: Size = option(0, "disk space for features that are computed once; 0: in every epoch")
    epochs: int = option(5, "passes over the training images", between=(1, 100_000))
    batch_size: int = option(64, "images per optimizer step", between=(1, 1_000_000))
    micro_batch_size: int = option(0, "images per forward pass; 0: the plan's choice, or the whole batch")
    lr: float = option(0.0, "peak learning rate; 0: the method's for this backbone", between=(0, 100))
    weight_decay: float = option(0.05, "decoupled weight decay of AdamW", between=(0, 100))
    warmup_fraction: float = option(0.1, "linear warm-up, share of all steps; then cosine", between=(0, 1))
    precision: str = option("fp32", "of the forward pass", choices=PRECISIONS)
    seed: int = option(0, "of all random numbers", between=(0, 2**31 - 1))
    device: str = option("auto", " | ".join(DEVICES))  # stored as cpu or cuda

    def __post_init__(self) -> None:
        super().__post_init__()
        method = METHODS[check_name("method", self.method, METHODS)]
        check_name("checkpointing strategy", self.checkpointing, STRATEGIES)
        if not 0 <= self.micro_batch_size <= self.batch_size:
            raise InputError(
                f"micro_batch_size must lie between 0 and {self.batch_size}, the batch_size, got "
                f"{self.micro_batch_size}."
            )
        self._set("options", _checked_options(self.method, self.checkpointing, self.options))
        if self.precision == "fp16" and self.device == "cpu":
            raise InputError("precision 'fp16' needs a GPU; on the CPU use 'fp32' or 'bf16'.")
        if self.precision == "fp16" and not method.scales_gradients:
            raise InputError(
                f"method {self.method!r} cannot scale gradients, which precision 'fp16' needs; use 'bf16' or "
                "'fp32'."
            )
        if self.backbone.startswith("small:"):  # shrunk: there are no weights of that shape
            self._set("pretrained", False)
        if self.lr == 0:
            self._set("lr", method.learning_rate(self.backbone).lr)
        check_statistics(self.method, self.batch_norm)
        if self.batch_norm == method.batch_norm:
            self._set("batch_norm", "auto")
        if self.task == "detection" and STRATEGIES[self.checkpointing].plans:
            others = [repr(name) for name, strategy in STRATEGIES.items() if not strategy.plans]
            raise InputError(
                f"checkpointing {self.checkpointing!r} cannot predict detectors: what their losses compute "
                f"depends on the boxes in the images; choose {' or '.join(others)}."
            )
        self._check_task()
        self._check_feature_cache()

    def __hash__(self) -> int:
        return hash(self.id)

    def _check_task(self) -> None:
        heads, tasks = task_of(self.dataset).heads, METHODS[self.method].tasks
        if not heads and self.head:
            raise InputError(
                f"head {self.head!r} is for dense tasks, and dataset {self.dataset!r} is for "
                "classification: leave it empty."
            )
        if heads:
            self._set("head", check_name(f"head for {self.task}", self.head or heads[0], heads))
        if self.head == "mask_rcnn" and not find_dataset(self.dataset).instances:
            raise InputError(
                f"head 'mask_rcnn' learns from masks of instances, which dataset {self.dataset!r} lacks; "
                "choose 'faster_rcnn', or dataset 'digit_scenes'."
            )
        if self.task not in tasks:
            similar = [
                repr(name)
                for name, other in METHODS.items()
                if self.task in other.tasks and other.frozen_backbone
            ]
            raise InputError(
                f"method {self.method!r} is for {' and '.join(tasks)}, and dataset {self.dataset!r} is for "
                f"{self.task}; choose {' or '.join(similar)}."
            )

    def _check_feature_cache(self) -> None:
        self._set("feature_cache", parse_bytes(self.feature_cache) if self.feature_cache else 0)
        if self.feature_cache and task_of(self.dataset).heads:
            raise InputError(f"feature_cache is for classification; {self.task} computes its features.")
        if self.feature_cache and not METHODS[self.method].frozen_features:
            able = [name for name, method in METHODS.items() if method.frozen_features]
            raise InputError(
                f"feature_cache: under method {self.method!r} features change as it trains; choose "
                f"{' or '.join(able)}, or leave it empty."
            )

    @classmethod
    def flat(cls, **values: object) -> Self:
        """Build from fields and options side by side, as command lines and sweep files name them.

        Options of other methods and strategies are left out, so that one list of values serves several
        methods.  Raises `InputError` for a name that no method or strategy has.
        """
        given, declared = dict(values), option_fields()
        options = dict(given.pop("options", {}))
        for name in (*given, *options):
            check_name("parameter or option", name, cls.flat_types())
        options |= {name: given.pop(name) for name in declared if name in given}
        defaults = {field.name: field.default for field in fields(cls)}
        chosen = [given.get(name, defaults[name]) for name in ("method", "checkpointing")]
        own = {n: value for n, value in options.items() if any(name in chosen for name in declared[n])}
        return cls(**given, options=own)

    @classmethod
    def flat_types(cls) -> dict[str, str]:
        """Names and types of what `flat` takes."""
        options = {name: next(iter(owners.values())).type for name, owners in option_fields().items()}
        return {field.name: field.type for field in fields(cls) if field.name != "options"} | options

    def flat_dict(self) -> dict:
        """Fields and options side by side."""
        flat = self.to_dict()
        return flat | flat.pop("options")

    def variant(self, **changes: object) -> Self:
        """A copy with other fields or options.

        Options that another method or strategy does not share (declares for itself) are left out.
        """
        flat, declared = self.to_dict() | changes, option_fields()
        for name in self.options:
            for kind in ("method", "checkpointing"):
                before, now = declared[name].get(getattr(self, kind)), declared[name].get(flat[kind])
                if before is not None and before is not now:
                    del flat["options"][name]
        return self.flat(**flat)

    @property
    def task(self) -> str:
        """classification | segmentation | detection, by the data set."""
        return task_of(self.dataset).name

    @property
    def method_options(self) -> dict:
        """The parameters that `adapt(model, method, **options)` takes for this method."""
        own = {name: self.options[name] for name in METHODS[self.method].options.names()}
        return own | {"batch_norm": self.batch_norm}

    @property
    def strategy(self) -> Strategy:
        """The checkpointing strategy with its options."""
        chosen = STRATEGIES[self.checkpointing]
        return chosen(**{name: self.options[name] for name in chosen.names()})

    @property
    def name(self) -> str:
        """A readable folder name that ends in the `id`."""
        return self._folder_name(self.backbone, self.method, self.checkpointing)

    def describe(self) -> str:
        """One line for people."""
        return printable(
            f"{self.method} on {self.backbone}, {self.dataset}, checkpointing {self.checkpointing}, "
            f"budget {format_bytes(self.budget_bytes)}, {self.epochs} epochs of batch {self.batch_size}, "
            f"{self.precision} on {self.device}, seed {self.seed}"
        )


def option_fields() -> dict[str, dict[str, dataclasses.Field]]:
    """All options by name, each with the methods and strategies that have it and its field there."""
    found: dict[str, dict[str, dataclasses.Field]] = {}
    kinds = {name: method.options for name, method in METHODS.items()} | STRATEGIES
    for owner, kind in kinds.items():
        for field in fields(kind):
            found.setdefault(field.name, {})[owner] = field
    return found


def _checked_options(method: str, checkpointing: str, options: object) -> dict:
    """`options` with defaults filled in; raises `InputError` for those that neither of the two has."""
    if not isinstance(options, Mapping):
        raise InputError(f"options must be a mapping such as {{'rank': 4}}, got {options!r}.")
    kinds = METHODS[method].options, STRATEGIES[checkpointing]
    own = [name for kind in kinds for name in kind.names()]
    owners = option_fields()
    for name in options:
        if name not in own and name in owners:
            raise InputError(
                f"method {method!r} with checkpointing {checkpointing!r} has no option {name!r}; "
                f"options of that name: {', '.join(owners[name])}."
            )
        check_name(f"option of method {method!r}", name, own or ["(it has none)"])
    checked = {}
    for kind in kinds:
        checked |= dataclasses.asdict(kind(**{n: v for n, v in options.items() if n in kind.names()}))
    return checked


# --- the previous schema: options of all methods were fields ---

_OLD_RANKS = {"galore": "galore_rank", "losa": "side_rank", "dtl": "side_rank", "e3va": "side_rank"}
_OLD_NAMES = {
    "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_targets", "gap": "galore_gap",
    "scale": "galore_scale", "reduction": "side_reduction", "taps": "side_taps",
    "feedback": "dtl_feedback", "four_bit": "four_bit_backbone", "tau": "threshold",
}  # fmt: skip
# Fields of the previous schema that are gone, with the value by which runs are as today's.  Pruned starts of
# LST ("pruned", "auto" on transformers) are not.
_REMOVED = {
    "galore": {"galore_spectrum": 0.0},
    "losa": {"losa_start": "last", "losa_mixer": "both"},
    "lst": {"lst_init": "random"},
    "dtl": {"dtl_backprop": True},
}
OLD_FIELDS = {"lora_rank", "clip_rank", "depthwise", "double_quantisation"}.union(
    _OLD_RANKS.values(), _OLD_NAMES.values(), *_REMOVED.values()
)


def upgrade(parameters: Mapping) -> dict:
    """Parameters of a run under today's names, from those of the previous schema (or today's, unchanged).

    A removed option whose value made another run stays among `options`, where `Experiment` refuses it.
    """
    if "options" in parameters:
        return dict(parameters)
    method, checkpointing = parameters["method"], parameters["checkpointing"]
    kinds = METHODS[check_name("method", method, METHODS)].options, STRATEGIES[checkpointing]
    options = {}
    for name in (name for kind in kinds for name in kind.names()):
        old = _OLD_RANKS.get(method, "lora_rank") if name == "rank" else _OLD_NAMES.get(name, name)
        if old in parameters:
            options[name] = parameters[old]
    for name, today in _REMOVED.get(method, {}).items():
        if parameters.get(name, today) != today:
            options[name] = parameters[name]
    names = [field.name for field in fields(Experiment) if field.name in parameters]
    sizes = {name: int(parameters[name] or 0) for name in ("budget", "feature_cache") if name in names}
    return {name: parameters[name] for name in names} | sizes | {"options": options}


def _load_plugins() -> None:
    """Import own methods, data sets, metrics and backbones, which register themselves.

    They are the modules named in `TOOLKIT_PLUGINS`, separated by commas, and installed entry points of the
    group "toolkit.plugins".  Raises `InputError` for one that cannot be imported.
    """
    named = filter(None, os.environ.get("TOOLKIT_PLUGINS", "").split(","))
    installed = (entry.module for entry in importlib.metadata.entry_points(group="toolkit.plugins"))
    for name in (*named, *installed):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InputError(f"plugin {name!r} cannot be imported: {one_line(error)}.") from error


_load_plugins()  # here, so that every process that builds an experiment knows them
