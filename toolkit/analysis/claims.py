"""Published claims held against finished runs: the engine; each paper's claims are in a file of their own.

A verdict is computed from the records alone, and is "not tested here" wherever these cannot decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import scipy.stats

from toolkit.analysis.statistics import COSTS, FIGURES, change, interval

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
    """`claims` against finished runs (with `environment`), once per pool and data set that can decide.

    A claim that none of them can decide has one finding that says why: `why_none` if there are no runs.
    """
    found = []
    for claim in claims:
        own = []
        for _, part in ok.groupby(["pool", "dataset"]) if len(ok) else ():
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
    where = ", ".join(sorted(part.environment.unique()))
    text = f"{dataset}, {', '.join(backbones) or 'baselines alone'} ({where})"
    return text + (f"; not the paper's {' and '.join(others)}" if others else "")


def named(table: pd.DataFrame) -> list[dict]:
    """Rows of `differences`, each with a `name`: what tells it from the others."""
    varying = [name for name in table if name not in FIGURES and table[name].nunique() > 1]
    return [row | {"name": ", ".join(str(row[name]) for name in varying)} for row in table.to_dict("records")]


def decide(
    quantity: str, rows: Sequence[dict], published: tuple[float, float], rule: str = "all"
) -> Evidence:
    """One verdict over all `rows` (mean, half_width, n, name) on a change that was `published` as a range.

    `rule`: "all" rows have to be in the range; "some": one is enough, and all have to be outside to refute;
    "up to": one is enough, and nothing refutes.  Intervals are widened so that together they hold with 95 %.
    """
    rows = sorted(rows, key=lambda row: row["mean"])
    verdicts, texts, fewest = [], [], int(min(row["n"] for row in rows))
    for row in rows:
        low, high, text = ends_and_text(quantity, row, len(rows))
        verdicts.append(meets(low, high, published) if row["n"] >= ENOUGH else UNTESTED)
        texts.append(text + (f" ({row['name']})" if row["name"] else ""))
    shown = texts[0] if len(rows) == 1 else f"{len(rows)} settings, from {texts[0]} to {texts[-1]}"
    met, outside = verdicts.count(SUPPORTED), verdicts.count(REFUTED)
    if rule == "all":
        verdict = REFUTED if outside else SUPPORTED if met == len(rows) else UNTESTED
    else:
        verdict = SUPPORTED if met else REFUTED if rule == "some" and outside == len(rows) else UNTESTED
    why = f"of {len(rows)} settings {met} meet what was published and {outside} are outside of it"
    if fewest < ENOUGH:
        why += f"; fewer than {ENOUGH} pairs cannot tell"
    return shown, fewest, verdict, why


def ends_and_text(quantity: str, row: dict, settings: int) -> tuple[float, float, str]:
    """Low and high end of a difference, and the interval as text.

    It is one of `settings` intervals that hold together with 95 % (Bonferroni).
    """
    half_width, n = row["half_width"], int(row["n"])
    if n < 2:
        half_width = math.nan
    else:
        alone, together = scipy.stats.t.ppf([0.975, 1 - 0.025 / settings], n - 1)
        half_width *= together / alone
    low, high = (change(quantity, row["mean"] + side * half_width) for side in (-1, 1))
    unit = " %" if quantity in COSTS.values() else " points"
    return low, high, interval(quantity, row["mean"], half_width, unit)


def meets(low: float, high: float, published: tuple[float, float]) -> str:
    """A range is met by an interval that touches it and excludes 0, a bound by one that is inside."""
    if high < published[0] or low > published[1]:
        return REFUTED
    if math.isinf(published[1]):
        return SUPPORTED if low >= published[0] else UNTESTED
    return UNTESTED if low <= 0 <= high else SUPPORTED
