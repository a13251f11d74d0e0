"""Compares our plans with all other strategies for keeping activations, on the same training steps.

    python tests/benchmarks/checkpointing.py --models vit_small --methods lora --out rows.json
    python tests/benchmarks/checkpointing.py --read rows.json other_rows.json
    OMP_NUM_THREADS=2 python tests/benchmarks/checkpointing.py --time

A cell is a model, a method, a precision and a budget: bytes ("1GiB"), or per cent of the peak of the stock
step that checkpoints nothing.  All peers of `peers.py` and our planner are run on it, on fake tensors, and
judged by the same two figures: highest live tensor bytes, and products computed again in per cent of the
forward pass's.  Ours is measured by a step that follows the plan operator by operator, which shares
nothing with the code that predicts it but the tape.

`--time` runs real steps on the CPU instead: nothing else should run at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import peers
import torch
import torch.nn.functional as F
from peers import PEERS
from peers_step import (
    CPU,
    IMAGE_SIZES,
    PRECISIONS,
    PeerResult,
    StepCost,
    build,
    measured_step,
    nothing,
    product_flops,
)
from torch import nn

from toolkit import InputError
from toolkit.budget import Checkpointing, TensorMemory, format_bytes, parse_bytes
from toolkit.budget.fakes import on_fake_tensors
from toolkit.budget.flops import FlopCounter
from toolkit.budget.lean import LeanForms
from toolkit.budget.plan import Plan, Planner
from toolkit.budget.profile import Profile
from toolkit.budget.step import autocast, segmented
from toolkit.budget.tape import Op, Tape, operator_name

METHODS = ("full", "linear", "bitfit", "lora")
BUDGETS = ("15", "20", "25", "30", "40", "55", "70", "85", "100", "1GiB", "2GiB")
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the compiled peer
OURS, JOINT = "levels", "joint"
EAGER = ("none", "static", "threshold", "whole_blocks", "rotor", "selective")  # beginnings of names
TIMED = (("vit_small", "lora", 64), ("demo_vit", "full", 64))  # model, method, batch size
TIMED_BUDGETS = (100, 55, 40, 20)  # per cent of the stock peak
TIMED_MICRO_BATCH = 16  # images


@dataclass(frozen=True)
class Row:
    """One peer in one cell.  Bytes are of tensors; `recompute_pct` of the forward pass's products."""

    model: str
    method: str
    precision: str
    budget: str  # as asked for
    budget_bytes: int
    peer: str
    predicted_bytes: int | None  # ours only
    measured_bytes: int | None
    recompute_pct: float | None  # measured where there is a measurement
    predicted_pct: float | None
    held: bool | None  # None: not measured
    feasible: bool  # offers a step that runs within the budget, by its own account
    note: str = ""
    profile_seconds: float | None = None  # of this cell; profiles are shared by all budgets of a setting
    levels_seconds: float | None = None  # the same for minimum cuts
    solve_seconds: float | None = None
    extra_seconds: float | None = None  # of a step, estimated for the planner's reference device
    micro_batch_size: int | None = None

    @property
    def setting(self) -> str:
        """Model, method and precision."""
        return f"{self.model} {self.method} {self.precision}"


class TimedPlanner(Planner):
    """A planner that knows how long its profiles took."""

    profile_seconds = 0.0

    def _profile(self, *args, **kwargs) -> Profile:
        start = time.perf_counter()
        try:
            return super()._profile(*args, **kwargs)
        finally:
            self.profile_seconds += time.perf_counter() - start


# A step under a plan


@contextlib.contextmanager
def following(plan: Plan, blocks: dict[str, nn.Module]) -> Iterator[None]:
    """A forward pass inside keeps what `plan` keeps.  Raises where the model runs other operators."""
    segment, place = 0, 0

    def ended(*_) -> None:
        nonlocal segment, place
        expected = len(plan.options[segment].segment.ops)
        if place != expected:
            raise RuntimeError(f"segment {segment} ran {place} operators, not {expected}.")
        segment, place = segment + 1, 0

    def decide(op: Op, contents: dict[int, torch.Tensor]) -> list[str]:
        nonlocal place
        option = plan.options[segment]
        planned = option.segment.ops[place]
        if planned.name != operator_name(op.func):
            raise RuntimeError(f"segment {segment} ran {op.func}, not {planned.name}.")
        place += 1
        return [option.level.decisions[option.segment.place(buffer)] for buffer in planned.outputs]

    slices = {name: option.slices for name, option in zip(plan.segments, plan.options)}
    with Tape(decide), segmented(blocks, ended, slices):
        yield


def measured_plan(model: nn.Module, images, labels, precision: str, plan: Plan, planner: Planner) -> StepCost:
    """Cost of the second of two fake training steps under `plan`, for the whole batch."""
    with lean_forms(model), on_fake_tensors(model, (images, labels)) as (x, y):
        memory = TensorMemory(CPU)
        memory.track([*model.parameters(), *model.buffers(), x, y])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        with memory:
            for _ in range(2):
                memory.reset_peak()
                with FlopCounter() as counter:
                    with autocast(CPU, precision):
                        with following(plan, planner.blocks):
                            logits = model(x)
                        loss = F.cross_entropy(logits, y)
                    loss.backward()
                    del loss, logits
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
    flops = (product_flops(counter, phase) for phase in ("forward", "recompute"))
    return StepCost(memory.peak_bytes, *flops)


@contextlib.contextmanager
def lean_forms(model: nn.Module) -> Iterator[None]:
    """LoRA layers of `model` run as the planner runs them."""
    forms = LeanForms(model)
    try:
        yield
    finally:
        forms.remove()


# Cells


def rows_of(name: str, method: str, precision: str, options: argparse.Namespace) -> list[Row]:
    """All peers at all budgets for one model, method and precision."""
    model, images, labels = build(name, method, options.batch_size, precision)
    stock = measured_step(model, images, labels, precision)
    budgets = {text: budget_bytes(text, stock.peak_bytes) for text in options.budgets}
    setting = (name, method, precision)
    rows = our_rows(setting, model, images, labels, budgets, (OURS, JOINT) if options.joint else (OURS,))
    for peer in options.peers:
        start = time.perf_counter()
        try:
            results = PEERS[peer](model, images, labels, precision, list(budgets.values()))
        except Exception as error:  # a peer that breaks is a result
            results = nothing(peer, list(budgets.values()), f"{type(error).__name__}: {error}")
        rows += peer_rows(setting, budgets, results)
        print(f"  {peer}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    if options.compiled:
        try:
            points = peers.compiled(model, images, labels, precision, RATIOS)
            results = peers.compiled_for_budgets(points, list(budgets.values()))
        except Exception as error:
            results = nothing(
                "compiled", list(budgets.values()), f"{type(error).__name__}: {str(error)[:200]}"
            )
        rows += peer_rows(setting, budgets, results)
    return rows


def budget_bytes(text: str, stock_bytes: int) -> int:
    """A budget in per cent of the stock peak, or a size with a unit."""
    return int(stock_bytes * float(text) / 100) if text.replace(".", "").isdigit() else parse_bytes(text)


def our_rows(
    setting: tuple, model, images, labels, budgets: dict[str, int], ways: Sequence[str]
) -> list[Row]:
    """The planner with whole batches, measured, and with micro-batches allowed, predicted."""
    planner = TimedPlanner(model, (images, labels), precision=setting[2])
    start = time.perf_counter()
    planner.chain(len(labels), False)  # before the other: LeanForms do not nest
    planner.chain(len(labels), True)
    first_seconds = time.perf_counter() - start  # shared by all budgets; in each row, as one plan takes it
    shared = planner.profile_seconds, first_seconds - planner.profile_seconds
    costs: dict[tuple, StepCost] = {}  # by options

    def measure(plan: Plan) -> StepCost:
        if plan.options not in costs:
            costs[plan.options] = measured_plan(model, images, labels, setting[2], plan, planner)
        return costs[plan.options]

    rows = []
    for peer in ways:
        for text, budget in budgets.items():
            rows.append(_our_row(setting, peer, text, budget, planner, shared, measure))
    return rows


def _our_row(
    setting: tuple,
    peer: str,
    text: str,
    budget: int,
    planner: TimedPlanner,
    shared: tuple[float, float],
    measure: Callable[[Plan], StepCost],
) -> Row:
    profiled, start = planner.profile_seconds, time.perf_counter()
    try:
        plan, note = planner.plan(budget, micro_batches=peer == JOINT), ""
    except InputError as error:
        plan = None
        smallest = planner.smallest_bytes()
        note = f"smallest peak {format_bytes(smallest)} ({smallest} bytes)"
        if peer == JOINT:
            note = str(error)
    seconds = time.perf_counter() - start
    profiled = planner.profile_seconds - profiled
    times = {
        "profile_seconds": shared[0] + profiled,
        "levels_seconds": shared[1],
        "solve_seconds": seconds - profiled,
    }
    if plan is None:
        return Row(*setting, text, budget, peer, None, None, None, None, None, False, note, **times)
    times |= {"extra_seconds": plan.extra_seconds, "micro_batch_size": plan.micro_batch_size}
    predicted = plan.recompute_pct
    if plan.sliced:
        note = f"predicted only: micro-batches of {plan.micro_batch_size}"
        return Row(
            *setting,
            text,
            budget,
            peer,
            plan.peak_bytes,
            None,
            predicted,
            predicted,
            None,
            True,
            note,
            **times,
        )
    try:
        cost = measure(plan)
    except Exception as error:  # a plan that does not run is a result
        note = f"does not run: {type(error).__name__}: {error}"
        return Row(
            *setting, text, budget, peer, plan.peak_bytes, None, None, predicted, None, True, note, **times
        )
    held = cost.peak_bytes <= budget
    return Row(
        *setting, text, budget, peer, plan.peak_bytes, cost.peak_bytes, cost.recompute_pct, predicted, held,
        True, "; ".join(plan.notes), **times,
    )  # fmt: skip


def peer_rows(setting: tuple, budgets: dict[str, int], results: Sequence[PeerResult]) -> list[Row]:
    """Results of a peer, in the order of the budgets, once or several times over."""
    texts = {budget: text for text, budget in budgets.items()}
    return [
        Row(
            *setting, texts[r.budget_bytes], r.budget_bytes, r.peer, None, r.peak_bytes, r.recompute_pct,
            None, r.held, r.peak_bytes is not None, r.note,
        )
        for r in results
    ]  # fmt: skip


# Reports


def tables(rows: Sequence[Row]) -> str:
    """Per setting a table: peers by budgets, recomputed per cent, "x" where the budget was broken."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in rows):
        own = [row for row in rows if row.setting == setting]
        budgets = list(dict.fromkeys(row.budget for row in own))
        sizes = {row.budget: row.budget_bytes for row in own}
        lines += ["", f"{setting}: recomputed % (x broken, - infeasible, ~ predicted only)"]
        heads = [f"{b}%" if b.replace(".", "").isdigit() else b for b in budgets]
        lines.append(f"{'':16}" + "".join(f"{head:>9}" for head in heads))
        lines.append(f"{'MiB':16}" + "".join(f"{sizes[b] / 2**20:>9.1f}" for b in budgets))
        for peer in dict.fromkeys(row.peer for row in own):
            found = {row.budget: row for row in own if row.peer == peer}
            lines.append(
                f"{peer:16}" + "".join(f"{_entry(found[b]) if b in found else '':>9}" for b in budgets)
            )
        times = next((row for row in own if row.peer == OURS), None)
        if times:
            slowest = max(row.solve_seconds for row in own if row.peer == OURS)
            lines.append(
                f"planning: profiles {times.profile_seconds:.1f} s, levels {times.levels_seconds:.1f} s, "
                f"a budget at most {slowest:.2f} s"
            )
    return "\n".join(lines)


def _entry(row: Row) -> str:
    if not row.feasible:
        return "-"
    if row.recompute_pct is None:
        return "error"
    mark = "~" if row.held is None else "" if row.held else "x"
    micro = f"/{row.micro_batch_size}" if row.held is None else ""
    return f"{row.recompute_pct:.1f}{micro}{mark}"


def is_eager(peer: str) -> bool:
    """Whether a peer checkpoints whole batches in eager mode."""
    return peer.startswith(EAGER)


def summary(rows: Sequence[Row]) -> str:
    """A summary of all cells."""
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row.setting, row.budget), {})[row.peer] = row
    ours = [row for row in rows if row.peer == OURS]
    feasible = [row for row in ours if row.feasible]
    broken = [row for row in feasible if row.held is False]
    failed = [row for row in feasible if row.measured_bytes is None]
    lines = [
        f"{len(cells)} cells; ours is feasible in {len(feasible)}, breaks {len(broken)}, "
        f"does not run in {len(failed)}"
    ]
    lines += [
        f"  broken: {_cell(row)}: {row.measured_bytes - row.budget_bytes:+} bytes over the budget"
        for row in broken
    ]
    lines += [f"  failed: {_cell(row)}: {row.note}" for row in failed]
    for precision in PRECISIONS:
        measured = [r for r in feasible if r.precision == precision and r.measured_bytes is not None]
        if not measured:
            continue
        worst = max(measured, key=_error)
        wrong = sorted((r for r in measured if _error(r)), key=_error, reverse=True)
        lines.append(
            f"{precision}: largest |predicted - measured| {_error(worst)} bytes "
            f"({100 * _error(worst) / worst.measured_bytes:.4f} %), {len(wrong)} of {len(measured)} differ"
        )
        lines += [
            f"  off: {_cell(row)}: predicted {row.predicted_bytes}, measured {row.measured_bytes} "
            f"({100 * (row.measured_bytes - row.predicted_bytes) / row.measured_bytes:+.4f} %)"
            for row in wrong
            if precision == "fp32" or _error(row) > row.measured_bytes / 1000
        ]
    lines += [
        f"  recomputation off: {_cell(row)}: predicted {row.predicted_pct:.4f} %, {row.recompute_pct:.4f} %"
        for row in feasible
        if row.measured_bytes is not None and abs(row.predicted_pct - row.recompute_pct) > 1e-6
    ]
    lines += _beaten(cells)
    for peer in sorted({row.peer for row in rows if row.peer.startswith("threshold")}):
        own = [row for row in rows if row.peer == peer]
        broken = [row for row in own if not row.held]
        possible = sum(bool(cells[row.setting, row.budget][OURS].held) for row in broken)
        lines.append(f"{peer}: breaks {len(broken)} of {len(own)} budgets, {possible} of which ours holds")
    lines += _only_micro_batches(cells)
    return "\n".join(lines)


def _beaten(cells: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    """Cells in which an eager peer held the budget and recomputed less than ours."""
    lines, compared, better, equal = [], 0, 0, 0
    for cell in cells.values():
        ours = cell.get(OURS)
        rivals = [row for row in cell.values() if is_eager(row.peer) and row.held]
        if ours is None or not rivals:
            continue
        compared += 1
        best = min(row.recompute_pct for row in rivals)
        runs = ours.recompute_pct is not None
        if runs and ours.recompute_pct <= best + 1e-6:
            better += ours.recompute_pct < best - 1e-6
            equal += ours.recompute_pct >= best - 1e-6
            continue
        names = ", ".join(
            f"{row.peer} {row.recompute_pct:.2f} % ({row.measured_bytes} bytes)"
            for row in sorted(rivals, key=lambda row: row.recompute_pct)
            if not runs or row.recompute_pct < ours.recompute_pct - 1e-6
        )
        own = f"{ours.recompute_pct:.2f} % ({ours.measured_bytes} bytes)" if runs else ours.note
        lines.append(f"  beaten: {_cell(ours)} of {ours.budget_bytes} bytes: {names}; ours {own}")
    return [
        f"of {compared} cells that an eager peer holds, ours recomputes less than all in {better}, "
        f"as much in {equal}, more in {len(lines)}",
        *lines,
    ]


def _only_micro_batches(cells: dict[tuple[str, str], dict[str, Row]]) -> list[str]:
    lines = []
    for cell in cells.values():
        if any(row.held for peer, row in cell.items() if is_eager(peer) or peer == OURS):
            continue
        sliced = [row for peer, row in cell.items() if peer in (JOINT, "micro_batches") and row.feasible]
        if sliced:
            how = ", ".join(f"{row.peer} {row.micro_batch_size or row.note}" for row in sliced)
            lines.append(f"  only micro-batches: {_cell(sliced[0])}: {how}")
    return [f"cells that only micro-batches fit: {len(lines)}", *lines]


def _cell(row: Row) -> str:
    unit = "%" if row.budget.replace(".", "").isdigit() else ""
    return f"{row.setting} {row.budget}{unit}"


def _error(row: Row) -> int:
    return abs(row.predicted_bytes - row.measured_bytes)


def write(path: Path, options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Rows with what they were made with."""
    header = {
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "batch_size": options.batch_size,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


# Real time


def step_times(name: str, method: str, batch_size: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of real fp32 steps on the CPU by variant, interleaved; the first round is not counted."""
    model, images, labels = build(name, method, batch_size, "fp32")
    torch.manual_seed(0)
    images = torch.randn_like(images)
    stock_bytes = measured_step(model, images, labels, "fp32").peak_bytes
    planner = Planner(model, (images, labels))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    memory = TensorMemory(CPU)  # never entered

    def stock(strategy: str) -> None:
        with Checkpointing(model, strategy, memory=memory, budget_bytes=stock_bytes):
            F.cross_entropy(model(images), labels).backward()
        finish()

    def micro_batches() -> None:
        for x, y in zip(images.split(TIMED_MICRO_BATCH), labels.split(TIMED_MICRO_BATCH)):
            (F.cross_entropy(model(x), y) * (len(y) / len(labels))).backward()
        finish()

    def planned(plan: Plan) -> None:
        with lean_forms(model):
            for x, y in zip(images.split(plan.micro_batch_size), labels.split(plan.micro_batch_size)):
                with contextlib.nullcontext() if plan.keeps_everything else following(plan, planner.blocks):
                    logits = model(x)
                (F.cross_entropy(logits, y) * (len(y) / len(labels))).backward()
        finish()

    def lean() -> None:
        with lean_forms(model):
            F.cross_entropy(model(images), labels).backward()
        finish()

    def finish() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variants: dict[str, Callable[[], None]] = {
        "stock none": lambda: stock("none"),
        "stock static": lambda: stock("static"),
        f"micro-batches of {TIMED_MICRO_BATCH}": micro_batches,
    }
    if method == "lora":
        variants["lean forms, no plan"] = lean
    for percent, joint in itertools.product(TIMED_BUDGETS, (False, True)):
        try:
            plan = planner.plan(stock_bytes * percent // 100, micro_batches=joint)
        except InputError as error:
            print(f"  {percent} %: {error}")
            continue
        if joint and not plan.sliced:
            continue  # the same plan
        micro = f", micro-batches of {plan.micro_batch_size}" if plan.sliced else ""
        label = f"ours at {percent} %: {plan.recompute_pct:.1f} % recomputed{micro}"
        variants[label] = lambda plan=plan: planned(plan)
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    for repetition in range(repetitions + 1):
        for label, run in variants.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if repetition:
                seconds[label].append(time.perf_counter() - start)
    return seconds


def print_times(repetitions: int) -> None:
    """Ratios to the stock step without checkpointing: of each round, their median and range."""
    for name, method, batch_size in TIMED:
        print(f"\n{name} {method} fp32, batch {batch_size}, {torch.get_num_threads()} threads:")
        seconds = step_times(name, method, batch_size, repetitions)
        for label, values in seconds.items():
            ratios = sorted(value / stock for value, stock in zip(values, seconds["stock none"]))
            print(
                f"  {label:54} {statistics.median(ratios):6.3f}   {ratios[0]:.2f} to {ratios[-1]:.2f}, "
                f"fastest {1000 * min(values):.1f} ms, n = {len(values)}",
                flush=True,
            )


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(IMAGE_SIZES), choices=IMAGE_SIZES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), help="per cent, or bytes with a unit")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--peers", nargs="+", default=list(PEERS), choices=[*PEERS, "no-peers"], help="'no-peers': ours alone"
    )
    parser.add_argument("--compiled", action="store_true", help="torch.compile's partitioner too (slow)")
    parser.add_argument("--no-joint", dest="joint", action="store_false", help="no plans with micro-batches")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--read", nargs="+", type=Path, help="report on such files instead of running")
    parser.add_argument("--time", action="store_true", help="real step times on the CPU instead")
    parser.add_argument("--repetitions", type=int, default=7, help="of each timed step")
    options = parser.parse_args()
    options.peers = [peer for peer in options.peers if peer != "no-peers"]
    if options.time:
        print_times(options.repetitions)
        return
    rows: list[Row] = []
    if options.read:
        rows = [Row(**row) for path in options.read for row in json.loads(path.read_text())["rows"]]
        print(tables(rows), summary(rows), sep="\n\n")
        return
    for name in options.models:
        for method in options.methods:
            for precision in options.precisions:
                start = time.perf_counter()
                new = rows_of(name, method, precision, options)
                rows += new
                if options.out:
                    write(options.out, options, rows)
                print(tables(new), f"{time.perf_counter() - start:.0f} s", sep="\n", flush=True)
    print("", summary(rows), sep="\n")


if __name__ == "__main__":
    main()
