"""The live view of `fit`: loss, accuracy, memory against the budget, energy and time, pause and stop.

A cell that trains keeps the kernel's main thread busy.  ipykernel 7 and JupyterLab 4.4 carry clicks to a
thread of their own (subshells), so buttons work meanwhile; handlers only leave a wish that `fit` reads
between two steps.  Elsewhere clicks wait until the cell has ended, and Jupyter's stop button is the way.
A page that is loaded anew during training shows the view again when the cell has ended.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import ipywidgets
from IPython.display import display
from tqdm import tqdm

from toolkit.budget import format_bytes
from toolkit.datasets import task_of
from toolkit.datasets.tasks import score_in
from toolkit.experiment import Experiment
from toolkit.measure.quantities import QUANTITIES
from toolkit.training.progress import Progress, View, live_notebook, plain_view

MOST_POINTS = 240  # of a curve; then every second one goes
WIDTH, HEIGHT = 260, 110  # of one picture, in pixels
# Near seaborn's palette "colorblind"; the blue is lighter, for dark themes.
TRAIN, VALIDATION, OVER = "#2a8fd0", "#de8f05", "#d55e00"
HINT = "Where the buttons do not react, Jupyter's stop button (■) also saves and ends."


class LiveView(View):
    """`fit(..., view=LiveView(experiment))` draws in the notebook while it trains.

    Where no person sits before a notebook, `plain_view` takes its place.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    def usable(self) -> View:
        """Itself in a live notebook."""
        return self if live_notebook() else plain_view()

    def begin(self, progress: Progress, history: list[dict[str, Any]], saves: bool) -> None:
        """Show the widgets; without a snapshot folder the second button is a plain "Stop"."""
        self.paused = self.stop_wanted = False
        self.rows = list(history)
        # Epochs, loss and score (%) of training.
        scores = (score_in(row, "train") or ("", None) for row in history)
        self.points = [(row["epoch"], row["train_loss"], score) for row, (_, score) in zip(history, scores)]
        e = self.experiment
        title = f"{e.method} on {e.backbone}, {e.checkpointing}, batches of {e.batch_size}"
        self.bar = ipywidgets.FloatProgress(max=progress.total_steps, layout={"width": "100%"})
        self.state, self.picture, self.message = (ipywidgets.HTML() for _ in range(3))
        self.pause = ipywidgets.Button(description="Pause", icon="pause")
        self.stop = ipywidgets.Button(description="Stop and save" if saves else "Stop", icon="stop")
        self.pause.on_click(lambda _: self.toggle_pause())
        self.stop.on_click(lambda _: self.want_stop())
        for button in (self.pause, self.stop):
            _answer_at_once(button)
        buttons = ipywidgets.HBox([self.pause, self.stop, self.message])
        self.widget = ipywidgets.VBox(
            [ipywidgets.HTML(html.escape(title)), self.bar, self.state, self.picture, buttons]
        )
        self._draw(progress, HINT)
        display(self.widget)

    def step(self, progress: Progress) -> None:
        """Draw the run as it stands."""
        epochs = progress.step * progress.epochs / progress.total_steps
        self.points.append((epochs, progress.loss, progress.score_pct))
        if len(self.points) > MOST_POINTS:
            del self.points[1::2]
        self._draw(progress, self._wish() or HINT)

    def wait(self, progress: Progress) -> None:
        """Draw the run as it waits."""
        self._draw(progress, "paused: its memory stays taken, its time and energy do not count")

    def epoch(self, progress: Progress, row: dict[str, Any]) -> None:
        """Draw the run with the validation of an epoch."""
        self.rows.append(row)
        self._draw(progress, self._wish() or HINT)

    def end(self, progress: Progress, message: str) -> None:
        """Draw the run as it ended; the buttons rest."""
        self.pause.disabled = self.stop.disabled = True
        self._draw(progress, message)

    def toggle_pause(self) -> None:
        """Wait after this step, or go on."""
        self.paused = not self.paused
        self.pause.description, self.pause.icon = ("Resume", "play") if self.paused else ("Pause", "pause")
        self.message.value = f"<small>{self._wish()}</small>"

    def want_stop(self) -> None:
        """End after this step, with the state saved."""
        self.stop_wanted = True
        self.message.value = f"<small>{self._wish()}</small>"

    def _wish(self) -> str:
        if self.stop_wanted:
            return "stops after this step"
        return "pauses after this step" if self.paused else ""

    def _draw(self, progress: Progress, message: str) -> None:
        left = (
            "not known yet" if progress.seconds_left is None else tqdm.format_interval(progress.seconds_left)
        )
        self.bar.value = progress.step
        self.state.value = (
            f"epoch {progress.epoch} of {progress.epochs}, step {progress.step} of {progress.total_steps}; "
            f"time {tqdm.format_interval(progress.seconds)}, left {left}; energy {_energy(progress)}"
        )
        metric = task_of(self.experiment.dataset).metric
        loss = curve("loss", progress.epochs, [p[:2] for p in self.points], self._validated("val_loss"))
        score = curve(
            QUANTITIES[metric].title, progress.epochs, [p[::2] for p in self.points if p[2] is not None],
            self._validated(f"val_{metric}"), top=100,
        )  # fmt: skip
        memory = memory_bar(progress.peak_bytes, progress.budget_bytes)
        self.message.value = f"<small>{html.escape(message)}</small>"
        self.picture.value = f'<div style="display:flex;flex-wrap:wrap;gap:16px">{loss}{score}{memory}</div>'

    def _validated(self, name: str) -> list[tuple[float, float]]:
        return [(row["epoch"], row[name]) for row in self.rows if row.get(name) is not None]


def _answer_at_once(button: ipywidgets.Button) -> None:
    """Let clicks be handled where the browser sends them: in a subshell, if it can.

    ipykernel 7.4 otherwise sends them to the shell that last wrote to the button: the one that trains.
    """
    button.comm._reply_subshell_for = lambda data, asked: asked


def _energy(progress: Progress) -> str:
    if progress.energy_joules is None:
        return f"– ({html.escape(progress.energy_reason or 'not measured')})"
    simulated = ", simulated" if progress.energy_source == "fake" else ""
    return f"{progress.energy_joules:,.0f} J (GPU{simulated})"


def curve(
    name: str,
    epochs: int,
    train: Sequence[tuple[float, float]],
    validation: Sequence[tuple[float, float]],
    top: float | None = None,
) -> str:
    """An SVG picture of two curves over `epochs`: training as a line, validation dashed with squares.

    Points are (epochs, value); `top` is the highest value of the axis (default: what is needed).
    """
    top = top or max((value for _, value in [*train, *validation]), default=1.0) or 1.0

    def points(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [
            (30 + (WIDTH - 36) * x / epochs, 18 + (HEIGHT - 34) * (1 - min(y, top) / top)) for x, y in values
        ]

    def line(values: list[tuple[float, float]], style: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in values)
        return f'<polyline points="{path}" fill="none" stroke-width="1.6" {style}/>'

    squares = "".join(
        f'<rect x="{x - 2.5:.1f}" y="{y - 2.5:.1f}" width="5" height="5" fill="{VALIDATION}"/>'
        for x, y in points(validation)
    )
    last = "".join(
        f' {part} <tspan fill="{colour}">{mark}</tspan> {values[-1][1]:.3g}'
        for part, colour, mark, values in (
            ("train", TRAIN, "—", train),
            ("val", VALIDATION, "■", validation),
        )
        if values
    )
    bottom = HEIGHT - 16
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{name}" font-size="11" '
        f'fill="currentColor" font-family="sans-serif"><text x="0" y="11">{name}:{last}</text>'
        f'<path d="M30 18V{bottom}H{WIDTH - 6}" fill="none" stroke="currentColor" opacity=".4"/>'
        f'<text x="27" y="24" text-anchor="end">{top:.3g}</text>'
        f'<text x="27" y="{bottom}" text-anchor="end">0</text>'
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 3}" text-anchor="end">{epochs} epochs</text>'
        + line(points(train), f'stroke="{TRAIN}"')
        + line(points(validation), f'stroke="{VALIDATION}" stroke-dasharray="4 3"')
        + f"{squares}</svg>"
    )


def memory_bar(peak_bytes: int, budget_bytes: int) -> str:
    """An SVG picture of the peak so far against the budget, with both numbers."""
    whole = max(peak_bytes, budget_bytes)
    peak, budget = ((WIDTH - 2) * size / whole for size in (peak_bytes, budget_bytes))
    over = peak_bytes > budget_bytes
    verdict = "over the budget" if over else f"{100 * peak_bytes / budget_bytes:.0f} % of the budget"
    x, anchor = (budget, "end") if budget > WIDTH / 2 else (1, "start")
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="memory" font-size="11" '
        f'fill="currentColor" font-family="sans-serif">'
        f'<text x="0" y="11">memory: peak {format_bytes(peak_bytes)}, {verdict}</text>'
        f'<rect x="1" y="24" width="{peak:.1f}" height="22" fill="{OVER if over else TRAIN}"/>'
        f'<rect x="1" y="24" width="{budget:.1f}" height="22" fill="none" stroke="currentColor" '
        f'stroke-dasharray="4 3"/>'
        f'<text x="{x:.1f}" y="60" text-anchor="{anchor}">budget {format_bytes(budget_bytes)}</text></svg>'
    )
