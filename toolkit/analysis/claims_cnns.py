"""What arXiv 2507.23536 claims of fine-tuning CNNs on the edge, judged.

Claims about costs are judged on fake tensors (`costs`), claims about accuracy from finished runs on shifted
data.  Published figures stand here as inputs; the verdicts are computed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict

import pandas as pd

from toolkit.analysis.claims_checkpointing import (
    ENOUGH,
    REFUTED,
    SUPPORTED,
    UNTESTED,
    Claim,
    Evidence,
    Finding,
    Paper,
    judged,
    meets,
    wider,
)
from toolkit.analysis.paired import FIGURES, change, differences, interval
from toolkit.analysis.statistics import mean_and_interval
from toolkit.cache import kept
from toolkit.forecast.cnn_costs import PUBLISHED_SETTING, StepCosts, step_costs
from toolkit.forecast.forecasts import FORECASTS, made_by
from toolkit.methods import options_not_of
from toolkit.training.record import load_curves

PAPER = Paper(
    "arXiv 2507.23536",
    ("cifar10-c", "vww"),
    ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100"),
)
CNNS = "(small:)?(demo_cnn|resnet|mobilenet)"  # backbones that make a run one of this subject
MOBILE = "mobilenet|demo_cnn"  # those with depthwise convolutions
NEAR = 5.0  # points: what counts as the published figure
OUR_GAP, AUTHORS_GAP = 50, 200  # the defaults of `Experiment` and of the code of GaLore's authors
AT_224 = "224 px, ten classes, rank 1; counted on fake tensors"


def is_about_edge(frame: pd.DataFrame) -> bool:
    """Whether any run in `frame` is of a CNN like the paper's or on shifted data."""
    if frame.empty:
        return False
    return bool((frame.dataset.str.contains("-c:") | frame.backbone.str.match(CNNS)).any())


def edge_findings(frame: pd.DataFrame) -> list[Finding]:
    """All claims against step costs and the records in `frame` (as `load_records`, with `environment`).

    What no run on shifted data (`*-c:`) can tell has one finding that says why.
    """
    ok = frame[(frame.status == "ok") & (frame.phase == "training")] if len(frame) else frame
    ok = ok[ok.dataset.str.contains("-c:")] if len(ok) else ok
    return [*_of_costs(), *judged(CLAIMS, ok, PAPER, "no run on shifted data (*-c:) ended ok")]


# --- costs ---


def _of_costs() -> list[Finding]:
    """Counted once: it takes half a minute."""
    asked = {"question": f"costs in {PAPER.name}", **made_by()}
    answer = kept(FORECASTS, asked, lambda: {"findings": list(map(asdict, _count_costs()))})
    return [Finding(**finding) for finding in answer["findings"]]


def _count_costs() -> list[Finding]:
    return [_memory(1), _memory(16), _flops(), _galore_flops(1), _galore_flops(16), _dora_memory()]


def _costs(backbone: str, method: str, batch_size: int) -> StepCosts:
    return step_costs(backbone, method, batch_size=batch_size, galore_gap=OUR_GAP, **PUBLISHED_SETTING)


def _change(costs: StepCosts, full: StepCosts, figure: str) -> float:
    """In per cent of full fine-tuning's."""
    return 100 * (getattr(costs, figure) / getattr(full, figure) - 1)


def _percent(value: float) -> str:
    return f"{value:+.0f} %".replace("-", "−")


def _finding(text: str, where: str, ours: list[str], held: list[bool], why: str) -> Finding:
    verdict = SUPPORTED if all(held) else REFUTED
    return Finding(text, f"{PAPER.name}, abstract", where, "; ".join(ours), 0, verdict, why)


def _memory(batch_size: int) -> Finding:
    ours, held = [], []
    for backbone, published in {"resnet18": -67, "mobilenetv2_100": -22}.items():
        lora, full = (_costs(backbone, method, batch_size) for method in ("lora", "full"))
        true, maxima = (_change(lora, full, name) for name in ("peak_bytes", "published_bytes"))
        ours.append(f"{backbone} {_percent(true)} ({_percent(maxima)} by sum of maxima)")
        held.append(abs(true - published) <= NEAR)
    text = "LoRA lowers the peak memory by 67 % on ResNet-18 and 22 % on MobileNetV2."
    why = f"{'' if all(held) else 'not '}within {NEAR:.0f} points: what LoRA saves, "
    why += "gradients and Adam's state, weighs less the larger the batch"
    return _finding(text, f"batch {batch_size}, {AT_224}", ours, held, why)


def _flops() -> Finding:
    ours, held = [], []
    for backbone in ("mobilenetv2_100", "mobilenetv3_large_100"):
        lora, full = (_costs(backbone, method, 1) for method in ("lora", "full"))
        true, published = (_change(lora, full, name) for name in ("flops", "published_flops"))
        ours.append(f"{backbone} {_percent(true)} ({_percent(published)} by its counter)")
        held.append(true <= -95 + NEAR)
    text = "Parameter-efficient methods save up to 95 % of the FLOPs (on MobileNets, by LoRA)."
    why = "its counter takes the weight gradients of depthwise convolutions `groups` times; LoRA has none"
    return _finding(text, f"batch 1, {AT_224}", ours, [any(held)], why)


def _galore_flops(batch_size: int) -> Finding:
    """Decompositions and projections are made once per step, so their share falls with the batch."""
    ours, held = [], []
    for backbone in ("resnet18", "mobilenetv2_100"):
        full, galore = (_costs(backbone, method, 1) for method in ("full", "galore"))
        whole = batch_size * (full.forward_flops + full.backward_flops) + full.optimizer_flops
        rest = galore.optimizer_flops - galore.svd_flops // OUR_GAP - full.optimizer_flops
        more = {gap: 100 * (rest + galore.svd_flops / gap) / whole for gap in (OUR_GAP, AUTHORS_GAP)}
        held += [10 <= value <= 30 for value in more.values()]
        shown = ", ".join(f"{_percent(value)} at gap {gap}" for gap, value in more.items())
        gaps = " to ".join(f"{galore.svd_flops / whole / share:.1f}" for share in (0.3, 0.1))
        ours.append(f"{backbone} {shown}; the SVD alone is 10 to 30 % at gaps of {gaps}")
    text = "GaLore takes 10 to 30 % more FLOPs than full fine-tuning, because of its SVD."
    why = "SVD and projections are made once per step, so their share falls with the batch; the paper's "
    where = f"batch {batch_size}, rank 32, 224 px, ten classes; counted from shapes"
    return _finding(text, where, ours, held, f"{why}gap and rank are not known")


def _dora_memory() -> Finding:
    ours, held = [], []
    for backbone in ("resnet18", "mobilenetv2_100"):
        dora, lora = (_costs(backbone, method, 1) for method in ("dora", "lora"))
        more = _change(dora, lora, "peak_bytes")
        ours.append(f"{backbone} {_percent(more)}")
        held.append(more > 0)
    why = "DoRA keeps more of every adapted layer, whose output it scales"
    return _finding("DoRA takes more memory than LoRA.", f"batch 1, {AT_224}", ours, held, why)


# --- accuracy ---


def _own_settings(part: pd.DataFrame) -> list[str]:
    """Columns that some methods look at and full fine-tuning does not, in their order."""
    return [name for name in part if name in options_not_of("full")]


def _from_full(part: pd.DataFrame, methods: tuple[str, ...]) -> pd.DataFrame:
    """How far the accuracy of each setting of `methods` is from full fine-tuning's, in points.

    Columns: `method`, `setting` (what tells it from others in words), and `FIGURES`.
    """
    table = differences(part[part.method.isin((*methods, "full"))], "accuracy", {"method": "full"})
    own = (*_own_settings(table), "batch_norm", "batch_size", "backbone")
    shown = [name for name in own if name in table and table[name].nunique() > 1]
    words = [", ".join(f"{n} {v}" for n, v in row.items()) for row in table[shown].to_dict("records")]
    return table[["method", *FIGURES]].assign(setting=words)


def _ends(row: pd.Series, settings: int) -> tuple[float, float]:
    half = wider(row.half_width, int(row.n), settings)
    return row["mean"] - half, row["mean"] + half


def _shown(row: pd.Series, settings: int) -> str:
    half = wider(row.half_width, int(row.n), settings)
    name = f"{row.method}{f' ({row.setting})' if row.setting else ''}"
    return f"{name} {interval('accuracy', row['mean'], half, ' points')}"


def _enough(part: pd.DataFrame, methods: tuple[str, ...]) -> tuple[pd.DataFrame, str]:
    """`_from_full` where there are enough pairs, and why there is nothing if so."""
    for method in ("full", *methods):
        if not (part.method == method).any():
            return pd.DataFrame(columns=["method"]), f"no finished run of {method}"
    table = _from_full(part, methods)
    table = table[table.n >= ENOUGH]
    missing = [method for method in methods if not (table.method == method).any()]
    return table, f"fewer than {ENOUGH} pairs of full with {', '.join(missing)}" if missing else ""


def _judge_closest(part: pd.DataFrame) -> Evidence:
    """Each method by its setting nearest to full; distances as far as the intervals leave them open."""
    table, why = _enough(part, ("galore", "lora", "dora", "norm"))
    if why:
        return "–", 0, UNTESTED, why
    nearest = table.loc[table["mean"].abs().groupby(table.method).idxmin()].set_index("method", drop=False)
    distances = {}
    for method, row in nearest.iterrows():
        low, high = _ends(row, len(table))
        distances[method] = (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
    low, high = distances.pop("galore")
    text = "; ".join(_shown(row, len(table)) for _, row in nearest.iterrows())
    n = int(nearest.n.min())
    nearer = [method for method, (_, most) in distances.items() if most < low]
    if nearer:
        return text, n, REFUTED, f"{', '.join(nearer)} surely nearer to full"
    if all(high < least for least, _ in distances.values()):
        return text, n, SUPPORTED, "all others are surely farther from full"
    return text, n, UNTESTED, "the intervals leave open which method is nearest to full"


def _judge_loss(method: str, points: float) -> Callable[[pd.DataFrame], Evidence]:
    """A judge of "`method` loses up to `points` against full"; a smaller loss elsewhere refutes nothing."""

    def judge(part: pd.DataFrame) -> Evidence:
        table, why = _enough(part, (method,))
        if why:
            return "–", 0, UNTESTED, why
        row = table.loc[table["mean"].idxmin()]
        low, high = _ends(row, len(table))
        text = (
            f"most of {len(table)} settings: {_shown(row, len(table))}" if len(table) > 1 else _shown(row, 1)
        )
        if meets(low, high, (-100.0, -points + NEAR)) == SUPPORTED:
            return text, int(row.n), SUPPORTED, f"the interval reaches {points - NEAR:.0f} points"
        return text, int(row.n), UNTESTED, f"no such loss here; “up to {points:.0f}” allows that"

    return judge


def _judge_swing(part: pd.DataFrame) -> Evidence:
    """The best against the worst setting of LoRA or DoRA on one backbone with depthwise convolutions."""
    part = part[part.backbone.str.contains(MOBILE)]
    spreads = []
    for (method, backbone), runs in part[part.method.isin(("lora", "dora"))].groupby(["method", "backbone"]):
        own = [n for n in (*_own_settings(runs), "batch_size") if n in runs and runs[n].nunique() > 1]
        if not own:
            continue
        by_seed = runs.pivot_table(index="seed", columns=own, values="test_top1_pct")
        best, worst = by_seed.mean().idxmax(), by_seed.mean().idxmin()
        mean, half, n = mean_and_interval(by_seed[best] - by_seed[worst])
        if n >= ENOUGH:
            names = (f"{', '.join(own)} {value}" for value in (best, worst))
            spreads.append((mean, half, n, f"{method} on {backbone}: {' against '.join(names)}"))
    if not spreads:
        return "–", 0, UNTESTED, f"no two settings of lora or dora share {ENOUGH} seeds on a MobileNet"
    mean, half, n, names = max(spreads)
    half = wider(half, n, len(spreads))
    text = f"{interval('accuracy', mean, half, ' points')} ({names})"
    if meets(mean - half, mean + half, (20.0 - NEAR, 100.0)) == SUPPORTED:
        return text, n, SUPPORTED, f"the interval reaches {20 - NEAR:.0f} points"
    return text, n, UNTESTED, "no such spread here; “up to 20” allows that"


def _judge_rank(part: pd.DataFrame) -> Evidence:
    """Each rank of LoRA against the next higher one, paired by seed."""
    lora = part[part.method == "lora"]
    ranks = sorted(lora.lora_rank.dropna().unique()) if "lora_rank" in lora else []
    tables = [
        differences(lora[lora.lora_rank.isin(pair)], "accuracy", {"lora_rank": pair[0]}).assign(pair=[pair])
        for pair in itertools.pairwise(ranks)
    ]
    tables = [table[table.n >= ENOUGH] for table in tables if len(table)]
    steps = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if steps.empty:
        return "–", 0, UNTESTED, f"no two ranks of lora share {ENOUGH} seeds"
    ends = [_ends(row, len(steps)) for _, row in steps.iterrows()]
    row = steps.loc[steps["mean"].idxmin()]
    half = wider(row.half_width, int(row.n), len(steps))
    low, high = (int(rank) for rank in row.pair)
    gain = interval("accuracy", row["mean"], half, " points")
    text = f"least gain of {len(steps)}: rank {low} to {high} {gain}"
    if any(high < 0 for _, high in ends):
        return text, int(row.n), SUPPORTED, "here a higher rank is surely worse"
    if all(low > 0 for low, _ in ends):
        return text, int(row.n), REFUTED, f"each of the {len(steps)} steps to a higher rank is surely better"
    return text, int(row.n), UNTESTED, "no higher rank is surely worse, and not all are surely better"


def _judge_iterations(part: pd.DataFrame) -> Evidence:
    """Epochs until the validation accuracy that both LoRA and GaLore reach in the end, paired by seed.

    Of several settings of a method the one that ends highest counts.
    """
    same = [n for n in ("seed", "backbone", "batch_size", "epochs", "checkpointing") if n in part]
    ratios: dict[int, list[float]] = defaultdict(list)  # by seed: settings of one seed are no chance
    for _, runs in part[part.method.isin(("lora", "galore"))].groupby(same):
        curves = {}
        for run in runs.itertuples():
            curve = [row["val_top1_pct"] for row in load_curves(run.folder).get("history") or ()]
            curves[run.method] = max(curves.get(run.method, []), curve, key=lambda values: values[-1:])
        if len(curves) == 2 and all(curves.values()):
            level = min(curve[-1] for curve in curves.values())
            first = {m: next(i for i, v in enumerate(c, 1) if v >= level) for m, c in curves.items()}
            ratios[runs.seed.iloc[0]].append(math.log(first["lora"] / first["galore"]))
    by_seed = [sum(values) / len(values) for values in ratios.values()]
    mean, half, n = mean_and_interval(pd.Series(by_seed, dtype=float))
    if n < ENOUGH:
        return "–", n, UNTESTED, f"fewer than {ENOUGH} pairs of lora and galore with validation curves"
    ends = [change("time", mean + side * half) for side in (-1, 1)]
    text = f"{math.exp(mean):.2f} times [{1 + ends[0] / 100:.2f}, {1 + ends[1] / 100:.2f}] GaLore's epochs"
    verdict = meets(*ends, (50.0, 150.0))
    why = "epochs to the validation accuracy that both reach; published: about 2"
    return text, n, verdict, why


_TEXT = f"{PAPER.name}, text"
CLAIMS = (
    Claim("GaLore's accuracy is the closest to full fine-tuning.", _TEXT, _judge_closest),
    Claim(
        "Batch norms and head alone lose up to 40 points on hard shifts.", _TEXT, _judge_loss("norm", 40.0)
    ),
    Claim(
        "LoRA and DoRA swing by up to 20 points on MobileNets (between settings, as we read it).",
        _TEXT,
        _judge_swing,
    ),
    Claim("A higher rank is not always better.", _TEXT, _judge_rank),
    Claim("LoRA needs about twice GaLore's iterations.", _TEXT, _judge_iterations),
)
