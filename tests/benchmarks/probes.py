"""Probes on features as many as CIFAR-100's, compared with scikit-learn's logistic regression at the same C.

    python tests/benchmarks/probes.py

50,000 training rows, 5,000 for validation and 10,000 for the test, of 384 features and 100 classes: Gaussian
clusters that overlap, of variances that fall by a factor of ten from the first direction to the last.
Wall seconds are with all cores; CPU seconds are of the process with one thread, so that other work on the
machine counts little.  "fit" has all choices in it, "predict" the 10,000 test rows.  `linear_grid` reads five
times as many features and takes a time that is its iterations' alone: a hundred are timed.  scikit-learn is
given standardised features and the C that was chosen, once with its defaults and once to a tolerance of 1e-5.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from toolkit.baselines import probes

ROWS = {"train": 50_000, "val": 5_000, "test": 10_000}
WIDTH, CLASSES = 384, 100
GRID_TIMED = 100


def clusters(width: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    means = 0.2 * torch.randn(CLASSES, width, generator=generator) * math.sqrt(WIDTH / width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    shape = torch.logspace(0, -0.5, width)[:, None] * turn
    parts = {}
    for split, rows in ROWS.items():
        y = torch.randint(CLASSES, (rows,), generator=generator)
        parts[split] = (means[y] + torch.randn(rows, width, generator=generator)) @ shape, y
    return parts


def timed(run: Callable) -> tuple[object, float, float]:
    """The result of `run`, wall seconds with all cores, CPU seconds with one."""
    torch.set_num_threads(os.cpu_count())
    begin = time.perf_counter()
    run()
    wall = time.perf_counter() - begin
    torch.set_num_threads(1)
    with threadpool_limits(1):  # numpy's, too
        begin = time.process_time()
        result = run()
        return result, wall, time.process_time() - begin


def report(name: str, fit: Callable, predict: Callable, y: torch.Tensor) -> object:
    model, wall, cpu = timed(fit)
    predictions, predict_wall, predict_cpu = timed(lambda: predict(model))
    accuracy = 100 * (predictions == y).double().mean().item()
    print(f"{name:32}{wall:8.2f}{cpu:8.2f}{predict_wall:10.2f}{predict_cpu:8.2f}{accuracy:9.2f}", flush=True)
    return model


def report_probe(name: str, protocol: str, parts: dict, **options: int) -> probes.Probe:
    x, y = parts["test"]
    return report(
        name,
        lambda: probes.fit_probe(protocol, parts["train"], parts["val"], CLASSES, **options),
        lambda probe: probe(x).argmax(1),
        y,
    )


def main() -> None:
    parts = clusters(WIDTH)
    print(f"{ROWS}, {WIDTH} features, {CLASSES} classes; {os.cpu_count()} cores")
    print(f"{'':32}{'fit s':>8}{'CPU s':>8}{'predict s':>10}{'CPU s':>8}{'top-1 %':>9}")
    for protocol in ("centroid", "ridge", "lda", "knn"):
        report_probe(protocol, protocol, parts)
    chosen = report_probe("logreg, whole path", "logreg", parts).choices
    probes.L2_PATH = (chosen["l2"],)
    report_probe("logreg, the chosen C alone", "logreg", parts)
    (x, y), (x_test, y_test) = parts["train"], parts["test"]
    mean, std = x.mean(0), x.std(0, correction=0)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-5)):
        rows, queries = (((part - mean) / std).to(dtype).numpy() for part in (x, x_test))
        theirs = LogisticRegression(C=chosen["C"], tol=tolerance, max_iter=1000)
        report(
            f"scikit-learn, {str(dtype)[6:]}, tol {tolerance:.0e}",
            lambda model=theirs, rows=rows: model.fit(rows, y.numpy()),
            lambda model, queries=queries: torch.from_numpy(model.predict(queries)),
            y_test,
        )
    report_probe(
        f"linear_grid, {GRID_TIMED} of {probes.GRID_ITERATIONS} steps",
        "linear_grid",
        clusters((probes.GRID_BLOCKS + 1) * WIDTH),
        iterations=GRID_TIMED,
    )
    print(f"logreg chose {chosen}")


if __name__ == "__main__":
    main()
