"""Savings of side networks: bytes that backward needs, peak of a step, time of a step.

    python tests/benchmarks/side.py                      # bytes, on fake tensors
    OMP_NUM_THREADS=2 python tests/benchmarks/side.py --time
    python tests/benchmarks/side.py --scale              # a backbone of a billion parameters, on fake tensors

Random weights, fp32, AdamW.  Kept bytes: storages that autograd saves, without parameters and buffers, each
once.  Times are of real steps on the CPU, the methods taking turns: nothing else should run at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import nn

import toolkit
from toolkit.backbones import data_config
from toolkit.budget import TensorMemory, format_bytes, tensors_of
from toolkit.budget.fakes import on_fake_tensors
from toolkit.measure.memory import KeptTensors
from toolkit.methods import set_train_mode, summarize
from toolkit.training.feature_cache import FeatureModel, layout_of

CLASSES = 100
CPU = torch.device("cpu")
METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: toolkit.adapt(model, "full"),
    "lora": lambda model: toolkit.adapt(model, "lora"),
    "dtl": lambda model: toolkit.adapt(model, "dtl"),
    "lst": lambda model: toolkit.adapt(model, "lst"),
    "losa": lambda model: toolkit.adapt(model, "losa"),
    "linear": lambda model: toolkit.adapt(model, "linear"),
}


def built(backbone: str, method: str) -> nn.Module:
    """The adapted model in training mode."""
    toolkit.seed_everything(0)
    model = METHODS[method](toolkit.build_backbone(backbone, CLASSES, pretrained=False))
    set_train_mode(model)
    return model


def batch_for(model: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, *data_config(model)["input_size"], generator=generator)
    return images, torch.randint(0, CLASSES, (size,), generator=generator)


def kept_bytes(model: nn.Module, images: torch.Tensor) -> int:
    """Bytes that autograd saves in a forward pass, without the model's own tensors."""
    with on_fake_tensors(model, images) as fake:
        kept = KeptTensors(tensors_of(model))  # which are fake now
        with kept:
            logits = model(fake)
        assert logits.requires_grad  # it holds the graph
        return kept.nbytes


def inference_peak(model: nn.Module, images: torch.Tensor) -> int:
    """Highest bytes of a forward pass without gradients, weights and images included."""
    with on_fake_tensors(model, images) as fake, torch.no_grad():
        memory = TensorMemory(CPU)
        memory.track([*tensors_of(model), fake])
        model.eval()
        with memory:
            model(fake)
        return memory.peak_bytes


@dataclass(frozen=True)
class Scale:
    """A large backbone: parameters, and peaks in bytes."""

    parameters: int
    trained: int
    inference_peak_bytes: int
    training_peak_bytes: int


def at_scale(name: str = "vit_giant_patch14_224", batch_size: int = 8, **options: object) -> Scale:
    """Peaks of `name` as it is and with `losa(**options)`; nothing is allocated."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
        images = torch.empty(batch_size, 3, *data_config(model)["input_size"][1:])
        labels = torch.empty(batch_size, dtype=torch.long)
    inference = inference_peak(model, images)
    parameters = sum(p.numel() for p in model.parameters())
    model = toolkit.adapt(model, "losa", **options)
    set_train_mode(model)
    made = toolkit.plan(model, "1TB", (images, labels))
    return Scale(parameters, summarize(model).trainable, inference, made.peak_bytes)


def step_seconds(models: dict[str, nn.Module], batch: tuple, rounds: int) -> dict[str, float]:
    """Median seconds of a training step of each model, which take turns; the first round does not count."""
    images, labels = batch
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            F.cross_entropy(model(images), labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="vit_small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--time", action="store_true", help="also run real steps")
    parser.add_argument("--rounds", type=int, default=7, help="of real steps")
    parser.add_argument("--scale", action="store_true", help="the large backbone instead")
    arguments = parser.parse_args()
    if arguments.scale:
        found = at_scale(batch_size=arguments.batch_size)
        print(
            f"{found.parameters:,} parameters, {found.trained:,} train by losa, batch {arguments.batch_size}"
        )
        print(f"inference peak {format_bytes(found.inference_peak_bytes)}")
        more = found.training_peak_bytes / found.inference_peak_bytes
        print(f"training peak  {format_bytes(found.training_peak_bytes)}, {more:.3f} of it")
        return
    models = {name: built(arguments.backbone, name) for name in arguments.methods}
    batch = batch_for(next(iter(models.values())), arguments.batch_size)
    seconds = step_seconds(models, batch, arguments.rounds) if arguments.time else {}
    if "losa" in seconds:  # on features that were computed before
        layout = layout_of(models["losa"], "fp32")
        with torch.no_grad():
            rows = layout.pack(models["losa"].features(batch[0]))
        part = FeatureModel(models["losa"], layout)
        set_train_mode(part)
        cached = step_seconds({"losa": part}, (rows, batch[1]), arguments.rounds)["losa"]
    print(f"{arguments.backbone}, batch {arguments.batch_size}, fp32")
    print(f"{'method':<22}{'trained':>12}{'kept':>14}{'peak':>14}{'seconds':>10}")
    for name, model in models.items():
        kept = kept_bytes(model, batch[0])
        peak = toolkit.plan(model, "1TB", batch, strategy="none").peak_bytes
        row = f"{name:<22}{summarize(model).trainable:>12,}{format_bytes(kept):>14}{format_bytes(peak):>14}"
        print(row + (f"{seconds[name]:>10.3f}" if seconds else ""))
    if {"losa", "lora"} <= seconds.keys():
        print(f"a step of losa takes {seconds['losa'] / seconds['lora']:.2f} of one of lora")
        print(f"on cached features {cached:.3f} s: {cached / seconds['lora']:.2f} of one of lora, ", end="")
        print(f"{cached / seconds['losa']:.2f} of its own")


if __name__ == "__main__":
    main()
