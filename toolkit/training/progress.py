"""Live progress of a run, and the pause and stop requests that its user sends back.

`fit` reports to a `View`: `Plain`, or in a notebook `widgets.LiveView`.  `ProgressView` is between the two:
it limits the time that a view costs, and a view that fails does not end the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tqdm import tqdm

from toolkit.budget import format_bytes
from toolkit.datasets.tasks import score_in
from toolkit.training.resume import Interrupt

SHOW_SECONDS = 0.25  # between two reports of steps, at least
SHOW_SHARE = 0.02  # of the time, at most, is spent in views
WAIT_SECONDS = 0.05  # polling interval while paused
WARM_UP_STEPS = 2  # they also count memory and FLOPs: too slow to predict the others from
FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")  # variables that they set


@dataclass(frozen=True)
class Progress:
    """The state of a run after a step."""

    step: int  # 0: before the first
    total_steps: int
    epoch: int  # from 1 on
    epochs: int
    loss: float | None  # mean over the training images since the last report; None if there are none
    score_pct: float | None  # likewise, the training metric; None if the task has none
    peak_bytes: int  # highest device memory of the training steps so far
    budget_bytes: int
    seconds: float  # of training, validation and snapshots, since the first start; without pauses
    energy_joules: float | None  # of the GPU in these seconds, gross
    energy_source: str  # as in measure.Window
    energy_reason: str | None  # why energy_joules is None
    seconds_left: float | None = None  # at the pace so far; None while that is unknown


class View:
    """What `fit` reports to; this one shows nothing.  `fit` reads the two requests after each step."""

    paused = False  # wait before the next step
    stop_wanted = False  # save the state and end, as after Ctrl-C

    def begin(self, progress: Progress, history: list[dict], saves: bool) -> None:
        """Before the first step of this process.

        `history`: rows of the epochs before, if the run is resumed; `saves`: it can be resumed if stopped.
        """

    def step(self, progress: Progress) -> None:
        """After a step; steps that follow too fast are not reported."""

    def wait(self, progress: Progress) -> None:
        """The run is paused from here on."""

    def epoch(self, progress: Progress, row: dict) -> None:
        """After the validation of each epoch; `row` is its row of `FitResult.history`."""

    def end(self, progress: Progress, message: str) -> None:
        """After the last step, however the run ended; `message` says how."""


class Plain(View):
    """One printed line per epoch, and in a terminal a moving bar, which is removed at the end."""

    def begin(self, progress: Progress, history: list[dict], saves: bool) -> None:
        total, done = progress.total_steps, progress.step
        # disable=None: no bar where it cannot move, as in log files and under papermill
        self._bar = tqdm(total=total, initial=done, unit="step", leave=False, mininterval=0, disable=None)

    def step(self, progress: Progress) -> None:
        score = "" if progress.score_pct is None else f", {progress.score_pct:.1f} %"
        self._bar.set_description(f"epoch {progress.epoch}/{progress.epochs}", refresh=False)
        self._bar.set_postfix_str(
            f"loss {progress.loss:.3f}{score}, peak {format_bytes(progress.peak_bytes)}", refresh=False
        )
        self._bar.update(progress.step - self._bar.n)

    def epoch(self, progress: Progress, row: dict) -> None:
        _, score = score_in(row, "val")
        score = "–" if score is None else f"{score:.2f} %"
        left = f", {tqdm.format_interval(progress.seconds_left)} left" if progress.seconds_left else ""
        tqdm.write(
            f"epoch {row['epoch']}/{progress.epochs}: loss {row['train_loss']:.4f}, "
            f"val {score}, peak {format_bytes(progress.peak_bytes)}{left}"
        )

    def end(self, progress: Progress, message: str) -> None:
        self._bar.close()


class ProgressView:
    """Reports a run's progress to `view`; passes the requests of `view` and `interrupt` to the run.

    For a with statement.  An error of the view is printed once; then the run continues without it.
    """

    def __init__(self, view: View, interrupt: Interrupt):
        self._view, self._interrupt = view, interrupt
        self._progress: Callable[[], Progress] | None = None  # of the run, between `begin` and `end`
        self._next_at = 0.0  # on the clock, when the next step may be reported
        self._first_step = 0  # of this process
        self._pace_from: Progress | None = None  # the first report after the warm-up

    def __enter__(self) -> ProgressView:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type:
            self.end(f"{error_type.__name__}: {error}")

    @property
    def stop_wanted(self) -> bool:
        """True if the user asked to stop (the state is saved first)."""
        return self._interrupt.wanted or self._view.stop_wanted

    @property
    def paused(self) -> bool:
        """True if the user asked to pause; a request to stop comes first."""
        return self._view.paused and not self.stop_wanted

    def begin(self, progress: Callable[[], Progress], history: list[dict], saves: bool) -> None:
        """Report the run before its first step; `progress` returns its state whenever it is called."""
        self._progress, self._first_step = progress, progress().step
        self._show(lambda now: self._view.begin(now, history, saves))

    def step(self) -> None:
        """Report a step, unless the last report was too recent."""
        start = time.perf_counter()
        if start >= self._next_at:
            self._show(self._view.step)
            now = time.perf_counter()
            self._next_at = now + max(SHOW_SECONDS, (now - start) / SHOW_SHARE)

    def wait(self) -> None:
        """Sleep until the user resumes or stops the run."""
        self._show(self._view.wait)
        while self.paused:
            time.sleep(WAIT_SECONDS)

    def epoch(self, row: dict) -> None:
        """Report an epoch with its validation."""
        self._show(lambda now: self._view.epoch(now, row))

    def end(self, message: str) -> None:
        """Report how the run ended, if it began."""
        if self._progress:
            self._show(lambda now: self._view.end(now, message))
            self._progress = None

    def _show(self, show: Callable[[Progress], None]) -> None:
        try:
            progress = self._progress()
            show(replace(progress, seconds_left=self._seconds_left(progress)))
        except Exception as error:
            print(f"the view failed ({type(error).__name__}: {error}); training continues without it")
            self._view = View()

    def _seconds_left(self, now: Progress) -> float | None:
        if self._pace_from is None and now.step >= self._first_step + WARM_UP_STEPS:
            self._pace_from = now
        if self._pace_from is None or now.step == self._pace_from.step:
            return None
        pace = (now.seconds - self._pace_from.seconds) / (now.step - self._pace_from.step)
        return pace * (now.total_steps - now.step)


def live_notebook() -> bool:
    """Whether this is an interactive notebook session."""
    return "ipykernel" in sys.modules and any(os.environ.get(name) for name in FRONT_ENDS)


@contextlib.contextmanager
def batch() -> Iterator[None]:
    """Start kernels without an interactive front end inside, even if this process has one."""
    hidden = {name: os.environ.pop(name) for name in FRONT_ENDS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
