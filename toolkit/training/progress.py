"""What a person sees of a run while it trains, and the two wishes that come back: pause, and stop.

`fit` calls a `View` between steps.  `Lines` prints one line per epoch (notebooks in batch, log files),
`Bar` moves a bar in a terminal, `widgets.LiveView` draws in a notebook.  `Screen` stands between: it
keeps views rare and cheap, and a view that fails loses its picture and not the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from toolkit.budget.memory import format_bytes
from toolkit.datasets.tasks import score_in
from toolkit.training.interruption import Interrupt

SHOW_SECONDS = 0.25  # between two pictures, at least
SHOW_SHARE = 0.02  # of the time, at most, goes into pictures
WAIT_SECONDS = 0.05  # how often a paused run looks whether it shall go on
FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # variables that they set
WARM_UP_STEPS = 2  # these also count memory and FLOPs: too slow to tell how long the others take


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step."""

    step: int  # 0: before the first
    total_steps: int
    epoch: int  # from 1 on
    epochs: int
    loss: float | None  # mean over the training images since the last progress; None where there are none
    score_pct: float | None  # likewise, right answers; None where a step does not tell
    peak_bytes: int  # highest device memory of the training steps so far
    budget_bytes: int
    seconds: float  # of training, validation and snapshots, since the first start; without pauses
    energy_joules: float | None  # of the GPU in these seconds, gross
    energy_source: str  # as in measure.Window
    energy_reason: str | None  # why energy_joules is None
    seconds_left: float | None = None  # at the pace so far; None where that is unknown yet


class View:
    """What `fit` calls; this one shows nothing.  `fit` reads the two wishes after each step."""

    paused = False  # wait before the next step
    stop_wanted = False  # save the state and end, as after Ctrl-C

    def usable(self) -> View:
        """This view, or one to take where this one cannot be shown."""
        return self

    def begin(self, progress: Progress, history: list[dict[str, Any]], saves: bool) -> None:
        """Before the first step of this process.

        `history`: rows of the epochs before, if a run goes on; `saves`: this one can go on if stopped.
        """

    def step(self, progress: Progress) -> None:
        """After a step, its loss known; steps that follow too fast are left out."""

    def wait(self, progress: Progress) -> None:
        """The run waits from here on, as `paused` wants it."""

    def epoch(self, progress: Progress, row: dict[str, Any]) -> None:
        """After the validation of each epoch; `row` is its row of `FitResult.history`."""

    def end(self, progress: Progress, message: str) -> None:
        """After the last step, however it ended; `message` says how."""


class Lines(View):
    """One printed line per epoch."""

    def epoch(self, progress: Progress, row: dict[str, Any]) -> None:
        _, score = score_in(row, "val")
        score = "–" if score is None else f"{score:.2f} %"
        print(
            f"epoch {row['epoch']}/{progress.epochs}: loss {row['train_loss']:.4f}, "
            f"val {score}, peak {format_bytes(progress.peak_bytes)}"
        )


class Bar(View):
    """A bar that moves, and leaves nothing behind."""

    def begin(self, progress: Progress, history: list[dict[str, Any]], saves: bool) -> None:
        total, done = progress.total_steps, progress.step
        self._bar = tqdm(total=total, initial=done, unit="step", leave=False, mininterval=0)

    def step(self, progress: Progress) -> None:
        self._bar.set_description(f"epoch {progress.epoch}/{progress.epochs}", refresh=False)
        score = {} if progress.score_pct is None else {"acc": f"{progress.score_pct:.1f}%"}
        self._bar.set_postfix(
            loss=f"{progress.loss:.3f}",
            **score,
            peak=format_bytes(progress.peak_bytes),
            refresh=False,
        )
        self._bar.update(progress.step - self._bar.n)

    def end(self, progress: Progress, message: str) -> None:
        self._bar.close()


class Screen:
    """Passes a run's progress to `view`, and the wishes of `view` and `interrupt` to the run.

    For a with statement.  What the view raises is printed once; then the run goes on without it.
    """

    def __init__(self, view: View, interrupt: Interrupt):
        self._view, self._interrupt = view.usable(), interrupt
        self._progress: Callable[[], Progress] | None = None  # of the run, between `begin` and `end`
        self._next_seconds = 0.0  # on the clock, when the next picture is due
        self._first_step: int | None = None  # of the steps that are told of
        self._pace_from: Progress | None = None  # the first progress after warming up

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type:
            self.end(f"{error_type.__name__}: {error}")

    @property
    def stop_wanted(self) -> bool:
        """Whether the run shall save its state and end."""
        return self._interrupt.wanted or self._view.stop_wanted

    @property
    def paused(self) -> bool:
        """Whether the run shall wait; a wish to stop comes first."""
        return self._view.paused and not self.stop_wanted

    def begin(self, progress: Callable[[], Progress], history: list[dict[str, Any]], saves: bool) -> None:
        """Show the run before its first step; `progress` tells where it stands whenever it is asked."""
        self._progress = progress
        self._show(lambda now: self._view.begin(now, history, saves))

    def step(self) -> None:
        """Show a step, if a picture is due."""
        start = time.perf_counter()
        if start >= self._next_seconds:
            self._show(self._view.step)
            now = time.perf_counter()
            self._next_seconds = now + max(SHOW_SECONDS, (now - start) / SHOW_SHARE)

    def wait(self) -> None:
        """Sleep until the run shall go on or stop."""
        self._show(self._view.wait)
        while self.paused:
            time.sleep(WAIT_SECONDS)

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch with its validation."""
        self._show(lambda now: self._view.epoch(now, row))

    def end(self, message: str) -> None:
        """Show how the run ended, if it began."""
        if self._progress:
            self._show(lambda now: self._view.end(now, message))
            self._progress = None

    def _show(self, show: Callable[[Progress], None]) -> None:
        try:
            show(self._with_time_left(self._progress()))
        except Exception as error:
            print(f"the view failed ({type(error).__name__}: {error}); training goes on without it")
            self._view = View()

    def _with_time_left(self, progress: Progress) -> Progress:
        if self._first_step is None:
            self._first_step = progress.step
        if self._pace_from is None:
            if progress.step >= self._first_step + WARM_UP_STEPS:
                self._pace_from = progress
            return progress
        steps = progress.step - self._pace_from.step
        if steps == 0:
            return progress
        pace = (progress.seconds - self._pace_from.seconds) / steps
        return replace(progress, seconds_left=pace * (progress.total_steps - progress.step))


def plain_view() -> View:
    """A bar where one can move, else one line per epoch: under papermill a bar would stay at 0 %."""
    can_move = live_notebook() if "ipykernel" in sys.modules else sys.stderr.isatty()
    return Bar() if can_move else Lines()


def live_notebook() -> bool:
    """Whether this is a notebook that a person sits before."""
    return "ipykernel" in sys.modules and any(os.environ.get(name) for name in FRONT_ENDS)


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Kernels that are started inside have no person before them, even if this process has."""
    hidden = {name: os.environ.pop(name) for name in FRONT_ENDS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
