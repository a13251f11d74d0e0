"""`BaselineExperiment`: the validated parameters of evaluating one foundation model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from toolkit.baselines.registry import Baseline, baseline_named
from toolkit.budget import format_bytes
from toolkit.datasets import task_of
from toolkit.errors import InputError, check_name, option
from toolkit.experiment import Parameters, Size

DRAWN = ("linear_grid", "likelihood")  # protocols that draw random numbers


@dataclass(frozen=True, kw_only=True)
class BaselineExperiment(Parameters):
    """One evaluation of a foundation model.  Raises `InputError` for a value that cannot be run."""

    notebook: ClassVar = "6_baselines"
    phase: ClassVar = "inference"

    baseline: str = option("demo_vit", "foundation model, see `toolkit baselines`")
    dataset: str = "digits"  # as for `Experiment`
    protocol: str = option("", "how it classifies, see `baselines.PROTOCOLS`; empty: the first of its family")
    source: str = option("", "folder with the files of the hub repository; empty: the hub")
    form: str = option(
        "auto", "of the weights: auto, the first that fits | fp32 | bf16 | fp16 | nf4 | nf4_pruned"
    )
    budget: Size = "2GB"  # limit on device memory
    batch_size: int = option(64, between=(1, 1_000_000))  # most images at a time; fewer if they do not fit
    image_size: int = option(224, "pixels a side, for frozen features (demo_vit: 32)", between=(16, 4096))
    # of linear_grid, and of likelihood's validation images; 0 if nothing is drawn
    seed: int = option(0, between=(0, 2**31 - 1))
    device: str = "auto"  # stored as cpu or cuda

    def __post_init__(self) -> None:
        super().__post_init__()
        if task_of(self.dataset).heads:
            raise InputError(
                f"baselines are classifiers, and dataset {self.dataset!r} is for "
                f"{task_of(self.dataset).name}: take digits, cifar100 or another of images with one class."
            )
        protocols = self.entry.protocols
        self._set("protocol", self.protocol or protocols[0])
        check_name(f"protocol of {self.baseline!r}", self.protocol, protocols)
        check_name(f"form of the weights of {self.baseline!r}", self.form, ("auto", *self.entry.forms))
        if self.form == "nf4_pruned" and self.protocol == "generate":
            raise InputError("a pruned vocabulary cannot generate answers; use protocol 'likelihood'.")
        if self.form == "fp16" and self.device == "cpu":
            raise InputError("form 'fp16' needs a GPU; on the CPU use 'fp32' or 'bf16'.")
        if self.source:
            self._set("source", str(Path(self.source).expanduser().resolve()))
            if not Path(self.source).is_dir():
                raise InputError(f"source {self.source}: there is no such folder.")
        if self.protocol not in DRAWN:
            self._set("seed", 0)

    @property
    def entry(self) -> Baseline:
        """The registry's entry."""
        return baseline_named(self.baseline)

    @property
    def family(self) -> str:
        """contrastive | features | generative."""
        return self.entry.family

    @property
    def weights_source(self) -> str:
        """The place where the family's loader finds the weights: `source` if it is given."""
        prefix = "" if self.family == "generative" else "local-dir:"
        return f"{prefix}{self.source}" if self.source else self.entry.source

    @property
    def config(self) -> dict:
        """The parameters, with baseline and protocol under the names of fine-tuned runs' columns too."""
        return self.to_dict() | {
            "backbone": self.baseline,
            "method": self.protocol,
            "checkpointing": "none",
        }

    @property
    def name(self) -> str:
        """A readable folder name that ends in the `id`."""
        return self._folder_name(self.baseline, self.protocol)

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.baseline} by {self.protocol} on {self.dataset}, "
            f"budget {format_bytes(self.budget_bytes)}, weights {self.form}, on {self.device}"
        )
