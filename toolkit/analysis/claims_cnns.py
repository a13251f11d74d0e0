"""The claims of arXiv 2507.23536 on fine-tuning CNNs on the edge.

Claims about costs are judged on fake tensors (`forecast.cnn_costs`), claims about accuracy from finished runs
on shifted data.  Published figures are inputs; the verdicts are computed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import pandas as pd

from toolkit.analysis.claims import (
    ENOUGH,
    REFUTED,
    SUPPORTED,
    Claim,
    Evidence,
    Paper,
    ends_and_text,
    finding,
    judged,
    meets,
    untested,
)
from toolkit.analysis.statistics import (
    FIGURES,
    differences,
    mean_and_interval,
    means,
    with_environments,
)
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
AT_224 = "224 px, ten classes, rank 1; counted on fake tensors"


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
    return [_memory(1), _memory(16), _flops(), _galore_flops(1), _galore_flops(16), _dora_memory()]


def _costs(backbone: str, method: str, batch_size: int) -> StepCosts:
    own = {"gap": OUR_GAP, "rank": OUR_RANK} if method == "galore" else PUBLISHED_SETTING
    return step_costs(backbone, method, batch_size=batch_size, **own)


def _change(backbone: str, method: str, other: str, batch_size: int, figure: str) -> float:
    """By how many per cent a figure of `method` differs from that of another method."""
    ours, theirs = (getattr(_costs(backbone, m, batch_size), figure) for m in (method, other))
    return 100 * (ours / theirs - 1)


def _percent(value: float) -> str:
    return f"{value:+.0f} %".replace("-", "−")


def _counted(text: str, where: str, ours: list[str], held: bool, why: str) -> dict:
    return finding(
        text, f"{PAPER.name}, abstract", where, ("; ".join(ours), 0, SUPPORTED if held else REFUTED, why)
    )


def _memory(batch_size: int) -> dict:
    ours, held = [], True
    for backbone, published in {"resnet18": -67, "mobilenetv2_100": -22}.items():
        true = _change(backbone, "lora", "full", batch_size, "peak_bytes")
        maxima = _change(backbone, "lora", "full", batch_size, "published_bytes")
        ours.append(f"{backbone} {_percent(true)} ({_percent(maxima)} by sum of maxima)")
        held = held and abs(true - published) <= NEAR
    text = "LoRA lowers the peak memory by 67 % on ResNet-18 and 22 % on MobileNetV2."
    why = f"{'' if held else 'not '}within {NEAR:.0f} points: "
    why += "LoRA saves gradients and Adam's state, whose share falls with the batch"
    return _counted(text, f"batch {batch_size}, {AT_224}", ours, held, why)


def _flops() -> dict:
    ours, held = [], False
    for backbone in ("mobilenetv2_100", "mobilenetv3_large_100"):
        true = _change(backbone, "lora", "full", 1, "flops")
        published = _change(backbone, "lora", "full", 1, "published_flops")
        ours.append(f"{backbone} {_percent(true)} ({_percent(published)} by its counter)")
        held = held or true <= -95 + NEAR
    text = "Parameter-efficient methods save up to 95 % of the FLOPs (on MobileNets, by LoRA)."
    why = "its counter takes the weight gradients of depthwise convolutions `groups` times; LoRA has none"
    return _counted(text, f"batch 1, {AT_224}", ours, held, why)


def _galore_flops(batch_size: int) -> dict:
    """Decompositions and projections are made once per step, so their share falls with the batch."""
    ours, held = [], True
    for backbone in ("resnet18", "mobilenetv2_100"):
        full, galore = (_costs(backbone, method, 1) for method in ("full", "galore"))
        whole = batch_size * (full.forward_flops + full.backward_flops) + full.optimizer_flops
        rest = galore.optimizer_flops - galore.svd_flops // OUR_GAP - full.optimizer_flops
        more = {gap: 100 * (rest + galore.svd_flops / gap) / whole for gap in (OUR_GAP, AUTHORS_GAP)}
        held = held and all(10 <= value <= 30 for value in more.values())
        ours.append(f"{backbone} {', '.join(f'{_percent(v)} at gap {gap}' for gap, v in more.items())}")
    text = "GaLore takes 10 to 30 % more FLOPs than full fine-tuning, because of its SVD."
    where = f"batch {batch_size}, rank {OUR_RANK}, 224 px, ten classes; counted from shapes"
    why = "SVD and projections are made once per step; the paper's gap and rank are not known"
    return _counted(text, where, ours, held, why)


def _dora_memory() -> dict:
    more = {name: _change(name, "dora", "lora", 1, "peak_bytes") for name in ("resnet18", "mobilenetv2_100")}
    ours = [f"{backbone} {_percent(value)}" for backbone, value in more.items()]
    why = "DoRA keeps more of every adapted layer, whose output it scales"
    held = all(value > 0 for value in more.values())
    return _counted("DoRA takes more memory than LoRA.", f"batch 1, {AT_224}", ours, held, why)


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


def _named(row: pd.Series, table: pd.DataFrame) -> str:
    """Method and interval of a row, with what tells it from other rows of the method."""
    own = table[table.method == row.method].drop(columns=[*FIGURES, "method"])
    varying = [f"{name} {row[name]}" for name in own if own[name].nunique() > 1]
    _, _, text = ends_and_text("score_pct", row, len(table), " points")
    setting = f" ({', '.join(varying)})" if varying else ""
    return f"{row.method}{setting} {text}"


def _judge_closest(part: pd.DataFrame) -> Evidence:
    """Each method by its setting nearest to full; distances as far as the intervals leave them open."""
    table, why = _from_full(part, "galore", "lora", "dora", "norm")
    if why:
        return untested(why)
    nearest = table.loc[table["mean"].abs().groupby(table.method).idxmin()]
    least, most = {}, {}
    for _, row in nearest.iterrows():
        low, high, _ = ends_and_text("score_pct", row, len(table), "")
        least[row.method] = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
        most[row.method] = max(abs(low), abs(high))
    text, n = "; ".join(_named(row, table) for _, row in nearest.iterrows()), int(nearest.n.min())
    others = [method for method in most if method != "galore"]
    nearer = [method for method in others if most[method] < least["galore"]]
    if nearer:
        return text, n, REFUTED, f"{', '.join(nearer)} clearly nearer to full"
    if all(most["galore"] < least[method] for method in others):
        return text, n, SUPPORTED, "all others are clearly farther from full"
    return untested("the intervals leave open which method is nearest to full", text, n)


def _judge_loss(method: str, points: float) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "`method` loses up to `points` against full"; a smaller loss elsewhere refutes nothing."""

    def judge(part: pd.DataFrame) -> Evidence:
        table, why = _from_full(part, method)
        if why:
            return untested(why)
        row = table.loc[table["mean"].idxmin()]
        low, high, _ = ends_and_text("score_pct", row, len(table), "")
        text = f"largest loss of {len(table)} settings: {_named(row, table)}"
        if meets(low, high, (-100.0, -points + NEAR)) == SUPPORTED:
            return text, int(row.n), SUPPORTED, f"the interval reaches {points - NEAR:.0f} points"
        return untested(f"no such loss here; “up to {points:.0f}” allows that", text, int(row.n))

    return judge


def _judge_swing(part: pd.DataFrame) -> Evidence:
    """The best against the worst setting of LoRA or DoRA on one backbone with depthwise convolutions."""
    part = part[part.backbone.str.contains(MOBILE) & part.method.isin(("lora", "dora"))]
    spreads = []
    for (method, backbone), runs in part.groupby(["method", "backbone"]):
        table = means(runs)
        varying = [
            name for name in table if name in runs and table[name].nunique() > 1 and name != "score_pct"
        ]
        varying = [name for name in varying if not name.startswith("test_")]
        if not varying:
            continue
        by_seed = runs.pivot_table(index="seed", columns=varying, values="test_top1_pct")
        best, worst = by_seed.mean().idxmax(), by_seed.mean().idxmin()
        mean, half, n = mean_and_interval(by_seed[best] - by_seed[worst])
        if n >= ENOUGH:
            names = f"{method} on {backbone}: {', '.join(varying)} {best} against {worst}"
            spreads.append({"mean": mean, "half_width": half, "n": n, "names": names})
    if not spreads:
        return untested(f"no two settings of lora or dora share {ENOUGH} seeds on a MobileNet")
    top = max(spreads, key=lambda spread: spread["mean"])
    low, high, text = ends_and_text("score_pct", top, len(spreads), " points")
    text = f"{text} ({top['names']})"
    if meets(low, high, (20.0 - NEAR, 100.0)) == SUPPORTED:
        return text, top["n"], SUPPORTED, f"the interval reaches {20 - NEAR:.0f} points"
    return untested("no such spread here; “up to 20” allows that", text, top["n"])


def _judge_rank(part: pd.DataFrame) -> Evidence:
    """Each rank of LoRA against the next higher one, paired by seed."""
    lora = part[part.method == "lora"]
    ranks = sorted(lora["rank"].dropna().unique())
    steps = []
    for low, high in itertools.pairwise(ranks):
        table = differences(lora[lora["rank"].isin((low, high))], "score_pct", {"rank": low})
        steps += [
            row | {"ranks": f"{low:g} to {high:g}"} for row in table.to_dict("records") if row["n"] >= ENOUGH
        ]
    if not steps:
        return untested(f"no two ranks of lora share {ENOUGH} seeds")
    ends = [ends_and_text("score_pct", row, len(steps), " points") for row in steps]
    worst = min(range(len(steps)), key=lambda place: steps[place]["mean"])
    text = f"least gain of {len(steps)}: rank {steps[worst]['ranks']} {ends[worst][2]}"
    n = steps[worst]["n"]
    if any(high < 0 for _, high, _ in ends):
        return text, n, SUPPORTED, "here a higher rank is clearly worse"
    if all(low > 0 for low, _, _ in ends):
        return text, n, REFUTED, f"each of the {len(steps)} steps to a higher rank is clearly better"
    return untested("no higher rank is clearly worse, and not all are clearly better", text, n)


def _judge_iterations(part: pd.DataFrame) -> Evidence:
    """Epochs until the validation accuracy that both LoRA and GaLore reach in the end, paired by seed.

    Of several settings of a method the one that ends highest counts.
    """
    same = [n for n in ("seed", "backbone", "batch_size", "epochs", "checkpointing") if n in part]
    ratios: dict[int, list[float]] = defaultdict(
        list
    )  # averaged per seed: settings of a seed are not independent
    for _, runs in part[part.method.isin(("lora", "galore"))].groupby(same):
        curves = {}
        for run in runs.itertuples():
            curve = [row["val_top1_pct"] for row in load_curves(run.folder).get("history") or ()]
            curves[run.method] = max(curves.get(run.method, []), curve, key=lambda values: values[-1:])
        if len(curves) == 2 and all(curves.values()):
            level = min(curve[-1] for curve in curves.values())
            first = {m: next(i for i, v in enumerate(c, 1) if v >= level) for m, c in curves.items()}
            ratios[runs.seed.iloc[0]].append(math.log(first["lora"] / first["galore"]))
    by_seed = pd.Series([sum(values) / len(values) for values in ratios.values()], dtype=float)
    mean, half, n = mean_and_interval(by_seed)
    if n < ENOUGH:
        return untested(f"fewer than {ENOUGH} pairs of lora and galore with validation curves", n=n)
    low, high = math.exp(mean - half), math.exp(mean + half)
    verdict = meets(100 * (low - 1), 100 * (high - 1), (50.0, 150.0))
    text = f"{math.exp(mean):.2f} times [{low:.2f}, {high:.2f}] GaLore's epochs"
    return text, n, verdict, "epochs to the validation accuracy that both reach; published: about 2"


_TEXT = f"{PAPER.name}, text"
CLAIMS = (
    Claim("GaLore's accuracy is the closest to full fine-tuning.", _TEXT, _judge_closest),
    Claim(
        "Batch norms and head alone lose up to 40 points on hard shifts.", _TEXT, _judge_loss("norm", 40.0)
    ),
    Claim(
        "LoRA and DoRA swing by up to 20 points on MobileNets (between settings, as we read it).", _TEXT,
        _judge_swing,
    ),
    Claim("A higher rank is not always better.", _TEXT, _judge_rank),
    Claim("LoRA needs about twice GaLore's iterations.", _TEXT, _judge_iterations),
)  # fmt: skip
