"""Trained parameters, memory and time of methods on a Swin-T with a semantic FPN.

    python tests/benchmarks/dense.py

224 px, batch 4, 21 classes, random weights, fp32 on the CPU, AdamW.  Peaks are counted on fake
tensors; times are CPU seconds of whole steps, interleaved, the median of `ROUNDS`.
Claims of arXiv 2306.09729, on average over its tasks: 62.2 % less memory, 26.2 % less time than full.
"""

from __future__ import annotations

import statistics
import time

import pandas as pd
import torch
import torch.nn.functional as F

import toolkit
from toolkit.backbones.dense import build_dense
from toolkit.budget.optimizers import optimizer_like
from toolkit.datasets.tasks import IGNORED
from toolkit.methods import adapt, set_train_mode, summarize

BACKBONE, PIXELS, BATCH, CLASSES = "swin_tiny_patch4_window7_224", 224, 4, 21
METHODS = ("full", "linear", "bitfit", "lora", "e3va")
ROUNDS = 3


def loss_of(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, masks, ignore_index=IGNORED)


def main() -> None:
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(0, CLASSES, (BATCH, PIXELS, PIXELS))
    models, rows = {}, {}
    for method in METHODS:
        model = models[method] = adapt(build_dense(BACKBONE, "fpn", CLASSES, False, "segmentation"), method)
        set_train_mode(model)
        sizes = summarize(model)
        plan = toolkit.plan(model, 2**50, batch, strategy="none", loss=loss_of)
        head = sum(p.numel() for p in model.get_classifier().parameters() if p.requires_grad)
        rows[method] = {
            "trained": sizes.trainable,
            "trained %": 100 * sizes.trainable / sizes.total,
            "head's %": 100 * head / sizes.total,
            "peak MiB": plan.peak_bytes / 2**20,
        }
    optimizers = {name: optimizer_like("adamw", model)(model) for name, model in models.items()}
    seconds = {method: [] for method in METHODS}
    for turn in range(ROUNDS + 1):
        for method in METHODS[turn % 5 :] + METHODS[: turn % 5]:
            start = time.process_time()
            loss_of(models[method](batch[0]), batch[1]).backward()
            optimizers[method].step()
            optimizers[method].zero_grad()
            if turn:  # the first makes the optimizer's state
                seconds[method].append(time.process_time() - start)
    for method, row in rows.items():
        row["CPU seconds"] = statistics.median(seconds[method])
    table = pd.DataFrame(rows).T
    for column in ("peak MiB", "CPU seconds"):
        table[f"{column}, % of full"] = 100 * table[column] / table[column]["full"]
    print(table.round(2).to_string())


if __name__ == "__main__":
    main()
