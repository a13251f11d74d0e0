"""The claims of arXiv 2507.23536 on fine-tuning CNNs on the edge.

Claims about costs are judged on fake tensors (`forecast.cnn_costs`), claims about accuracy from finished runs
on shifted data.  Published figures are inputs; the verdicts are computed.
"""

from __future__ import annotations

import itertools
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
    ends_and_text,
    finding,
    judged,
    named,
    untested,
)
from toolkit.analysis.statistics import differences, mean_and_interval, means, parameters, with_environments
from toolkit.cache import kept
from toolkit.forecast.cnn_costs import PUBLISHED_SETTING, StepCosts, step_costs
from toolkit.forecast.forecasts import FORECASTS, made_by
from toolkit.training.record import load_curves

NETWORKS = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100")
PAPER = Paper("arXiv 2507.23536", ("cifar10-c", "vww"), NETWORKS)
CNNS = "(small:)?(demo_cnn|resnet|mobilenet)"  # backbones that make a run one of this subject
MOBILE = "mobilenet|demo_cnn"  # those with depthwise convolutions
NEAR = 5.0  # points: what counts as the published figure
OUR_GAP, AUTHORS_GAP = 50, 200  # our default, and that of the code of GaLore's authors
OUR_RANK = 32  # of GaLore's subspaces, our default
AT_224 = "224 px, ten classes, adapters of rank 1, GaLore of rank 32; counted on fake tensors"


def is_about_cnns(records: pd.DataFrame) -> bool:
    """Whether any run is of a CNN like the paper's or on shifted data."""
    if records.empty:
        return False
    return bool((records.dataset.str.contains("-c:") | records.backbone.str.match(CNNS)).any())


def findings(records: pd.DataFrame) -> pd.DataFrame:
    """All claims against counted steps and `records` (as from `load_records`) of runs on shifted data."""
    records = with_environments(records)
    ok = records[(records.status == "ok") & (records.phase == "training")] if len(records) else records
    ok = ok[ok.dataset.str.contains("-c:")] if len(ok) else ok
    why_none = "no run on shifted data (*-c:) ended ok"
    return pd.DataFrame([*_of_costs(), *judged(CLAIMS, ok, PAPER, why_none)])


# --- costs ---


def _of_costs() -> list[dict]:
    """Counted once and kept on disk: it takes half a minute."""
    asked = {"question": f"costs in {PAPER.name}", **made_by()}
    return kept(FORECASTS, asked, lambda: {"findings": _count_costs()})["findings"]


def _count_costs() -> list[dict]:
    found = []
    for text, networks, batch_size, changes_of, holds, why in COST_CLAIMS:
        changes = {network: changes_of(network, batch_size) for network in networks}
        ours = []
        for network, own in changes.items():
            ours.append(f"{network} " + ", ".join(f"{value:+.0f} %{how}" for how, value in own.items()))
        verdict = SUPPORTED if holds(changes) else REFUTED
        evidence = "; ".join(ours).replace("-", "−"), 0, verdict, why
        found.append(finding(text, f"{PAPER.name}, abstract", f"batch {batch_size}, {AT_224}", evidence))
    return found


def _costs(backbone: str, method: str, batch_size: int) -> StepCosts:
    own = {"gap": OUR_GAP, "rank": OUR_RANK} if method == "galore" else PUBLISHED_SETTING
    return step_costs(backbone, method, batch_size=batch_size, **own)


def _changes(method: str, other: str, **figures: str) -> Callable[[str, int], dict[str, float]]:
    """By how many per cent figures of `method` differ from those of another: how it is counted -> figure."""

    def changes_of(backbone: str, batch_size: int) -> dict[str, float]:
        ours, theirs = (_costs(backbone, m, batch_size) for m in (method, other))
        changes = {}
        for figure, how in figures.items():
            changes[how] = 100 * (getattr(ours, figure) / getattr(theirs, figure) - 1)
        return changes

    return changes_of


def _galore_flops(backbone: str, batch_size: int) -> dict[str, float]:
    """Decompositions and projections are made once per step, so their share falls with the batch."""
    full, galore = (_costs(backbone, method, 1) for method in ("full", "galore"))
    whole = batch_size * (full.forward_flops + full.backward_flops) + full.optimizer_flops
    rest = galore.optimizer_flops - galore.svd_flops // OUR_GAP - full.optimizer_flops
    gaps = (OUR_GAP, AUTHORS_GAP)
    return {f" at gap {gap}": 100 * (rest + galore.svd_flops / gap) / whole for gap in gaps}


_LORA_MEMORY = {"resnet18": -67, "mobilenetv2_100": -22}  # per cent, as published
_lora_memory = _changes("lora", "full", peak_bytes="", published_bytes=" by sum of maxima")
_lora_flops = _changes("lora", "full", flops="", published_flops=" by its counter")
_dora_memory = _changes("dora", "lora", peak_bytes="")


def _all_near(changes: dict) -> bool:
    return all(abs(changes[network][""] - published) <= NEAR for network, published in _LORA_MEMORY.items())


def _all_in_range(changes: dict) -> bool:
    return all(10 <= value <= 30 for own in changes.values() for value in own.values())


_SAVES = "LoRA lowers the peak memory by 67 % on ResNet-18 and 22 % on MobileNetV2."
_SAVES_WHY = "LoRA saves gradients and Adam's state, whose share falls with the batch; 5 points are near"
_SVD = "GaLore takes 10 to 30 % more FLOPs than full fine-tuning, because of its SVD."
_SVD_WHY = "SVD and projections are made once per step; the paper's gap and rank are not known"
# text, networks, batch size, changes in per cent, whether they are as published, why
COST_CLAIMS = (
    (_SAVES, _LORA_MEMORY, 1, _lora_memory, _all_near, _SAVES_WHY),
    (_SAVES, _LORA_MEMORY, 16, _lora_memory, _all_near, _SAVES_WHY),
    (
        "Parameter-efficient methods save up to 95 % of the FLOPs (on MobileNets, by LoRA).",
        ("mobilenetv2_100", "mobilenetv3_large_100"), 1, _lora_flops,
        lambda changes: any(own[""] <= -95 + NEAR for own in changes.values()),
        "its counter takes the weight gradients of depthwise convolutions `groups` times; LoRA has none",
    ),
    (_SVD, _LORA_MEMORY, 1, _galore_flops, _all_in_range, _SVD_WHY),
    (_SVD, _LORA_MEMORY, 16, _galore_flops, _all_in_range, _SVD_WHY),
    (
        "DoRA takes more memory than LoRA.", _LORA_MEMORY, 1, _dora_memory,
        lambda changes: all(own[""] > 0 for own in changes.values()),
        "DoRA keeps more of every adapted layer, whose output it scales",
    ),
)  # fmt: skip


# --- accuracy ---


def _from_full(part: pd.DataFrame, *methods: str) -> tuple[pd.DataFrame, str]:
    """How far each setting of `methods` is from full fine-tuning, in points, and why this is unknown."""
    for method in ("full", *methods):
        if not (part.method == method).any():
            return pd.DataFrame(), f"no finished run of {method}"
    table = differences(part[part.method.isin((*methods, "full"))], "score_pct", {"method": "full"})
    table = table[table.n >= ENOUGH] if len(table) else table
    lacking = [method for method in methods if table.empty or not (table.method == method).any()]
    return table, f"fewer than {ENOUGH} pairs of full with {', '.join(lacking)}" if lacking else ""


def _judge_closest(part: pd.DataFrame) -> Evidence:
    """Each method by its setting nearest to full; distances as far as the intervals leave them open."""
    table, why = _from_full(part, "galore", "lora", "dora", "norm")
    if why:
        return untested(why)
    rows = sorted(named(table), key=lambda row: abs(row["mean"]))
    nearest = {row["method"]: row for row in reversed(rows)}
    least, most, texts = {}, {}, []
    for method, row in nearest.items():
        low, high, text = ends_and_text("score_pct", row, len(table))
        least[method] = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        most[method] = max(abs(low), abs(high))
        texts.append(f"{row['name']} {text}")
    text, n = "; ".join(texts), int(min(row["n"] for row in nearest.values()))
    others = [method for method in most if method != "galore"]
    nearer = [method for method in others if most[method] < least["galore"]]
    if nearer:
        return text, n, REFUTED, f"{', '.join(nearer)} clearly nearer to full"
    if all(most["galore"] < least[method] for method in others):
        return text, n, SUPPORTED, "all others are clearly farther from full"
    return untested("the intervals leave open which method is nearest to full", text, n)


def _judge_loss(part: pd.DataFrame) -> Evidence:
    """Each setting of `norm` against full fine-tuning; a smaller loss elsewhere refutes nothing."""
    table, why = _from_full(part, "norm")
    return untested(why) if why else decide("score_pct", named(table), (-100.0, -40.0 + NEAR), "up to")


def _judge_swing(part: pd.DataFrame) -> Evidence:
    """The best against the worst setting of LoRA or DoRA on one backbone with depthwise convolutions."""
    part = part[part.backbone.str.contains(MOBILE) & part.method.isin(("lora", "dora"))]
    rows = []
    for (method, backbone), runs in part.groupby(["method", "backbone"]):
        table = means(runs)
        varying = [name for name in parameters() if name in table and table[name].nunique() > 1]
        if not varying:
            continue
        by_seed = runs.pivot_table(index="seed", columns=varying, values="test_top1_pct")
        best, worst = by_seed.mean().idxmax(), by_seed.mean().idxmin()
        mean, half, n = mean_and_interval(by_seed[best] - by_seed[worst])
        if n >= ENOUGH:
            name = f"{method} on {backbone}: {', '.join(varying)} {best} against {worst}"
            rows.append({"mean": mean, "half_width": half, "n": n, "name": name})
    if not rows:
        return untested(f"no two settings of lora or dora share {ENOUGH} seeds on a MobileNet")
    return decide("score_pct", rows, (20.0 - NEAR, 100.0), "up to")


def _judge_rank(part: pd.DataFrame) -> Evidence:
    """Each rank of LoRA against the next higher one, paired by seed."""
    lora = part[part.method == "lora"]
    rows = []
    for low, high in itertools.pairwise(sorted(lora["rank"].dropna().unique())):
        table = differences(lora[lora["rank"].isin((low, high))], "score_pct", {"rank": low})
        table = table[table.n >= ENOUGH]
        rows += [row | {"name": f"rank {low:g} to {high:g}"} for row in table.to_dict("records")]
    if not rows:
        return untested(f"no two ranks of lora share {ENOUGH} seeds")
    return decide("score_pct", rows, (-100.0, 0.0), "some")


def _judge_iterations(part: pd.DataFrame) -> Evidence:
    """Epochs until the validation accuracy that both LoRA and GaLore reach in the end, paired by seed.

    Of several settings of a method the one that ends highest counts.
    """
    same = [n for n in ("seed", "backbone", "batch_size", "epochs", "checkpointing") if n in part]
    ratios = []
    for _, runs in part[part.method.isin(("lora", "galore"))].groupby(same):
        curves = {}
        for run in runs.itertuples():
            curve = [row["val_top1_pct"] for row in load_curves(run.folder).get("history") or ()]
            curves[run.method] = max(curves.get(run.method, []), curve, key=lambda values: values[-1:])
        if len(curves) == 2 and all(curves.values()):
            level = min(curve[-1] for curve in curves.values())
            first = {m: next(i for i, v in enumerate(c, 1) if v >= level) for m, c in curves.items()}
            ratios.append((runs.seed.iloc[0], math.log(first["lora"] / first["galore"])))
    # Averaged over the settings of a seed, which are not independent
    by_seed = pd.DataFrame(ratios, columns=["seed", "ratio"]).groupby("seed").ratio.mean()
    mean, half, n = mean_and_interval(by_seed)
    if n < ENOUGH:
        return untested(f"fewer than {ENOUGH} pairs of lora and galore with validation curves", n=n)
    row = {"mean": mean, "half_width": half, "n": n, "name": "more epochs than GaLore"}
    return decide("adapt_seconds", [row], (50.0, 150.0))  # epochs are a cost as well: a ratio


_TEXT = f"{PAPER.name}, text"
CLAIMS = (
    Claim("GaLore's accuracy is the closest to full fine-tuning.", _TEXT, _judge_closest),
    Claim(
        "Batch norms and head alone lose up to 40 points on hard shifts.", _TEXT, _judge_loss
    ),
    Claim(
        "LoRA and DoRA swing by up to 20 points on MobileNets (between settings, as we read it).", _TEXT,
        _judge_swing,
    ),
    Claim("A higher rank is not always better.", _TEXT, _judge_rank),
    Claim("LoRA needs about twice GaLore's iterations.", _TEXT, _judge_iterations),
)  # fmt: skip
