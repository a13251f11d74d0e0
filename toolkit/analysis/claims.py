"""Published claims held against finished runs: the engine; each paper's claims are in a file of their own.

A verdict is computed from the records alone, and is "not tested here" wherever these cannot decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import scipy.stats

from toolkit.analysis.statistics import change, interval

ENOUGH = 3  # pairs that a verdict needs
SUPPORTED, REFUTED, UNTESTED = "✓ supported", "✗ not supported", "○ not tested here"

Evidence = tuple[str, int, str, str]  # our figures; pairs or runs behind them; verdict; why


@dataclass(frozen=True)
class Claim:
    """A published statement, and the function that judges it from finished runs on one data set."""

    text: str
    source: str
    judge: Callable[[pd.DataFrame], Evidence]


@dataclass(frozen=True)
class Paper:
    """The source of claims, and what they were made on."""

    name: str
    datasets: tuple[str, ...]  # names, up to the first colon
    backbones: tuple[str, ...]


def finding(text: str, source: str, tested_on: str, evidence: Evidence) -> dict:
    """A row of the table of claims."""
    ours, n, verdict, why = evidence
    return {
        "claim": text, "source": source, "tested on": tested_on, "ours": ours, "n": n, "verdict": verdict,
        "why": why,
    }  # fmt: skip


def judged(claims: Sequence[Claim], ok: pd.DataFrame, paper: Paper, why_none: str) -> list[dict]:
    """`claims` against finished runs (with `environment`), once per environment and data set that can decide.

    A claim that none of them can decide has one finding that says why: `why_none` if there are no runs.
    """
    found = []
    for claim in claims:
        own = []
        for _, part in ok.groupby(["environment", "dataset"]) if len(ok) else ():
            own.append(finding(claim.text, claim.source, _where(part, paper), claim.judge(part)))
        decided = [one for one in own if one["n"]] or own[:1]
        found += decided or [finding(claim.text, claim.source, "–", untested(why_none))]
    return found


def untested(why: str, ours: str = "–", n: int = 0) -> Evidence:
    return ours, n, UNTESTED, why


def _where(part: pd.DataFrame, paper: Paper) -> str:
    dataset, backbones = part.dataset.iloc[0], sorted(part.backbone[part.phase == "training"].unique())
    others = [] if dataset.split(":")[0] in paper.datasets else ["data"]
    others += [] if set(backbones) <= set(paper.backbones) else ["backbones"]
    text = f"{dataset}, {', '.join(backbones) or 'baselines alone'} ({part.environment.iloc[0]})"
    return text + (f"; not the paper's {' and '.join(others)}" if others else "")


def wider(half_width: float, n: int, settings: int) -> float:
    """Half width of one of `settings` intervals that hold together with 95 % (Bonferroni)."""
    if n < 2:
        return math.nan
    alone, together = scipy.stats.t.ppf([0.975, 1 - 0.025 / settings], n - 1)
    return half_width * together / alone


def ends_and_text(quantity: str, row: pd.Series | dict, settings: int, unit: str) -> tuple[float, float, str]:
    """Low and high end of a difference, as one of `settings`, and the interval as text."""
    half_width = wider(row["half_width"], int(row["n"]), settings)
    low, high = (change(quantity, row["mean"] + side * half_width) for side in (-1, 1))
    return low, high, interval(quantity, row["mean"], half_width, unit)


def meets(low: float, high: float, published: tuple[float, float]) -> str:
    """A range is met by an interval that touches it and excludes 0, a bound by one that is inside."""
    if high < published[0] or low > published[1]:
        return REFUTED
    if math.isinf(published[1]):
        return SUPPORTED if low >= published[0] else UNTESTED
    return UNTESTED if low <= 0 <= high else SUPPORTED
