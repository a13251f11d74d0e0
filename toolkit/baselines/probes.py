"""Classifiers on frozen features: fitted in seconds, chosen on validation rows, never shown a test row.

`fit_probe` fits one of six, following the protocols by which self-supervised backbones are compared
(Oquab et al. 2023, arXiv 2304.07193, appendix B).  None is refitted on training and validation rows together,
as some published ones are: fine-tuned models see the training rows alone.

They are written in torch, although scikit-learn has most of them: they run on the device of the features,
where their bytes are counted, and one eigendecomposition serves a whole path of regularisation strengths (on
10,000 rows of 384 features `lda` takes 0.2 s of one core, scikit-learn's 16 s).  The tests compare `ridge`,
`lda` and `logreg` with scikit-learn's.

All scores can be read as logits.  `logreg` and `linear_grid` minimise the cross-entropy itself; `lda` returns
log-posteriors up to a constant per row; `knn` the logarithm of the shares of votes.  Cosines (`centroid`) and
regressed indicators (`ridge`) are multiplied by the scale with the lowest cross-entropy on the validation
rows (Guo et al. 2017, arXiv 1706.04599), which changes no decision.

Among settings with equal validation accuracy the most regularised one is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.errors import InputError, check_name

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07  # of the votes of neighbours
RIDGE_PATH = tuple(10.0**power for power in range(1, -7, -1))  # times the trace of the scatter matrix / D
SHRINKAGE_PATH = (1.0, 0.9, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 1e-3, 1e-4)
L2_PATH = tuple(10.0 ** (-step / 2) for step in range(13))  # 1 to 1e-6, per training row
PATH_TOLERANCE = 1e-3  # of `logreg` along the path: largest entry of the gradient in whitened coordinates
GRADIENT_TOLERANCE = 1e-4  # the same for the chosen setting
GRID_BLOCKS = 4  # last blocks whose class tokens `linear_grid` reads, see `FeatureExtractor.layers`
GRID_LEARNING_RATES = (*(base * 10.0**power for power in range(-5, -1) for base in (1, 2, 5)), 0.1)
GRID_ITERATIONS = 2500  # published: 12,500
_GRID_BATCH = 128
_SCALES = tuple(2 ** (step / 2) for step in range(25))  # 1 to 4096
_TINY = 1e-20  # smallest probability: a CPU multiplies subnormal numbers ten times more slowly
_ROWS = 8192  # rows per chunk that is converted to double precision
_QUERIES = 512  # rows per chunk that is compared with all neighbours


class Rows(NamedTuple):
    """Features and labels on one device."""

    x: torch.Tensor  # (N, D)
    y: torch.Tensor  # (N,)


class Probe(nn.Module):
    """Maps features (B, D) to float32 scores (B, classes); nothing in it is trained any further.

    `choices`: the settings chosen on validation rows; `val_top1_pct`: accuracy there, in per cent; `layers`:
    whether the features are those of `FeatureExtractor.layers`.
    """

    layers = False

    def __init__(self, choices: dict, val_top1_pct: float = float("nan")):
        super().__init__()
        self.choices, self.val_top1_pct = choices, val_top1_pct


class LinearProbe(Probe):
    """Computes `features @ weight + bias` with `weight` (D, classes); normalises features first if `unit`."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, choices: dict, val: Rows, *, unit: bool = False
    ):
        super().__init__(choices)
        self.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.unit = unit
        self.val_top1_pct = 100 * (self(val.x).argmax(1) == val.y).double().mean().item()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        return torch.addmm(self.bias, F.normalize(features) if self.unit else features, self.weight)


class NeighbourProbe(Probe):
    """Logarithm of each class's share of the votes of the `k` nearest rows by cosine.

    A vote weighs softmax(cosine / `TEMPERATURE`) over the k rows (Wu et al. 2018, arXiv 1805.01978).  One
    extra vote is spread evenly over the classes (Laplace smoothing), so that no share is zero; it changes no
    decision.
    """

    def __init__(
        self,
        bank: torch.Tensor,  # (N, D), rows of length one
        labels: torch.Tensor,  # (N,)
        num_classes: int,
        k: int,
    ):
        super().__init__({"k": k})
        self.bank = nn.Parameter(bank, requires_grad=False)
        self.register_buffer("labels", labels)
        self.num_classes, self.k = num_classes, k

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.votes(*near) for near in self.nearest(features, self.k)])

    def nearest(self, features: torch.Tensor, k: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Yield cosines (b, k), descending, and labels (b, k) of the nearest rows, a chunk at a time."""
        for queries in F.normalize(features.float()).split(_QUERIES):
            cosines, rows = (queries @ self.bank.T).topk(k)
            yield cosines, self.labels[rows]

    def votes(self, cosines: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores (b, classes) from the output of `nearest`."""
        # Double precision: the order in which a GPU adds the votes then does not show in the result.
        weights = (cosines.double() / TEMPERATURE).softmax(1)
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

    `protocol`: knn | centroid | ridge | lda | logreg | linear_grid, see the functions of these names.  The
    probe is fitted on the device of the features.  `seed` and `iterations` are for `linear_grid`; the others
    draw no random numbers.

    Raises `InputError` if training rows of a class are missing.
    """
    check_name("protocol", protocol, [*_FITS, "linear_grid"])
    train, val = Rows(*train), Rows(*val)
    present = torch.bincount(train.y, minlength=num_classes) > 0
    if num_classes < 2 or not present.all():
        missing = (~present).nonzero().flatten().tolist()
        raise InputError(
            f"a probe needs two or more classes and training rows of each; {num_classes} classes, "
            f"without rows: {missing or 'none'}. Draw the training rows from all classes."
        )
    if protocol == "linear_grid":
        return linear_grid(train, val, num_classes, seed, iterations)
    return _FITS[protocol](train, val, num_classes)


def _best(probes: Iterable[LinearProbe]) -> LinearProbe:
    """The first of those with the highest validation accuracy."""
    return max(probes, key=lambda probe: probe.val_top1_pct)


def _scaled(probe: LinearProbe, val: Rows) -> LinearProbe:
    """Multiply the weights by the scale with the lowest cross-entropy on the validation rows."""
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


def knn(train: Rows, val: Rows, num_classes: int) -> NeighbourProbe:
    """k nearest neighbours, with the best k of `NEIGHBOURS` that training rows allow."""
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
    """Cosine to each class's mean of normalised features."""
    indicators = F.one_hot(train.y, num_classes).float()
    means = F.normalize(indicators.T @ F.normalize(train.x.float()))
    return _scaled(LinearProbe(means.T, means.new_zeros(num_classes), {}, val, unit=True), val)


def ridge(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Least squares of the class indicators with an intercept and `alpha` |weight|², along `RIDGE_PATH`.

    It decides as scikit-learn's `RidgeClassifier(alpha)` does.
    """
    counts, sums, gram = _moments(train, num_classes)
    rows = counts.sum()
    mean = sums.sum(0) / rows
    values, vectors = torch.linalg.eigh(gram - rows * mean.outer(mean))
    targets = vectors.T @ (sums.T - mean.outer(counts))  # X'Y, both centred, in the eigenbasis
    candidates = []
    for strength in RIDGE_PATH:
        alpha = strength * values.mean()
        weight = vectors @ (targets / (values + alpha)[:, None])
        candidates.append(LinearProbe(weight, counts / rows - mean @ weight, {"alpha": alpha.item()}, val))
    return _scaled(_best(candidates), val)


def lda(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Linear discriminant analysis; the within-class covariance is shrunk along `SHRINKAGE_PATH`.

    Shrinkage s means (1 - s) covariance + s (mean variance) identity, as in scikit-learn's
    `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`; priors are the shares of the training rows.
    """
    counts, sums, gram = _moments(train, num_classes)
    means = sums / counts[:, None]
    values, vectors = torch.linalg.eigh((gram - sums.T @ means) / counts.sum())
    variance = values.mean()
    if variance <= 1e-12 * gram.diagonal().mean() / counts.sum():  # rounding errors alone
        raise InputError(
            "lda needs features that differ within a class: take two or more different rows of a class, or "
            "another protocol."
        )
    turned = vectors.T @ means.T  # (D, C)
    candidates = []
    for s in SHRINKAGE_PATH:
        weight = vectors @ (turned / ((1 - s) * values + s * variance)[:, None])
        bias = (counts / counts.sum()).log() - 0.5 * (means.T * weight).sum(0)
        candidates.append(LinearProbe(weight, bias, {"shrinkage": s}, val))
    return _best(candidates)


def logreg(train: Rows, val: Rows, num_classes: int) -> LinearProbe:
    """Softmax regression on standardised features with an L2 penalty, along `L2_PATH`, warm-started.

    It minimises, per row, cross-entropy + l2 / 2 |weight|², as scikit-learn's `LogisticRegression` does with
    C = 1 / (l2 N).  The path starts at the strongest penalty.  With ten or more rows per feature it ends
    once validation accuracy stops improving and validation loss rises; with fewer it continues, because
    accuracy may recover after the training rows are separated.  The chosen setting is then solved further,
    in double precision.
    """
    _, sums, gram = _moments(train, num_classes)
    rows = len(train.y)
    mean = sums.sum(0) / rows
    covariance = gram / rows - mean.outer(mean)
    std = covariance.diagonal().clamp(min=0).sqrt()
    std[std <= 1e-6 * (gram.diagonal() / rows).sqrt()] = 1.0  # features that are constant up to rounding
    problem = _SoftmaxRegression(
        Rows((train.x - mean.float()) / std.float(), train.y), num_classes, covariance / std.outer(std)
    )

    def probe(l2: float, weight: torch.Tensor, bias: torch.Tensor) -> LinearProbe:
        weight = weight / std[:, None]
        return LinearProbe(weight, bias - mean @ weight, {"C": 1 / (l2 * rows), "l2": l2}, val)

    start = mean.new_zeros(train.x.shape[1], num_classes), mean.new_zeros(num_classes)
    best, best_pct, loss = None, -1.0, float("inf")
    for l2 in L2_PATH:
        start = problem.solve(l2, *start, PATH_TOLERANCE, torch.float32)
        tried, loss_before = probe(l2, *start), loss
        loss = F.cross_entropy(tried(val.x), val.y).item()
        if tried.val_top1_pct > best_pct:
            best, best_pct = (l2, start, problem.spread), tried.val_top1_pct
        elif loss > loss_before and rows >= 10 * train.x.shape[1]:
            break
    l2, start, problem.spread = best
    return probe(l2, *problem.solve(l2, *start, GRADIENT_TOLERANCE, torch.float64))


class _SoftmaxRegression:
    """Penalised softmax regression on standardised rows with this `correlation` matrix (D, D).

    L-BFGS runs in whitened coordinates: the Hessian is close to h correlation + l2 identity, with h the
    mean of p (1 - p), as in Böhning's bound (1992).  With correlated features this halves the number of
    passes.  L-BFGS itself computes in double precision, the passes over the rows in `dtype`: in single
    precision gradients are uncertain by 1e-6, which whitening multiplies by up to l2^-1/2.
    """

    def __init__(self, train: Rows, num_classes: int, correlation: torch.Tensor):
        self.x, self.y = train
        self.values, self.vectors = torch.linalg.eigh(correlation)
        self.values.clamp_(min=0)
        self.spread = (1 - 1 / num_classes) / num_classes  # h, updated after each solution

    def solve(
        self, l2: float, weight: torch.Tensor, bias: torch.Tensor, tolerance: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight (D, C) and bias (C,) of the minimum, from these as a start."""
        x, rows = self.x.to(dtype), len(self.y)
        picked = torch.arange(rows, device=self.y.device), self.y
        stretch = (self.spread * self.values + l2).sqrt()
        into, bias_scale = self.vectors / stretch, self.spread**-0.5  # from whitened coordinates
        whitened = [(self.vectors * stretch).T @ weight, bias / bias_scale]
        residuals = None  # (N, C), of the last point that was evaluated

        def closure() -> torch.Tensor:
            nonlocal residuals
            weight, bias = into @ whitened[0], bias_scale * whitened[1]
            logs = torch.addmm(bias.to(dtype), x, weight.to(dtype)).log_softmax(1)
            loss = -logs[picked].sum(dtype=torch.float64) / rows
            residuals = logs.exp_().clamp_(min=_TINY)
            residuals[picked] -= 1
            whitened[0].grad = into.T @ ((x.T @ residuals).double() / rows + l2 * weight)
            whitened[1].grad = bias_scale * residuals.sum(0, dtype=torch.float64) / rows
            return loss + l2 / 2 * weight.square().sum()

        torch.optim.LBFGS(
            whitened,
            max_iter=1000,
            tolerance_grad=tolerance,
            tolerance_change=1e-12,
            history_size=20,
            line_search_fn="strong_wolfe",
        ).step(closure)
        reached = max(part.grad.abs().max().item() for part in whitened)
        if not reached < 10 * tolerance:
            raise RuntimeError(
                f"logistic regression with l2 {l2:.0e} stopped at a gradient of {reached:.1e}, above "
                f"{tolerance:.0e}: take another protocol, or scale features of very different sizes."
            )
        # The mean of p², from the residuals r = p - [class is y].
        squares = residuals.square().sum(dtype=torch.float64) + 2 * residuals[picked].sum() + rows
        self.spread = max((1 - squares.item() / rows) / len(bias), 1e-9)
        return into @ whitened[0], bias_scale * whitened[1]


_FITS = {"knn": knn, "centroid": centroid, "ridge": ridge, "lda": lda, "logreg": logreg}


def linear_grid(train: Rows, val: Rows, num_classes: int, seed: int, iterations: int) -> LinearProbe:
    """The best of 52 linear layers that are trained together on the same batches.

    They read the class tokens of the last {1, 4} blocks, with and without the mean patch token, at 13
    learning rates (for a batch of 256, scaled to ours); SGD with momentum 0.9, no weight decay, cosine to
    zero.  Features are `FeatureExtractor.layers`, the same in every epoch: the published protocol crops and
    flips in every epoch, for which no features can be cached, and runs five times as many iterations.
    """
    device, width = train.x.device, train.x.shape[1] // (GRID_BLOCKS + 1)
    last = (GRID_BLOCKS - 1) * width  # where the last block's class token begins
    columns = [
        (blocks, bool(patches), slice(last if blocks == 1 else 0, (GRID_BLOCKS + patches) * width))
        for blocks in (1, GRID_BLOCKS)
        for patches in (0, 1)
    ]
    batch, heads = min(_GRID_BATCH, len(train.y)), len(GRID_LEARNING_RATES)
    rates = torch.tensor(GRID_LEARNING_RATES, device=device).repeat_interleave(num_classes) * batch / 256
    generator = torch.Generator().manual_seed(seed)  # the CPU's: the same on every device
    layers = []  # weight (columns + 1, heads * classes), the last row is the bias, and its momentum
    for _, _, part in columns:
        weight = 0.01 * torch.randn(part.stop - part.start + 1, heads * num_classes, generator=generator)
        weight[-1] = 0
        layers.append((weight.to(device), torch.zeros_like(weight, device=device)))
    epochs = -(-iterations * batch // len(train.y))
    order = torch.cat([torch.randperm(len(train.y), generator=generator) for _ in range(epochs)]).to(device)
    one = torch.ones(batch, 1, device=device)
    # The gradients of all heads in one product per group of columns: autograd would hold 13 times the logits.
    for step, rows in enumerate(order[: iterations * batch].view(iterations, batch)):
        x, y = train.x[rows].float(), train.y[rows]
        decay = 0.5 * (1 + math.cos(math.pi * step / iterations))
        for (_, _, part), (weight, momentum) in zip(columns, layers):
            inputs = torch.cat([x[:, part], one], dim=1)
            residuals = (inputs @ weight).view(batch, heads, num_classes).softmax(2)
            residuals.clamp_(min=_TINY).sub_(F.one_hot(y, num_classes)[:, None])
            momentum.mul_(0.9).addmm_(inputs.T, residuals.flatten(1), alpha=1 / batch)
            weight.addcmul_(momentum, rates, value=-decay)

    candidates = []
    for (blocks, patches, part), (weight, _) in zip(columns, layers):
        for head, rate in enumerate(GRID_LEARNING_RATES):
            of_head = weight[:, head * num_classes : (head + 1) * num_classes]
            whole = of_head.new_zeros(train.x.shape[1], num_classes)
            whole[part] = of_head[:-1]
            choices = {"blocks": blocks, "mean_patch": patches, "learning_rate": rate}
            candidates.append(LinearProbe(whole, of_head[-1], choices, val))
    probe = _best(candidates)
    probe.choices |= {"iterations": iterations, "augmentation": "none: cached features"}
    probe.layers = True
    return probe
