"""The claims of arXiv 2607.02158 on checkpointing, efficient methods and foundation models.

Published figures are inputs, each with its source; the verdicts are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from toolkit.analysis.claims import (
    ENOUGH,
    REFUTED,
    SUPPORTED,
    Claim,
    Evidence,
    Paper,
    decide,
    finding,
    judged,
    named,
    untested,
)
from toolkit.analysis.statistics import DATA, adaptation, differences, means, with_environments
from toolkit.baselines.registry import PROTOCOLS
from toolkit.measure.quantities import QUANTITIES
from toolkit.measure.scores import netscore

BACKBONES = ("vit_small", "tiny_vit", "vim_small", "mambavision_t")
PAPER = Paper("arXiv 2607.02158", ("cifar100", "dtd"), BACKBONES)
# The row "ViT-S, full fine-tuning" of table V, CIFAR-100, as public code quotes it.
TABLE_V = {"accuracy_pct": 89.7, "seconds": 21.3, "watts": 144.2, "peak_mib": 1084}
TABLE_V_SCORES = {"NS-E": 69.39, "NS-M": 70.52, "NS#": 61.81}

# One epoch of adaptive checkpointing in the log that comes with the code of arXiv 2607.02158
# (step_energy.csv.gz, 7,253 rows): its 782 training steps, and the rows "train_fwd_re" that lie inside
# them.  (These rows are meant to be recomputation; they time the first forward pass of checkpointed
# blocks, since torch stops the second by an exception before it is logged.)
LOGGED_STEPS = {"seconds": 428.32, "joules": 66_960.28}
LOGGED_INSIDE = {"seconds": 94.97, "joules": 14_419.40}


def double_count() -> pd.DataFrame:
    """Time and energy of the logged epoch: as its meter adds them up, and with every moment counted once."""
    rows = {
        "training steps": LOGGED_STEPS,
        "train_fwd_re, inside the steps": LOGGED_INSIDE,
        "as its meter adds: both": {unit: LOGGED_STEPS[unit] + LOGGED_INSIDE[unit] for unit in LOGGED_STEPS},
        "counted once": LOGGED_STEPS,
    }
    frame = pd.DataFrame(rows).T
    frame["seconds too high %"] = 100 * (frame.seconds / LOGGED_STEPS["seconds"] - 1)
    frame["joules too high %"] = 100 * (frame.joules / LOGGED_STEPS["joules"] - 1)
    percent = ["seconds too high %", "joules too high %"]
    frame.loc[["training steps", "train_fwd_re, inside the steps"], percent] = None
    return frame


def findings(records: pd.DataFrame) -> pd.DataFrame:
    """All of `CLAIMS` against `records` (as from `load_records`), once per environment and data set."""
    records = with_environments(records)
    ok = records[records.status == "ok"] if len(records) else records
    return pd.DataFrame([_table_v_scores(), *judged(CLAIMS, ok, PAPER, "no run ended ok")])


def _judge_change(
    quantity: str, against: dict, subject: dict, published: tuple[float, float]
) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "`subject` changes `quantity` by `published` (points or per cent) from `against`"."""

    def judge(part: pd.DataFrame) -> Evidence:
        part = part[part.phase == "training"]
        if "checkpointing" not in against and (part.checkpointing == "none").any():
            part = part[part.checkpointing == "none"]  # stock training, as published
        for values in (subject, against):
            if not (part[list(values)] == pd.Series(values)).all(axis=1).any():
                return untested(f"no finished run of {', '.join(values.values())}")
        idle = (part.checkpointing == "threshold") & (part.checkpointed_blocks == 0)
        table = differences(part[~idle], quantity, against)
        table = table[(table[list(subject)] == pd.Series(subject)).all(axis=1)]
        if len(table):
            return decide(quantity, named(table), published)
        if idle[(part[list(subject)] == pd.Series(subject)).all(axis=1)].all():
            return untested("the rule checkpointed nothing: all runs are far below their budget")
        if adaptation(part)[quantity].isna().all():
            return untested(f"no {QUANTITIES[quantity].label} was measured")
        return untested("no two runs differ in this and share seed, data and all else")

    return judge


def _judge_against_best(
    protocols: tuple[str, ...], prefix: str, *, better: bool
) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "foundation models under `protocols` are better (or worse) than the best fine-tuned one".

    The most accurate of those whose name begins with `prefix` counts.
    """

    def judge(part: pd.DataFrame) -> Evidence:
        part = part[part.test_top1_pct.notna()]
        rivals = part[(part.phase == "inference") & part.method.isin(protocols)]
        rivals, tuned = rivals[rivals.backbone.str.startswith(prefix)], part[part.phase == "training"]
        if rivals.empty or tuned.empty:
            missing = f"{prefix} baseline of this kind" if rivals.empty else "fine-tuned model"
            return untested(f"no finished run of a {missing}")
        theirs, ours = _best(rivals), _best(tuned)
        half, n = ours.test_top1_pct_half_width, int(ours.n)
        text = f"{theirs.test_top1_pct:.2f} % ({theirs.backbone}, {theirs.method}) against "
        text += f"{ours.test_top1_pct:.2f}{'' if math.isnan(half) else f' ± {half:.2f}'} % "
        text += f"({ours.backbone}, {ours.method})"
        if part[[name for name in DATA if name in part]].drop_duplicates().shape[0] > 1:
            return untested("the two saw different data", text, n)
        if n < ENOUGH:
            return untested(f"fewer than {ENOUGH} seeds of the fine-tuned model", text, n)
        if abs(theirs.test_top1_pct - ours.test_top1_pct) <= half:
            return untested("the interval of the fine-tuned model contains the other's accuracy", text, n)
        above = theirs.test_top1_pct > ours.test_top1_pct
        why = f"the foundation model is {'above' if above else 'below'} the interval of the fine-tuned one"
        return text, n, SUPPORTED if above == better else REFUTED, why

    return judge


def _best(runs: pd.DataFrame) -> pd.Series:
    table = means(runs)
    return table.loc[table.test_top1_pct.idxmax()]


def _judge_monotone(part: pd.DataFrame) -> Evidence:
    """Whether some method trains fewer parameters than another and takes more memory, paired by seed."""
    part = part[(part.phase == "training") & (part.checkpointing == "none")]
    trainable = part.groupby(["backbone", "method"]).params_trainable.min()
    rows = []
    for other in part.method.unique():
        for row in differences(part, "peak_bytes", {"method": other}).to_dict("records"):
            own, theirs = (trainable[row["backbone"], method] for method in (row["method"], other))
            if row["n"] >= ENOUGH and own < theirs:
                numbers = f"{own:,.0f} parameters instead of {theirs:,.0f}"
                rows.append(row | {"name": f"{row['method']} against {other}, {numbers}"})
    if not rows:
        return untested(f"no two methods without checkpointing have {ENOUGH} pairs")
    return decide("peak_bytes", rows, (0, math.inf), "some")


def _judge_table_v(part: pd.DataFrame) -> Evidence:
    part = part[(part.backbone == "vit_small") & (part.method == "full") & (part.dataset == "cifar100")]
    table = means(part[part.checkpointing == "none"])
    if table.empty or table.n.max() < ENOUGH:
        return untested(f"fewer than {ENOUGH} finished runs of vit_small, full, none, on cifar100")
    row = table.loc[table.n.idxmax()]
    mean, half = row.test_top1_pct, row.test_top1_pct_half_width
    met = abs(mean - TABLE_V["accuracy_pct"]) <= half
    why = f"the interval {'contains' if met else 'excludes'} the published figure"
    return f"{mean:.2f} ± {half:.2f} %", int(row.n), SUPPORTED if met else REFUTED, why


def _table_v_scores() -> dict:
    ours = {kind: netscore(kind, **TABLE_V) for kind in TABLE_V_SCORES}
    met = all(abs(ours[kind] - score) < 0.01 for kind, score in TABLE_V_SCORES.items())
    why = f"our formulas {'give' if met else 'do not give'} the published scores from the published costs"
    text = ", ".join(f"{kind} {score:.2f}" for kind, score in ours.items())
    return finding(
        "Table V: NS-E 69.39, NS-M 70.52, NS# 61.81 for 89.7 %, 21.3 s, 144.2 W and 1084 MiB.",
        f"{PAPER.name}, as quoted in public code", "the published figures; no run is needed",
        (text, 0, SUPPORTED if met else REFUTED, why),
    )  # fmt: skip


_NONE, _FULL, _RULE = {"checkpointing": "none"}, {"method": "full"}, {"checkpointing": "threshold"}
_QLORA, _BITFIT = {"method": "qlora"}, {"method": "bitfit"}
_EXCESS = double_count().loc["as its meter adds: both", "joules too high %"]
_ABSTRACT = f"{PAPER.name}, abstract"
_QUOTED = f"{PAPER.name}, as quoted in public code"
_METER = f"{_ABSTRACT}; its public log counts moments twice, which adds {_EXCESS:.1f} %"
_SAVES, _COSTS_LITTLE = (-30.5, -19.5), (-2.0, math.inf)  # ranges are as wide as rounding leaves them
CLAIMS = tuple(
    Claim(*claim)
    for claim in (
        ("Adaptive checkpointing lowers the peak memory by 43 to 79 %.", _ABSTRACT,
         _judge_change("peak_bytes", _NONE, _RULE, (-79.5, -42.5))),
        ("Adaptive checkpointing costs 9 to 30 % more energy.", _METER,
         _judge_change("adapt_joules", _NONE, _RULE, (8.5, 30.5))),
        ("QLoRA saves 20 to 30 % of the energy (of full fine-tuning, as we read it).", _ABSTRACT,
         _judge_change("adapt_joules", _FULL, _QLORA, _SAVES)),
        ("QLoRA costs no more than 1 to 2 points of accuracy.", _ABSTRACT,
         _judge_change("score_pct", _FULL, _QLORA, _COSTS_LITTLE)),
        ("BitFit saves 20 to 30 % of the energy (of full fine-tuning, as we read it).", _ABSTRACT,
         _judge_change("adapt_joules", _FULL, _BITFIT, _SAVES)),
        ("BitFit costs no more than 1 to 2 points of accuracy.", _ABSTRACT,
         _judge_change("score_pct", _FULL, _BITFIT, _COSTS_LITTLE)),
        ("Frozen DINOv2 features with a light head beat the best fine-tuned model (91.7 against 89.7 % on "
         "CIFAR-100).", _ABSTRACT, _judge_against_best(PROTOCOLS["features"], "dinov2", better=True)),
        ("Small autoregressive vision-language models are not competitive.", _ABSTRACT,
         _judge_against_best(PROTOCOLS["generative"], "", better=False)),
        ("Peak memory does not follow the number of trained parameters.",
         f"{PAPER.name}, text, as quoted second-hand", _judge_monotone),
        ("Full fine-tuning of ViT-S reaches 89.7 % on CIFAR-100 (table V).", _QUOTED, _judge_table_v),
    )
)  # fmt: skip
