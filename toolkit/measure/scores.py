"""Scores that weigh accuracy against cost, and companions that do not depend on units.

NetScore family, all 20·log10(accuracy² / cost), accuracy in per cent:

| kind | cost | source |
|---|---|---|
| NS | (params · MACs)^1/2, in millions and billions | Wong 2018, arXiv 1806.05512 |
| NS-E | (seconds · watts)^1/8 | arXiv 2607.02158, as two public codebases quote it |
| NS-M | (peak memory)^1/8, in MiB | same |
| NS# | (peak memory · seconds · watts)^1/8 | same |
| NS-D | (size of the file · seconds of one image)^1/8 | ours, NS# of a deployed model without power |

A decibel scale has no zero: with GiB instead of MiB, NS-M is 7.53 higher.  Therefore units are in the names
of the arguments, and every published score needs its phase (training or inference).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from toolkit.errors import InputError, check_name

# Exponents of the costs; the exponent of accuracy is 2.
NETSCORES: dict[str, dict[str, float]] = {
    "NS": {"params_m": 1 / 2, "macs_g": 1 / 2},
    "NS-E": {"seconds": 1 / 8, "watts": 1 / 8},
    "NS-M": {"peak_mib": 1 / 8},
    "NS#": {"peak_mib": 1 / 8, "seconds": 1 / 8, "watts": 1 / 8},
    "NS-D": {"peak_mib": 1 / 8, "seconds": 1 / 8},
}


def netscore(
    kind: str,
    accuracy_pct: float | None,
    *,
    params_m: float | None = None,
    macs_g: float | None = None,
    seconds: float | None = None,
    watts: float | None = None,
    peak_mib: float | None = None,
) -> float | None:
    """NetScore in decibels; `kind`: one of `NETSCORES`.

    Costs that the kind does not use are ignored.  None if the accuracy or a cost is missing or not
    positive; `why_no_score` gives the reason.  Raises `InputError` for an unknown kind.
    """
    costs = dict(params_m=params_m, macs_g=macs_g, seconds=seconds, watts=watts, peak_mib=peak_mib)
    if why_no_score(kind, accuracy_pct, **costs):
        return None
    log_cost = sum(exponent * math.log10(costs[name]) for name, exponent in NETSCORES[kind].items())
    return 20 * (2 * math.log10(accuracy_pct) - log_cost)


def why_no_score(kind: str, accuracy_pct: float | None, **costs) -> str | None:
    """The reason why `netscore` of these figures is None, or None if there is a score."""
    for name in ("accuracy_pct", *NETSCORES[check_name("score", kind, NETSCORES)]):
        value = accuracy_pct if name == "accuracy_pct" else costs.get(name)
        if value is None:
            return f"{name} was not measured"
        if not (math.isfinite(value) and value > 0):
            return f"{name} is {value}, and the logarithm needs a positive number"
    return None


# Three formulas are called SAM (Sustainable Accuracy Metric), each with its own unit of energy, in joules.
SAM_VERSIONS = {
    "cifar100_vits16_repro/legacy": 3600.0,
    "cifar100_vits16_repro/src": 1.0,
    "VideoClassificationTest": 1e-3,
}


def sam(version: str, accuracy: float, joules: float | None, exponent: float = 1.0) -> float | None:
    """SAM_k with alpha = beta = k = `exponent`; `accuracy` as a fraction, as in its sources.

    * `cifar100_vits16_repro/legacy`: k·accuracy^k / log10(watt-hours)
    * `cifar100_vits16_repro/src`: accuracy^k / log10(joules)^k
    * `VideoClassificationTest`: k·accuracy^k / log10(millijoules)

    The logarithm is zero at one unit of energy, where the score jumps from -∞ to +∞: use it only to compare
    with published figures.  None if energy is missing, not positive, or one unit.
    """
    check_name("SAM version", version, SAM_VERSIONS)
    if joules is None or joules <= 0:
        return None
    log_energy = math.log10(joules / SAM_VERSIONS[version])
    is_src = version == "cifar100_vits16_repro/src"
    if log_energy == 0 or (is_src and log_energy < 0):  # a root of a negative number for most exponents
        return None
    if is_src:
        return accuracy**exponent / log_energy**exponent
    return exponent * accuracy**exponent / log_energy


def sam_winners(first: tuple[float, float], second: tuple[float, float], exponents: range) -> pd.DataFrame:
    """The result, 1 or 2, that each version of SAM prefers, by exponent.

    A result is (accuracy as a fraction, joules).
    """
    rows = {
        version: {
            f"SAM_{k}": 1 if sam(version, *first, k) > sam(version, *second, k) else 2 for k in exponents
        }
        for version in SAM_VERSIONS
    }
    return pd.DataFrame(rows).T


def pareto_rank(accuracy: Sequence[float], costs: Sequence[Sequence[float]]) -> np.ndarray:
    """Rank of each of N points, int (N,): 1 if no other point is at least as good in all figures and better
    in one, 2 if that holds without the points of rank 1, and so on.

    `accuracy` (N,), more is better; `costs` (N, K), less is better.  Ranks do not depend on units.  Raises
    `InputError` for missing values.
    """
    accuracy, costs = np.asarray(accuracy, dtype=float), np.asarray(costs, dtype=float)
    if costs.ndim != 2 or len(accuracy) != len(costs):
        raise InputError(f"costs must have a row for each of {len(accuracy)} accuracies, got {costs.shape}.")
    points = np.column_stack([-accuracy, costs])  # (N, 1 + K), all to be minimised
    if not np.isfinite(points).all():
        raise InputError("a point with a missing figure cannot be ranked; leave it or the figure out.")
    better = (points[:, None] <= points[None]).all(2) & (points[:, None] < points[None]).any(2)
    ranks = np.zeros(len(points), dtype=int)
    rank = 0
    while (open_ := ranks == 0).any():
        rank += 1
        ranks[open_ & ~better[open_].any(0)] = rank
    return ranks
