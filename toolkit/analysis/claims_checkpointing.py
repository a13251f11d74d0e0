"""Verdicts on published claims.

Published figures stand here as inputs with their source; a verdict is computed from the records alone, and
is "not tested here" wherever these cannot decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import scipy.stats

from toolkit.analysis.paired import FIGURES, QUANTITIES, change, differences, interval
from toolkit.analysis.statistics import DATA, SHOWN, adaptation, groups, mean_and_interval, without_simulated
from toolkit.baselines.registry import PROTOCOLS
from toolkit.budget import format_bytes
from toolkit.measure.published_counters import double_count
from toolkit.measure.scores import netscore

ENOUGH = 3  # pairs that a verdict needs
SUPPORTED, REFUTED, UNTESTED = "✓ supported", "✗ not supported", "○ not tested here"


@dataclass(frozen=True)
class Finding:
    """A published claim beside our figures."""

    claim: str
    source: str
    tested_on: str  # data and backbones of ours
    ours: str  # the figures behind the verdict
    n: int  # pairs, or runs, of the setting that has fewest; 0: none
    verdict: str  # SUPPORTED | REFUTED | UNTESTED
    why: str


Evidence = tuple[str, int, str, str]  # fields of a finding: ours, n, verdict, why


@dataclass(frozen=True)
class Claim:
    """A published statement, and the function that holds it against runs on one data set."""

    text: str
    source: str
    judge: Callable[[pd.DataFrame], Evidence]


def findings(frame: pd.DataFrame) -> list[Finding]:
    """All of `CLAIMS` against the records in `frame`, once per environment and data set that can tell.

    `frame`: as `load_records`, with a column `environment` of runs that may be compared.  A claim that no
    data set can tell about has one finding that says why.
    """
    ok = frame[frame.status == "ok"] if len(frame) else frame
    return [_table_v_scores(), *judged(CLAIMS, ok, PAPER, "no run ended ok")]


@dataclass(frozen=True)
class Paper:
    """Where claims come from, and what they were made on."""

    name: str
    datasets: tuple[str, ...]  # names, up to the first colon
    backbones: tuple[str, ...]


PAPER = Paper(
    "arXiv 2607.02158", ("cifar100", "dtd"), ("vit_small", "tiny_vit", "vim_small", "mambavision_t")
)


def judged(claims: Sequence[Claim], ok: pd.DataFrame, paper: Paper, why_none: str) -> list[Finding]:
    """`claims` against finished runs, once per environment and data set that can tell.

    A claim that none can tell about has one finding that says why: `why_none` if there are no runs.
    """
    found = []
    for claim in claims:
        own = []
        for _, part in ok.groupby(["environment", "dataset"]) if len(ok) else ():
            own.append(Finding(claim.text, claim.source, _where(part, paper), *claim.judge(part)))
        told = [finding for finding in own if finding.n] or own[:1]
        found += told or [Finding(claim.text, claim.source, "–", "–", 0, UNTESTED, why_none)]
    return found


def _where(part: pd.DataFrame, paper: Paper) -> str:
    dataset, backbones = part.dataset.iloc[0], sorted(part.backbone[part.phase == "training"].unique())
    others = [] if dataset.split(":")[0] in paper.datasets else ["data"]
    others += [] if set(backbones) <= set(paper.backbones) else ["backbones"]
    text = f"{dataset}, {', '.join(backbones) or 'baselines alone'} ({part.environment.iloc[0]})"
    return text + (f"; not the paper's {' and '.join(others)}" if others else "")


def _judge_change(
    quantity: str, against: dict, subject: dict, published: tuple[float, float]
) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "`subject` changes `quantity` by `published` (points or per cent) from `against`"."""

    def judge(part: pd.DataFrame) -> Evidence:
        part = part[part.phase == "training"]
        if "checkpointing" not in against and (part.checkpointing == "none").any():
            part = part[part.checkpointing == "none"]  # stock training, as published
        idle = (part.checkpointing == "threshold") & (part.checkpointed_blocks == 0)
        table = differences(part[~idle], quantity, against)
        table = table[(table[list(subject)] == pd.Series(subject)).all(axis=1)]
        if table.empty:
            return "–", 0, UNTESTED, _why_no_pairs(part, idle, quantity, against, subject)
        return _over_settings(table, quantity, published)

    return judge


def _why_no_pairs(part: pd.DataFrame, idle: pd.Series, quantity: str, against: dict, subject: dict) -> str:
    for values in (subject, against):
        if not (part[list(values)] == pd.Series(values)).all(axis=1).any():
            return f"no finished run of {', '.join(values.values())}"
    if idle[(part[list(subject)] == pd.Series(subject)).all(axis=1)].all():
        return "the rule checkpointed nothing: all runs are far below their budget"
    if adaptation(without_simulated(part))[QUANTITIES[quantity]].isna().all():
        return f"no {quantity} was measured"
    return "no two runs differ in this and share seed, data and all else"


def _over_settings(table: pd.DataFrame, quantity: str, published: tuple[float, float]) -> Evidence:
    """One verdict over all settings, their intervals widened so that together they hold with 95 %."""
    verdicts, texts, fewest = [], [], int(table.n.min())
    unit = " points" if quantity == "accuracy" else " %"
    keys = [name for name in (*SHOWN, "budget") if table[name].nunique() > 1]
    if len(table) > 1 and (not keys or table.duplicated(keys).any()):
        keys = [name for name in table if name not in (*FIGURES, *DATA) and table[name].nunique() > 1]
    for row in table.sort_values("mean").to_dict("records"):
        values = [format_bytes(int(row[k])) if k == "budget" else str(row[k]) for k in keys]
        half = wider(row["half_width"], row["n"], len(table))
        ends = [change(quantity, row["mean"] + side * half) for side in (-1, 1)]
        verdicts.append(meets(*ends, published) if row["n"] >= ENOUGH else UNTESTED)
        name = f" ({', '.join(values)})" if values else ""
        texts.append(interval(quantity, row["mean"], half, unit) + name)
    shown = texts[0] if len(texts) == 1 else f"{len(texts)} settings, from {texts[0]} to {texts[-1]}"
    return shown, fewest, *_together(verdicts, fewest)


def wider(half_width: float | None, n: int, settings: int) -> float:
    """Half width of one of so many intervals that hold together with 95 % (Bonferroni); NaN for one pair."""
    if n < 2:
        return math.nan
    alone, together = scipy.stats.t.ppf([0.975, 1 - 0.025 / settings], n - 1)
    return half_width * together / alone


def meets(low: float, high: float, published: tuple[float, float]) -> str:
    """A range is met by an interval that touches it and leaves 0 out, a bound by one that is inside."""
    if high < published[0] or low > published[1]:
        return REFUTED
    if math.isinf(published[1]):
        return SUPPORTED if low >= published[0] else UNTESTED
    return UNTESTED if low <= 0 <= high else SUPPORTED


def _together(verdicts: list[str], fewest: int) -> tuple[str, str]:
    count = {verdict: verdicts.count(verdict) for verdict in (SUPPORTED, REFUTED, UNTESTED)}
    of = f"of {len(verdicts)} settings"
    if count[REFUTED]:
        return REFUTED, f"the interval is outside what was published in {count[REFUTED]} {of}"
    if count[UNTESTED]:
        few = f": fewer than {ENOUGH} pairs" if fewest < ENOUGH else ": the interval is too wide"
        return UNTESTED, f"{count[UNTESTED]} {of} cannot tell{few}"
    where = "" if len(verdicts) == 1 else f" in all {len(verdicts)} settings"
    return SUPPORTED, f"the interval meets what was published{where}"


def _judge_against_best(
    protocols: tuple[str, ...], prefix: str, *, better: bool
) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "foundation models under `protocols` are better (or worse) than the best fine-tuned".

    Of several the most accurate counts; those whose name does not begin with `prefix` are shown at most.
    """

    def judge(part: pd.DataFrame) -> Evidence:
        part = part[part.test_top1_pct.notna()]
        rivals = part[(part.phase == "inference") & part.method.isin(protocols)]
        meant = rivals.backbone.str.startswith(prefix)
        rivals = rivals[meant] if meant.any() else rivals
        tuned = part[part.phase == "training"]
        if rivals.empty or tuned.empty:
            missing = "baseline of this kind" if rivals.empty else "fine-tuned model"
            return "–", 0, UNTESTED, f"no finished run of a {missing}"
        theirs, best = (
            max(groups(runs), key=lambda group: group[1].test_top1_pct.mean()) for runs in (rivals, tuned)
        )
        accuracy = theirs[1].test_top1_pct.mean()
        mean, half, n = mean_and_interval(best[1].test_top1_pct)
        text = f"{accuracy:.2f} % ({theirs[0]['backbone']}, {theirs[0]['method']}) against {mean:.2f}"
        text += f"{'' if half is None else f' ± {half:.2f}'} % ({best[0]['backbone']}, {best[0]['method']})"
        if not meant.any():
            return text, n, UNTESTED, f"no finished run of {prefix}; another frozen model is shown"
        if len({tuple(group[DATA].iloc[0]) for _, group in (theirs, best)}) > 1:
            return text, n, UNTESTED, "the two saw different data"
        if n < ENOUGH:
            return text, n, UNTESTED, f"fewer than {ENOUGH} seeds of the fine-tuned model"
        if abs(accuracy - mean) <= half:
            return text, n, UNTESTED, "the interval of the fine-tuned model contains the other's accuracy"
        above = accuracy > mean
        why = f"the foundation model is {'above' if above else 'below'} the interval of the fine-tuned one"
        return text, n, SUPPORTED if above == better else REFUTED, why

    return judge


def _judge_monotone(part: pd.DataFrame) -> Evidence:
    """Whether some method trains fewer parameters than another and takes more memory, paired by seed."""
    part = part[(part.phase == "training") & (part.checkpointing == "none")]
    trainable = part.groupby(["backbone", "method"]).params_trainable.min()
    pairs = [
        {"against": method, **row}
        for method in part.method.unique()
        for row in differences(part, "peak memory", {"method": method}).to_dict("records")
        if row["n"] >= ENOUGH
        and trainable[row["backbone"], row["method"]] < trainable[row["backbone"], method]
    ]
    if not pairs:
        return "–", 0, UNTESTED, f"no two methods without checkpointing have {ENOUGH} pairs"
    top = pd.Series(max(pairs, key=lambda pair: pair["mean"]))
    half = wider(top.half_width, top.n, len(pairs))
    text = f"peak of {top.method} against {top.against}'s: {interval('peak memory', top['mean'], half, ' %')}"
    text += f"; it trains {trainable[top.backbone, top.method]:,.0f} parameters instead of "
    text += f"{trainable[top.backbone, top.against]:,.0f}"
    if top["mean"] - half > 0:
        return text, int(top.n), SUPPORTED, "the interval of this pair is above 0"
    if top["mean"] + half < 0:
        return text, int(top.n), REFUTED, f"fewer parameters take less memory in all {len(pairs)} pairs"
    return text, int(top.n), UNTESTED, "the interval of the clearest pair contains 0"


def _judge_table_v(part: pd.DataFrame) -> Evidence:
    part = part[(part.backbone == "vit_small") & (part.method == "full") & (part.dataset == "cifar100")]
    accuracies = [group.test_top1_pct for _, group in groups(part[part.checkpointing == "none"])]
    mean, half, n = mean_and_interval(max(accuracies, key=len, default=part.test_top1_pct[:0]))
    if n < ENOUGH:
        return "–", n, UNTESTED, f"fewer than {ENOUGH} finished runs of vit_small, full, none, on cifar100"
    met = abs(mean - TABLE_V["accuracy_pct"]) <= half
    why = f"the interval {'contains' if met else 'leaves out'} the published figure"
    return f"{mean:.2f} ± {half:.2f} %", n, SUPPORTED if met else REFUTED, why


# The row "ViT-S, full fine-tuning" of table V, CIFAR-100, as public code quotes it.
TABLE_V = {"accuracy_pct": 89.7, "seconds": 21.3, "watts": 144.2, "peak_mib": 1084}
TABLE_V_SCORES = {"NS-E": 69.39, "NS-M": 70.52, "NS#": 61.81}


def _table_v_scores() -> Finding:
    ours = {kind: netscore(kind, **TABLE_V) for kind in TABLE_V_SCORES}
    met = all(abs(ours[kind] - score) < 0.01 for kind, score in TABLE_V_SCORES.items())
    return Finding(
        "Table V: NS-E 69.39, NS-M 70.52, NS# 61.81 for 89.7 %, 21.3 s, 144.2 W and 1084 MiB.",
        f"{PAPER.name}, as quoted in public code",
        "the published figures; no run is needed",
        ", ".join(f"{kind} {score:.2f}" for kind, score in ours.items()),
        0,
        SUPPORTED if met else REFUTED,
        f"our formulas {'give' if met else 'do not give'} the published scores from the published costs",
    )


_NONE, _FULL, _RULE = {"checkpointing": "none"}, {"method": "full"}, {"checkpointing": "threshold"}
_EXCESS = double_count().loc["as its meter adds: both", "joules too high %"]
_ABSTRACT = f"{PAPER.name}, abstract"
CLAIMS = (  # ranges are as wide as rounding to whole per cents leaves them
    Claim(
        "Adaptive checkpointing lowers the peak memory by 43 to 79 %.",
        _ABSTRACT,
        _judge_change("peak memory", _NONE, _RULE, (-79.5, -42.5)),
    ),
    Claim(
        "Adaptive checkpointing costs 9 to 30 % more energy.",
        f"{_ABSTRACT}; in the log beside its code the meter adds {_EXCESS:.1f} % by counting moments twice",
        _judge_change("energy", _NONE, _RULE, (8.5, 30.5)),
    ),
    *(
        Claim(text.format(title), _ABSTRACT, _judge_change(quantity, _FULL, {"method": method}, published))
        for method, title in (("qlora", "QLoRA"), ("bitfit", "BitFit"))
        for text, quantity, published in (
            (
                "{} saves 20 to 30 % of the energy (of full fine-tuning, as we read it).",
                "energy",
                (-30.5, -19.5),
            ),
            ("{} costs no more than 1 to 2 points of accuracy.", "accuracy", (-2.0, math.inf)),
        )
    ),
    Claim(
        "Frozen DINOv2 features with a light head beat the best fine-tuned model (91.7 against 89.7 % on "
        "CIFAR-100).",
        _ABSTRACT,
        _judge_against_best(PROTOCOLS["features"], "dinov2", better=True),
    ),
    Claim(
        "Small autoregressive vision-language models are not competitive.",
        _ABSTRACT,
        _judge_against_best(PROTOCOLS["generative"], "", better=False),
    ),
    Claim(
        "Peak memory does not follow the number of trained parameters.",
        f"{PAPER.name}, text, as quoted second-hand",
        _judge_monotone,
    ),
    Claim(
        "Full fine-tuning of ViT-S reaches 89.7 % on CIFAR-100 (table V).",
        f"{PAPER.name}, as quoted in public code",
        _judge_table_v,
    ),
)
