"""`Experiment`: the validated parameters of one run, and its identity.

A notebook builds it in one line from its parameters cell, the command line from its flags.  Every
field changes what is trained or measured; what does not (where files go, how often a checkpoint is
written) is no field.  What a path or a weight file holds is not part of it: records carry those hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from toolkit.budget import STRATEGIES, format_bytes, parse_bytes
from toolkit.errors import InputError, check_name
from toolkit.hyperparameters import hyperparameters
from toolkit.methods import METHODS

PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One fine-tuning run.  Raises `InputError` for a value that cannot be run."""

    dataset: str = "digits"  # digits | textures | cifar100 | dtd | folder:PATH
    backbone: str = (
        "demo_vit"  # demo_vit | vit_small | tiny_vit | vim_small | mambavision_t | small:NAME | any timm name
    )
    pretrained: bool = True
    method: str = "lora"
    checkpointing: str = "planned"  # none | static | threshold | planned
    budget: str = "2GB"  # device memory that training may take; stored as whole bytes
    threshold: float = 0.55  # tau of `checkpointing="threshold"`, a fraction of the budget
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    double_quantisation: bool = False  # of `method="qlora"`: the scales of packed weights are packed too
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
        for field in fields(self):
            object.__setattr__(self, field.name, _checked_type(field, getattr(self, field.name)))
        check_name("method", self.method, METHODS)
        check_name("checkpointing strategy", self.checkpointing, STRATEGIES)
        check_name("precision", self.precision, PRECISIONS)
        check_name("device", self.device, DEVICES)
        object.__setattr__(self, "budget", str(parse_bytes(self.budget)))
        if self.device == "auto":
            object.__setattr__(self, "device", "cuda" if torch.cuda.is_available() else "cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("device 'cuda': torch sees no CUDA device here; use device 'cpu' or 'auto'.")
        if self.precision == "fp16" and self.device == "cpu":
            raise InputError("precision 'fp16' needs a GPU; on the CPU use 'fp32' or 'bf16'.")
        if self.dataset.startswith("folder:"):  # kernels start in another folder than the command line
            path = Path(self.dataset.removeprefix("folder:")).expanduser().resolve()
            object.__setattr__(self, "dataset", f"folder:{path}")
        if self.lr == 0:
            object.__setattr__(self, "lr", hyperparameters(self.backbone, self.method).lr)
        self._check_ranges()

    def _check_ranges(self) -> None:
        bounds = {
            "epochs": (1, 100_000),
            "batch_size": (1, 1_000_000),
            "micro_batch_size": (0, self.batch_size),
            "lr": (0, 100),
            "weight_decay": (0, 100),
            "warmup_fraction": (0, 1),
            "threshold": (0, 1),
            "lora_rank": (1, 4096),
            "lora_alpha": (1, 65536),
            "lora_dropout": (0, 0.99),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name} must lie between {low} and {high}, got {value}.")

    @classmethod
    def from_namespace(cls, namespace: dict) -> Experiment:
        """Build from a notebook's parameters cell: `Experiment.from_namespace(globals())`."""
        missing = [field.name for field in fields(cls) if field.name not in namespace]
        if missing:
            raise InputError(f"the parameters cell lacks {', '.join(missing)}.")
        return cls(**{field.name: namespace[field.name] for field in fields(cls)})

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes."""
        return int(self.budget)

    @property
    def method_options(self) -> dict:
        """The parameters that `adapt(model, method, **options)` takes for this method."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}

    def to_dict(self) -> dict:
        """The parameters as plain JSON values; `Experiment(**e.to_dict()) == e`."""
        return dataclasses.asdict(self)

    @property
    def id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of all parameters."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """A readable folder name that ends in the `id`."""
        dataset = "".join(c if c.isalnum() else "-" for c in self.dataset)[-24:].strip("-")
        backbone = "".join(c if c.isalnum() or c == "_" else "-" for c in self.backbone)[:40]
        return f"{dataset}-{backbone}-{self.method}-{self.checkpointing}-s{self.seed}-{self.id}"

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.method} on {self.backbone}, {self.dataset}, checkpointing {self.checkpointing}, "
            f"budget {format_bytes(self.budget_bytes)}, {self.epochs} epochs of batch {self.batch_size}, "
            f"{self.precision} on {self.device}, seed {self.seed}"
        )


def _checked_type(field: dataclasses.Field, value: object) -> object:
    """`value` if it has the field's type (an int is welcome where a float is asked for)."""
    expected = {"str": str, "int": int, "float": float, "bool": bool}[field.type]
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if field.name == "budget" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise InputError(f"{field.name} must be {field.type}, got {value!r} ({type(value).__name__}).")
    return value
