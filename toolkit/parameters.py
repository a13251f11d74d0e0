"""`Parameters`: what the validated parameters of fine-tuning and of baselines have in common.

A notebook builds them in one line from its parameters cell, the command line from its flags.  Every
field changes what is computed or measured; what does not (where files go, how often a snapshot is
written) is no field.  What a path or a weight file holds is not part of it: records carry those hashes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Self

import torch

from toolkit.budget import parse_bytes
from toolkit.errors import InputError, check_name

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
