"""Classifiers on frozen features: fitted in seconds, chosen on validation rows, never shown a test row.

`fit_probe` makes one of six, by the protocols under which self-supervised backbones are compared
(Oquab et al. 2023, arXiv 2304.07193, appendix B).  None is fitted again on training and validation rows
together, as some of the published protocols are: fine-tuned models train on the training rows alone, and
a table compares like with like.

All scores can be read as logits.  `logreg` and `linear_grid` minimise the cross-entropy itself; `lda`
gives log-posteriors up to a constant per row; `knn` the logarithm of shares of votes.  Cosines
(`centroid`) and regressed indicators (`ridge`) have no scale of their own: they are multiplied by the one
that has the least cross-entropy on the validation rows (Guo et al. 2017, arXiv 1706.04599), which
changes no decision.

Where several settings do equally well in validation the more regularised one is taken.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.errors import InputError, check_name

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07  # of the votes of neighbours
RIDGE_PATH = tuple(10.0**power for power in range(1, -7, -1))  # times rows and mean variance of a feature
SHRINKAGE_PATH = (1.0, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4)
L2_PATH = tuple(10.0 ** (-step / 2) for step in range(13))  # 1 to 1e-6, per training row
GRADIENT_TOLERANCE = 1e-5  # of `logreg`: largest entry, of the objective per row
PATH_TOLERANCE = 1e-4  # the same along the path
GRID_BLOCKS = 4  # last blocks whose class tokens `linear_grid` reads, see `FeatureExtractor.layers`
GRID_LEARNING_RATES = (*(base * 10.0**power for power in range(-5, -1) for base in (1, 2, 5)), 0.1)
GRID_ITERATIONS = 2500  # published: 12,500
_GRID_BATCH = 128
_SCALES = tuple(2 ** (step / 2) for step in range(25))  # 1 to 4096
_TINY = 1e-20  # least probability: a CPU multiplies ten times more slowly by subnormal numbers
_ROWS = 8192  # rows at a time of a pass over the training set
_QUERIES = 512  # rows at a time that are compared with all neighbours


class Rows(NamedTuple):
    """Features (N, D) and labels (N,), on one device."""

    x: torch.Tensor
    y: torch.Tensor


class Probe(nn.Module):
    """Features (B, D) to float32 scores (B, classes), larger for the likelier class; nothing to train.

    `choices`: what was chosen on validation rows; `val_top1_pct`: accuracy there, in per cent; `layers`:
    whether the features are those of `FeatureExtractor.layers`.
    """

    layers = False

    def __init__(self, choices: dict, val_top1_pct: float):
        super().__init__()
        self.choices, self.val_top1_pct = choices, val_top1_pct


class LinearProbe(Probe):
    """`features @ weight + bias`, of `unit` features of length one; `weight` (D, classes)."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, choices: dict, val: Rows, *, unit: bool = False
    ):
        super().__init__(choices, float("nan"))
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.unit = unit
        self.val_top1_pct = _top1_pct(self(val.x), val.y)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        return torch.addmm(self.bias, F.normalize(features) if self.unit else features, self.weight)


class NeighbourProbe(Probe):
    """Logarithm of the share of each class in the votes of the `k` nearest rows by cosine.

    A vote weighs softmax(cosine / `temperature`) over the k (Wu et al. 2018, arXiv 1805.01978); one vote
    more is spread evenly over the classes (Laplace), so that no share is zero.  It changes no decision.
    `bank`: features of length one (N, D); `labels` (N,).
    """

    def __init__(
        self,
        bank: torch.Tensor,
        labels: torch.Tensor,
        num_classes: int,
        k: int,
        temperature: float = TEMPERATURE,
    ):
        super().__init__({"k": k}, float("nan"))
        self.bank = nn.Parameter(bank, requires_grad=False)
        self.register_buffer("labels", labels)
        self.num_classes, self.k, self.temperature = num_classes, k, temperature

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.votes(*near) for near in self.nearest(features, self.k)])

    def nearest(self, features: torch.Tensor, k: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Cosines (b, k), descending, and labels (b, k) of the nearest rows, some queries at a time."""
        for queries in F.normalize(features.float()).split(_QUERIES):
            cosines, rows = (queries @ self.bank.T).topk(k)
            yield cosines, self.labels[rows]

    def votes(self, cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores (b, classes) from what `nearest` gives."""
        # In double precision the order in which a GPU adds the votes leaves no trace in the result.
        weights = (cosines.double() / self.temperature).softmax(1)
        votes = weights.new_zeros(len(weights), self.num_classes).scatter_add_(1, labels, weights)
        k = cosines.shape[1]
        return ((k * votes + 1 / self.num_classes) / (k + 1)).log().float()


@torch.no_grad()
def fit_probe(
    protocol: str,
    train: tuple[torch.Tensor, torch.Tensor],
    val: tuple[torch.Tensor, torch.Tensor],
    num_classes: int,
    *,
    seed: int = 0,
    iterations: int = GRID_ITERATIONS,
) -> Probe:
    """Fit a probe to `train` and choose its settings on `val`: features (N, D) and int labels (N,) each.

    `protocol`: knn | centroid | ridge | lda | logreg | linear_grid, see the functions of these names here.
    It runs where the features are.  `seed` and `iterations` are of `linear_grid`; the others draw nothing.

    Raises `InputError` for features that do not fit their labels or each other, are not finite, or lack
    a class in training.
    """
    check_name("protocol", protocol, [*_FITS, "linear_grid"])
    train, val = _checked("training", *train, num_classes), _checked("validation", *val, num_classes)
    if train.x.shape[1] != val.x.shape[1]:
        raise InputError(
            f"training features have {train.x.shape[1]} columns and validation features {val.x.shape[1]}: "
            "take both from the same extractor."
        )
    present = torch.bincount(train.y, minlength=num_classes) > 0
    if num_classes < 2 or not present.all():
        missing = (~present).nonzero().flatten().tolist()
        raise InputError(
            f"a probe needs two classes or more and training rows of each; {num_classes} classes, "
            f"without rows: {missing or 'none'}. Draw the training rows from all classes."
        )
    if protocol == "linear_grid":
        return linear_grid(train, val, num_classes, seed, iterations)
    return _FITS[protocol](train, val, num_classes)


def _checked(name: str, x: torch.Tensor, y: torch.Tensor, num_classes: int) -> Rows:
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y) or not len(x):
        raise InputError(
            f"the {name} features {tuple(x.shape)} and labels {tuple(y.shape)} do not make rows: pass (N, D) "
            "and (N,) with N of 1 or more."
        )
    if not x.isfinite().all():
        bad = (~x.isfinite().all(1)).nonzero().flatten()
        raise InputError(
            f"{len(bad)} rows of the {name} features are not finite, first row {int(bad[0])}: "
            "compute them in fp32 or bf16, or leave the images out."
        )
    y = y.to(x.device, torch.int64)
    if y.min() < 0 or y.max() >= num_classes:
        raise InputError(
            f"{name} labels go from {int(y.min())} to {int(y.max())} with {num_classes} classes: they "
            f"must be 0 to {num_classes - 1}."
        )
    return Rows(x, y)


def _top1_pct(scores: torch.Tensor, y: torch.Tensor) -> float:
    return 100 * (scores.argmax(1) == y).double().mean().item()


def _best(probes: Iterable[LinearProbe]) -> LinearProbe:
    """The first of those with the highest validation accuracy."""
    return max(probes, key=lambda probe: probe.val_top1_pct)


def _scaled(probe: LinearProbe, val: Rows) -> LinearProbe:
    """Weights times the scale of the least cross-entropy in validation."""
    scores = probe(val.x)
    scale = min(_SCALES, key=lambda scale: F.cross_entropy(scale * scores, val.y).item())
    probe.weight *= scale
    probe.bias *= scale
    probe.choices["scale"] = scale
    return probe


def _moments(train: Rows, num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows per class (C,), sums per class (C, D) and X'X (D, D), in double precision."""
    x, y = train
    counts = x.new_zeros(num_classes, dtype=torch.float64)
    sums = counts.new_zeros(num_classes, x.shape[1])
    gram = counts.new_zeros(x.shape[1], x.shape[1])
    for some, labels in zip(x.split(_ROWS), y.split(_ROWS)):
        some, indicators = some.double(), F.one_hot(labels, num_classes).double()
        counts += indicators.sum(0)
        sums.addmm_(indicators.T, some)
        gram.addmm_(some.T, some)
    return counts, sums, gram


# ---------------------------------------------------------------------------------------------------
# Without iterations


def knn(train: Rows, val: Rows, num_classes: int) -> NeighbourProbe:
    """k nearest neighbours; k of `NEIGHBOURS`, at most all rows, by validation."""
    probe = NeighbourProbe(F.normalize(train.x.float()), train.y, num_classes, k=1)
    tried = sorted({min(k, len(train.y)) for k in NEIGHBOURS})
    hits = dict.fromkeys(tried, 0)
    for (cosines, labels), y in zip(probe.nearest(val.x, tried[-1]), val.y.split(_QUERIES)):
        for k in tried:
            hits[k] += (probe.votes(cosines[:, :k], labels[:, :k]).argmax(1) == y).sum().item()
    probe.k = max(reversed(tried), key=hits.get)
    probe.choices = {"k": probe.k}
    probe.val_top1_pct = 100 * hits[probe.k] / len(val.y)
    return probe


def centroid(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Cosine to the mean of the features of length one of each class."""
    unit = Rows(F.normalize(train.x.float()), train.y)
    indicators = F.one_hot(train.y, num_classes).float()
    means = F.normalize(indicators.T @ unit.x)
    return _scaled(LinearProbe(means.T, means.new_zeros(num_classes), {}, val, unit=True), val)


def ridge(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Least squares of the class indicators with an intercept and `alpha` |weight|², along `RIDGE_PATH`.

    scikit-learn's `RidgeClassifier(alpha)` decides alike.  One eigendecomposition serves the path.
    """
    counts, sums, gram = _moments(train, num_classes)
    rows = counts.sum()
    mean = sums.sum(0) / rows
    values, vectors = torch.linalg.eigh(gram - rows * mean.outer(mean))
    targets = vectors.T @ (sums.T - mean.outer(counts))  # X'Y, both centred, in the eigenbasis

    def candidates():
        for strength in RIDGE_PATH:
            alpha = strength * values.mean()
            weight = vectors @ (targets / (values + alpha)[:, None])
            yield LinearProbe(weight, counts / rows - mean @ weight, {"alpha": alpha.item()}, val)

    return _scaled(_best(candidates()), val)


def lda(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Linear discriminant analysis; the covariance within classes is shrunk along `SHRINKAGE_PATH`.

    `shrinkage` s: (1 - s) covariance + s (mean variance) identity, as scikit-learn's
    `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`; priors are the shares of the training rows.
    """
    counts, sums, gram = _moments(train, num_classes)
    means = sums / counts[:, None]
    values, vectors = torch.linalg.eigh((gram - sums.T @ means) / counts.sum())
    variance = values.mean()
    if variance <= 1e-12 * gram.diagonal().mean() / counts.sum():  # nothing but rounding
        raise InputError(
            "lda needs features that differ within a class: take two or more different rows of a class, or "
            "another protocol."
        )
    turned = vectors.T @ means.T  # (D, C)

    def candidates():
        for s in SHRINKAGE_PATH:
            weight = vectors @ (turned / ((1 - s) * values + s * variance)[:, None])
            bias = (counts / counts.sum()).log() - 0.5 * (means.T * weight).sum(0)
            yield LinearProbe(weight, bias, {"shrinkage": s}, val)

    return _best(candidates())


# ---------------------------------------------------------------------------------------------------
# Logistic regression


def logreg(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Softmax regression on standardised features with an L2 penalty, along `L2_PATH`, warm-started.

    Minimises, per row, cross-entropy + l2 / 2 |weight|²; in scikit-learn's terms C = 1 / (l2 N), whose
    `LogisticRegression(C)` on standardised features has the same minimum.  The path begins with the
    strongest penalty.  With ten rows for every feature it ends where validation accuracy is no better than
    before and validation loss rises; with fewer it goes on, as accuracy may come back once the training
    rows are separated.  The chosen setting is then solved to `GRADIENT_TOLERANCE` in double precision;
    `max_gradient` says what was reached.
    """
    _, sums, gram = _moments(train, num_classes)
    rows = len(train.y)
    mean = sums.sum(0) / rows
    covariance = gram / rows - mean.outer(mean)
    std = covariance.diagonal().clamp(min=0).sqrt()
    std[std <= 1e-6 * (gram.diagonal() / rows).sqrt()] = 1.0  # features that are constant but for rounding
    problem = _SoftmaxRegression(
        Rows((train.x - mean.float()) / std.float(), train.y), num_classes, covariance / std.outer(std)
    )

    def probe(solution: torch.Tensor, l2: float, **found: float) -> LinearProbe:
        weight = solution[:-1] / std[:, None]
        choices = {"C": 1 / (l2 * rows), "l2": l2, **found}
        return LinearProbe(weight, solution[-1] - mean @ weight, choices, val)

    solution = best = None
    loss = float("inf")
    for l2 in L2_PATH:
        solution, _ = problem.solve(l2, solution, PATH_TOLERANCE, torch.float32)
        tried, loss_before = probe(solution, l2), loss
        loss = F.cross_entropy(tried(val.x), val.y).item()
        if best is None or tried.val_top1_pct > best[0]:
            best = tried.val_top1_pct, l2, solution
        elif loss > loss_before and rows >= 10 * train.x.shape[1]:
            break
    _, l2, solution = best
    solution, gradient = problem.solve(l2, solution, GRADIENT_TOLERANCE, torch.float64)
    return probe(solution, l2, max_gradient=gradient)


class _SoftmaxRegression:
    """Penalised softmax regression on standardised rows with this `correlation` matrix (D, D).

    A solution is (D + 1, C) in double precision, the intercepts last.  L-BFGS works in coordinates in
    which the Hessian is near the identity: it is close to h correlation + l2 identity with h the mean of
    p (1 - p), as in Böhning's bound (1992): with correlated features that is less than half of the passes.
    L-BFGS itself is in double precision, the passes over the rows in the `dtype` that is asked for: single
    precision leaves gradients uncertain by 1e-6 or so.
    """

    def __init__(self, train: Rows, num_classes: int, correlation: torch.Tensor):
        self.train, self.num_classes = train, num_classes
        self.values, self.vectors = torch.linalg.eigh(correlation)
        self.values.clamp_(min=0)
        self.spread = (1 - 1 / num_classes) / num_classes  # h, of the last point that was looked at

    def loss_and_gradient(
        self, point: torch.Tensor, l2: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Objective per row and its gradient (D + 1, C)."""
        weight, bias = point[:-1].to(dtype), point[-1].to(dtype)
        gradient = torch.zeros_like(weight)
        loss, squares, residuals = point.new_zeros(()), point.new_zeros(()), torch.zeros_like(point[-1])
        for x, y in zip(self.train.x.split(_ROWS), self.train.y.split(_ROWS)):
            x = x.to(dtype)
            logs = torch.addmm(bias, x, weight).log_softmax(1)
            loss -= logs.gather(1, y[:, None]).sum(dtype=torch.float64)
            probabilities = logs.exp_().clamp_(min=_TINY)
            squares += probabilities.square().sum(dtype=torch.float64)
            probabilities[torch.arange(len(y), device=y.device), y] -= 1
            gradient.addmm_(x.T, probabilities)
            residuals += probabilities.sum(0)
        rows = len(self.train.y)
        self.spread = max((1 - (squares / rows).item()) / self.num_classes, 1e-9)
        gradient = torch.cat([gradient.double() / rows + l2 * point[:-1], residuals[None] / rows])
        return loss / rows + l2 / 2 * point[:-1].square().sum(), gradient

    def solve(
        self, l2: float, start: torch.Tensor | None, tolerance: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, float]:
        """The minimum, and the largest entry of the gradient there, which is below `tolerance`."""
        if start is None:
            start = self.values.new_zeros(len(self.values) + 1, self.num_classes)
        scale = (self.spread * self.values + l2).rsqrt()
        into, bias_scale = self.vectors * scale, self.spread**-0.5  # from the new coordinates to the old
        position = torch.cat([(self.vectors / scale).T @ start[:-1], start[-1:] / bias_scale])
        optimizer = torch.optim.LBFGS(
            [position],
            max_iter=1000,
            tolerance_grad=0,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        point, largest = start, float("inf")

        def closure() -> torch.Tensor:
            nonlocal point, largest
            point = torch.cat([into @ position[:-1], bias_scale * position[-1:]])
            loss, gradient = self.loss_and_gradient(point, l2, dtype)
            largest = gradient.abs().max().item()
            if largest < tolerance:
                raise StopIteration  # at whichever point of a line search
            position.grad = torch.cat([into.T @ gradient[:-1], bias_scale * gradient[-1:]])
            return loss

        with contextlib.suppress(StopIteration):
            optimizer.step(closure)
            raise RuntimeError(
                f"logistic regression with l2 {l2:.0e} stopped at a gradient of {largest:.1e}, above "
                f"{tolerance:.0e}: take another protocol, or scale features of very different sizes."
            )
        return point, largest


_FITS = {"knn": knn, "centroid": centroid, "ridge": ridge, "lda": lda, "logreg": logreg}


# ---------------------------------------------------------------------------------------------------
# Many linear layers at once


def linear_grid(train: Rows, val: Rows, num_classes: int, seed: int, iterations: int) -> LinearProbe:
    """52 linear layers, trained together on the same batches; the best in validation.

    Class tokens of the last {1, 4} blocks, without and with the mean patch token, times 13 learning rates
    (for a batch of 256, scaled to ours); SGD with momentum 0.9, no weight decay, cosine to zero.  Features
    are `FeatureExtractor.layers`, hence the same in every epoch: the published protocol crops and flips
    anew, for which no feature can be kept, and has five times the iterations.
    """
    parts, device = GRID_BLOCKS + 1, train.x.device
    width, rest = divmod(train.x.shape[1], parts)
    if rest:
        raise InputError(
            f"linear_grid needs {parts} equal parts per row and got {train.x.shape[1]} columns: pass the "
            "features of FeatureExtractor.layers."
        )
    last = (GRID_BLOCKS - 1) * width  # where the last block's class token begins
    columns = [
        (blocks, bool(patches), slice(last if blocks == 1 else 0, (GRID_BLOCKS + patches) * width))
        for blocks in (1, GRID_BLOCKS)
        for patches in (0, 1)
    ]
    batch = min(_GRID_BATCH, len(train.y))
    heads = len(GRID_LEARNING_RATES)
    rates = torch.tensor(GRID_LEARNING_RATES, device=device).repeat_interleave(num_classes) * batch / 256
    generator = torch.Generator().manual_seed(seed)  # the CPU's: alike on every device
    layers = []  # weight (columns + 1, heads * classes), the last row is the bias, and its momentum
    for _, _, part in columns:
        weight = 0.01 * torch.randn(part.stop - part.start + 1, heads * num_classes, generator=generator)
        weight[-1] = 0
        layers.append((weight.to(device), torch.zeros_like(weight, device=device)))
    epochs = -(-iterations * batch // len(train.y))
    order = torch.cat([torch.randperm(len(train.y), generator=generator) for _ in range(epochs)]).to(device)
    one = torch.ones(batch, 1, device=device)
    for step, rows in enumerate(order[: iterations * batch].view(iterations, batch)):
        x, y = train.x[rows].float(), train.y[rows]
        decay = 0.5 * (1 + math.cos(math.pi * step / iterations))
        for (_, _, part), (weight, momentum) in zip(columns, layers):
            inputs = torch.cat([x[:, part], one], dim=1)
            residuals = (inputs @ weight).view(batch, heads, num_classes).softmax(2)
            residuals.clamp_(min=_TINY).sub_(F.one_hot(y, num_classes)[:, None])
            momentum.mul_(0.9).addmm_(inputs.T, residuals.flatten(1), alpha=1 / batch)
            weight.addcmul_(momentum, rates, value=-decay)

    def candidates():
        for (blocks, patches, part), (weight, _) in zip(columns, layers):
            for head, rate in enumerate(GRID_LEARNING_RATES):
                of_head = weight[:, head * num_classes : (head + 1) * num_classes]
                whole = of_head.new_zeros(train.x.shape[1], num_classes)
                whole[part] = of_head[:-1]
                choices = {"blocks": blocks, "mean_patch": patches, "learning_rate": rate}
                yield LinearProbe(whole, of_head[-1], choices, val)

    probe = _best(candidates())
    probe.choices |= {"iterations": iterations, "augmentation": "none: cached features"}
    probe.layers = True
    return probe
