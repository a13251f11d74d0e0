"""`Experiment`: the validated parameters of one fine-tuning run, and its identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolkit.budget import STRATEGIES, format_bytes
from toolkit.errors import InputError, check_name
from toolkit.hyperparameters import hyperparameters
from toolkit.methods import METHODS
from toolkit.parameters import Parameters

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Experiment(Parameters):
    """One fine-tuning run.  Raises `InputError` for a value that cannot be run."""

    notebook: ClassVar = "finetune"  # that runs it
    phase: ClassVar = "training"

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
            seed=(0, 2**31 - 1),
        )

    @property
    def method_options(self) -> dict:
        """The parameters that `adapt(model, method, **options)` takes for this method."""
        return {name: getattr(self, name) for name in METHODS[self.method].options}

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
