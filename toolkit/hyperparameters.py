"""Learning rates by backbone and method, each with where it comes from: one table for everything.

The other hyperparameters are the same for all methods and stand in `Experiment`, which takes its learning
rate from here unless it is given one.  `notebooks/tune.ipynb` searches on
the validation split; nothing here was chosen by a test split.
"""

from __future__ import annotations

from dataclasses import dataclass

_TUNED = "searched here on the validation splits of digits and textures, notebooks/tune.ipynb"
_SCRIPTS = "training scripts of arXiv 2607.02158"
_NOT_TRIED = "not searched here"


@dataclass(frozen=True)
class Hyperparameters:
    """Of AdamW with weight decay 0.05, linear warm-up over a tenth of the steps and a cosine to zero."""

    lr: float  # peak
    source: str


# What a method needs changes little between backbones of one kind; "default" serves those without a row.
TABLE: dict[str, dict[str, Hyperparameters]] = {
    "demo_vit": {
        "linear": Hyperparameters(1e-2, _TUNED),
        "bitfit": Hyperparameters(5e-3, _TUNED),
        "norm": Hyperparameters(2e-2, _TUNED),
        "lora": Hyperparameters(3e-3, _TUNED),
        "dora": Hyperparameters(5e-3, _TUNED),
        "adalora": Hyperparameters(2e-2, _TUNED),
        "qlora": Hyperparameters(
            5e-3, "searched here on the validation split of digits, notebooks/tune.ipynb"
        ),
        "full": Hyperparameters(1e-3, _TUNED),
    },
    # The scripts train everything and adapters alike at 5e-4, and full fine-tuning ends 6 points below LoRA;
    # hence less here.
    "default": {
        "linear": Hyperparameters(1e-3, _NOT_TRIED),
        "bitfit": Hyperparameters(1e-3, f"{_NOT_TRIED}; 5e-4 in the {_SCRIPTS}"),
        "norm": Hyperparameters(1e-3, _NOT_TRIED),
        "lora": Hyperparameters(5e-4, _SCRIPTS),
        "dora": Hyperparameters(5e-4, f"as lora; {_NOT_TRIED}"),
        "adalora": Hyperparameters(5e-4, _SCRIPTS),
        "qlora": Hyperparameters(5e-4, _SCRIPTS),
        "full": Hyperparameters(1e-4, f"{_NOT_TRIED}; 5e-4 in the {_SCRIPTS}"),
    },
    "vim_small": {
        "lora": Hyperparameters(1e-3, f"{_SCRIPTS}; MambaPEFT, arXiv 2411.03855"),
        "dora": Hyperparameters(1e-3, f"as lora; {_NOT_TRIED}"),
        "adalora": Hyperparameters(1e-3, _SCRIPTS),
        "qlora": Hyperparameters(1e-3, f"as lora; {_NOT_TRIED}"),
        "full": Hyperparameters(1e-4, _SCRIPTS),
    },
}


def hyperparameters(backbone: str, method: str) -> Hyperparameters:
    """The row for a backbone and a method; that of any backbone if it has none of its own."""
    return TABLE.get(backbone, {}).get(method) or TABLE["default"][method]
