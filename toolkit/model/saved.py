"""A trained model as a folder that one can take away, in the local form of timm.

    model.safetensors  all weights, with the updates of adapters merged in
    config.json        how to build the network, its classes and its preprocessing; digest of the weights
    adapter/           peft's adapter alone, where the method has one
    README.md          the model card

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same network, unless timm lacks it: side
networks, dense heads and the own backbones of this package are rebuilt from the parameters of their run.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from toolkit.backbones import data_config
from toolkit.backbones.checkpoints import fill, read_weights
from toolkit.datasets import Splits
from toolkit.errors import InputError, one_line
from toolkit.experiment import Experiment
from toolkit.files import sha256_of, write_atomically
from toolkit.methods import adapt, merge
from toolkit.methods.low_rank import unpack
from toolkit.model import build_network
from toolkit.model.card import model_card
from toolkit.model.predictor import Predictor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
OWN = "toolkit"  # key of the configuration that timm does not read


def save_model(
    folder: Path | str, model: nn.Module, splits: Splits, experiment: Experiment, record: Any = None
) -> Path:
    """Write the trained `model` of `experiment` and its card into `folder`, which is returned.

    `splits`: the data that it was trained on, for its classes and its preprocessing; `record`: the
    `RunRecord` of its training, for the card.  `model` stays as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = hasattr(model, "merge_and_unload")
    if adapters:
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        (folder / "adapter/README.md").unlink()  # a form that nobody fills in
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format)
    plain = unpack(merge(plain) if adapters else plain)
    images = data_config(plain) | {"crop_mode": "center"}
    if splits.policy.crop_scale is None:  # whole images, see `datasets.batches`
        images |= {"crop_mode": "squash", "crop_pct": 1.0}
    own: dict[str, Any] = {"task": splits.task, "dataset": splits.name, "method": experiment.method}
    known = plain.pretrained_cfg.get("architecture", "")
    if type(plain).__module__.startswith("timm.") and timm.is_model(known):
        save_for_hf(
            plain, folder, {"label_names": splits.classes}, safe_serialization=True, data_config=images
        )
        config = json.loads((folder / CONFIG).read_text())
    else:
        safetensors.torch.save_file(plain.state_dict(), folder / WEIGHTS)
        packed = {"four_bit": False} if "four_bit" in experiment.options else {}
        own["build"] = {
            "backbone": experiment.backbone, "head": experiment.head, "pixels": images["input_size"][-1],
            "options": None if adapters else experiment.method_options | packed,
        }  # fmt: skip
        config = {
            "architecture": experiment.backbone, "num_classes": len(splits.classes),
            "label_names": splits.classes,
            "pretrained_cfg": images | {"license": plain.pretrained_cfg.get("license")},
        }  # fmt: skip
    if record is not None:
        own["score_pct"] = record.quality[f"test_{record.quality['metric']}"]
    config[OWN] = own | {"sha256": sha256_of(folder / WEIGHTS)}
    write_atomically(folder / CONFIG, json.dumps(config, indent=1).encode())
    write_atomically(folder / "README.md", model_card(config, experiment, plain, record).encode())
    return folder


def load_model(folder: Path | str, device: str = "cpu") -> Predictor:
    """The model in a folder of `save_model`, on `device`, in evaluation mode.

    Raises `InputError` for a folder that lacks a file, weights that have changed or that do not fit, and
    classes that are not as many as the model's outputs.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        own, classes, count = config[OWN], config["label_names"], config["num_classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no model: {CONFIG} is missing, or not of `save_model` ({one_line(error)}); "
            "name the folder `model` of a finished run."
        ) from None
    if len(classes) != count:
        raise InputError(f"{folder / CONFIG} names {len(classes)} classes for {count} outputs; correct it.")
    weights = read_weights(folder / WEIGHTS, own["sha256"])
    model = _build(folder, config)
    fill(model, weights, folder / WEIGHTS, head=True)
    return Predictor(model.eval().to(device), classes, config)


def _build(folder: Path, config: dict) -> nn.Module:
    own, build = config[OWN], config[OWN].get("build")
    if build is None:
        try:
            return timm.create_model(f"local-dir:{folder}", pretrained=False)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise InputError(
                f"timm cannot build the model of {folder / CONFIG}: {one_line(error)}"
            ) from error
    model = build_network(
        build["backbone"], build["head"], own["task"], config["num_classes"], False, build["pixels"]
    )
    return model if build["options"] is None else adapt(model, own["method"], **build["options"])
