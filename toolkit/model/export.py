"""A saved model for other programs: as ONNX or torch.export file, or on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch

from toolkit.budget import format_bytes
from toolkit.errors import InputError, check_name, one_line
from toolkit.measure.scores import netscore
from toolkit.model.predictor import Predictor
from toolkit.model.saved import load_model

TOLERANCE = 1e-4  # between probabilities of the file and of torch
TIMED_RUNS = 20
Run = Callable[[torch.Tensor], torch.Tensor]  # images (B, 3, H, W) -> logits (B, classes)


@dataclass(frozen=True)
class Exported:
    """An exported file, and how it does on this machine, with images one at a time."""

    path: Path
    difference: float  # highest, of probabilities from those of torch
    seconds: float  # median, of one image
    bytes: int
    score: float | None  # NS-D in decibels; None if the accuracy is not known

    def __str__(self) -> str:
        score = "no NetScore without an accuracy" if self.score is None else f"NS-D {self.score:.2f} dB"
        return (
            f"{self.path}: {format_bytes(self.bytes)}, {1000 * self.seconds:.1f} ms an image, {score}; "
            f"probabilities differ by at most {self.difference:.1e} from torch's"
        )


def _onnx(predictor: Predictor, images: torch.Tensor, path: Path) -> Run:
    """Write ONNX with the preprocessing and the classes in its metadata; batches may have any size."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch needs it)
    except ImportError as error:
        raise InputError(f"{error}; ONNX needs `pip install onnx onnxruntime onnxscript`.") from error
    torch.onnx.export(
        predictor.model, (images,), path, dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    model = onnx.load(path)
    onnx.helper.set_model_props(model, _metadata(predictor))
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _torch_export(predictor: Predictor, images: torch.Tensor, path: Path) -> Run:
    """Write what `torch.export.load` reads, with the preprocessing and the classes as extra files."""
    program = torch.export.export(
        predictor.model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, path, extra_files=_metadata(predictor))
    return torch.export.load(path).module()


FORMATS = {"onnx": (_onnx, "model.onnx"), "torch-export": (_torch_export, "model.pt2")}


def _metadata(predictor: Predictor) -> dict[str, str]:
    images = {key: predictor.config["pretrained_cfg"][key] for key in predictor.PREPROCESSING}
    return {"preprocessing": json.dumps(images), "classes": json.dumps(predictor.classes)}


@torch.no_grad()
def export_model(folder: Path | str, format: str = "onnx") -> Exported:
    """Write the model of `save_model` in `folder` as `model.onnx` or `model.pt2` there, and run it.

    Its input is what `Predictor.transform` makes, its output logits.  Raises `InputError` if the network
    cannot be exported, or if the file's probabilities differ from torch's by more than `TOLERANCE`.
    """
    write, name = FORMATS[check_name("format", format, FORMATS)]
    predictor = load_model(folder)
    path = Path(folder) / name
    size = predictor.config["pretrained_cfg"]["input_size"]
    images = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    try:
        run = write(predictor, images, path)
        found = run(images[:2])
    except InputError:
        raise
    except Exception as error:  # the exporters raise errors of many types
        other = next(each for each in FORMATS if each != format)
        raise InputError(
            f"{type(predictor.model).__name__} cannot be exported as {format} ({one_line(error)[:300]}); try "
            f"--format {other}."
        ) from error
    expected = predictor.model(images[:2])
    difference = (found.softmax(1) - expected.softmax(1)).abs().max().item()
    if not difference <= TOLERANCE:
        raise InputError(f"{path} differs from torch by {difference:.1e} in a probability; do not use it.")
    seconds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        run(images[:1])
        seconds.append(time.perf_counter() - start)
    latency, size_bytes = statistics.median(seconds), path.stat().st_size
    accuracy = predictor.config["toolkit"].get("score_pct")
    score = netscore("NS-D", accuracy, seconds=latency, peak_mib=size_bytes / 2**20)
    return Exported(path, difference, latency, size_bytes, score)


def push_model(folder: Path | str, repository: str) -> str:
    """Copy `folder` to a repository of the Hugging Face hub, private if it is new; returns its address.

    Raises `InputError` without a token, for a folder that `load_model` refuses, and for what the hub refuses.
    """
    if huggingface_hub.get_token() is None:
        raise InputError("there is no token of the Hugging Face hub; run `hf auth login`, or set HF_TOKEN.")
    load_model(folder)
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a fine-tuned model")
    except Exception as error:  # what the hub's clients raise differs by version
        raise InputError(f"the hub did not take {repository!r}: {one_line(error)}") from error
    return str(url)
