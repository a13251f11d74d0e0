"""The model card: what a saved model was trained on, how, and what that took."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch import nn

from toolkit.backbones import weights_source
from toolkit.budget import format_bytes
from toolkit.experiment import Experiment
from toolkit.measure.quantities import QUANTITIES

_SHOWN = ("train_peak_bytes", "train_seconds", "energy_joules", "params_total", "inference_macs_per_image")
_USE = """\
```python
from toolkit import load_model

load_model("FOLDER").predict("new_pictures/")
```
"""
_TIMM = """\
or without this package: `timm.create_model("local-dir:FOLDER", pretrained=True)`; classes and preprocessing
are in its `pretrained_cfg`.
"""


def model_card(config: dict, experiment: Experiment, model: nn.Module, record: Any = None) -> str:
    """Markdown with the front matter of the Hugging Face hub; `record`: the `RunRecord` of the training."""
    e = experiment
    of_timm = "build" not in config["toolkit"]
    start = weights_source(model, e.pretrained)
    licence = start["weights_license"].replace("not known", "")
    facts = {
        "data": f"{e.dataset}, {config['num_classes']} classes",
        "backbone": f"{e.backbone}, images of {config['pretrained_cfg']['input_size'][-1]} pixels a side",
        "weights at the start": ", licence ".join(filter(None, start.values())),
        "method": f"{e.method}, {e.epochs} epochs of batch {e.batch_size}, lr {e.lr:g}",
        "options": ", ".join(f"{name} {value}" for name, value in e.options.items() if value != "") or "none",
        "budget": f"{format_bytes(e.budget_bytes)}, checkpointing {e.checkpointing}",
    }
    if record is not None:
        found = record.quality | record.time | record.energy | record.memory | record.flops
        score, peak = QUANTITIES[f"test_{found['metric']}"], found["predicted_peak_bytes"]
        facts[score.title] = f"{score.text(found[score.name])} (n = {record.data['n_test']:,})"
        for name in _SHOWN:
            reason = f" ({record.missing[name]})" if found[name] is None else ""
            facts[QUANTITIES[name].title] = QUANTITIES[name].text(found[name]) + reason
        predicted = f"predicted peak {format_bytes(peak)}, " if peak else ""
        facts["plan"] = f"{predicted}micro-batches of {found['micro_batch_images']}"
    packages = ("torch", "timm", "peft")
    facts["versions"] = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    front = ["library_name: timm"] if of_timm else []
    front += ["tags: [image-classification]"] + ([f"license: {licence}"] if licence else [])
    return "\n".join(
        [
            "---", *front, "---", "", f"# {e.backbone} on {e.dataset} by {e.method}", "", _USE,
            _TIMM if of_timm else "timm alone cannot build this network.\n",
            "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), "",
            f"Classes: {', '.join(config['label_names'])}.", "",
        ]
    )  # fmt: skip
