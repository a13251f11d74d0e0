"""The live view of `fit`: loss, score, memory against the budget, energy and time, with pause and stop.

A cell that trains keeps the kernel's main thread busy.  ipykernel 7 and JupyterLab 4.4 handle clicks in a
thread of their own (subshells), so buttons work meanwhile; their handlers only leave a request that `fit`
reads between two steps.  Elsewhere clicks wait until the cell has ended; use Jupyter's stop button there.
A page that is reloaded during training shows the view again when the cell has ended.
"""

from __future__ import annotations

import html
import io
from typing import Any

import ipywidgets
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from toolkit.budget import format_bytes
from toolkit.datasets import task_of
from toolkit.datasets.tasks import score_in
from toolkit.experiment import Experiment
from toolkit.measure.quantities import QUANTITIES
from toolkit.plots.style import styled
from toolkit.training.progress import Plain, Progress, View, live_notebook

MOST_POINTS = 240  # of a curve; beyond it, every second one is dropped
HINT = "Where the buttons do not react, Jupyter's stop button (■) also saves and ends."


def live_view(experiment: Experiment) -> View:
    """The view for `fit(..., view=live_view(experiment))`: a `LiveView` if there is someone to look at it."""
    return LiveView(experiment) if live_notebook() else Plain()


class LiveView(View):
    """Draws a run in the notebook while it trains."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    def begin(self, progress: Progress, history: list[dict[str, Any]], saves: bool) -> None:
        """Show the widgets; without a snapshot folder the second button is a plain "Stop"."""
        self.paused = self.stop_wanted = False
        self.rows = list(history)
        scores = [score_in(row, "train") or ("", None) for row in history]
        # Epochs, loss and score (%) of training
        self.points = [(row["epoch"], row["train_loss"], score) for row, (_, score) in zip(history, scores)]
        e = self.experiment
        title = f"{e.method} on {e.backbone}, {e.checkpointing}, batches of {e.batch_size}"
        wide = {"width": "100%"}
        self.bar = ipywidgets.FloatProgress(max=progress.total_steps, layout=wide)
        self.memory = ipywidgets.FloatProgress(max=progress.budget_bytes, description="memory", layout=wide)
        self.state, self.message = ipywidgets.HTML(), ipywidgets.HTML()
        self.picture = ipywidgets.Image(format="png")
        self.curves = Curves(progress.epochs, QUANTITIES[task_of(e.dataset).metric].title)
        self.pause = ipywidgets.Button(description="Pause", icon="pause")
        self.stop = ipywidgets.Button(description="Stop and save" if saves else "Stop", icon="stop")
        self.pause.on_click(lambda _: self.toggle_pause())
        self.stop.on_click(lambda _: self.want_stop())
        for button in (self.pause, self.stop):
            _answer_at_once(button)
        buttons = ipywidgets.HBox([self.pause, self.stop, self.message])
        title = ipywidgets.HTML(html.escape(title))
        self.widget = ipywidgets.VBox([title, self.bar, self.memory, self.state, self.picture, buttons])
        self._draw(progress, HINT)
        display(self.widget)

    def step(self, progress: Progress) -> None:
        """Draw the run as it is."""
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
        """Draw the run as it ended, and disable the buttons."""
        self.pause.disabled = self.stop.disabled = True
        self.bar.bar_style = "success" if progress.step == progress.total_steps else "warning"
        self._draw(progress, message)

    def toggle_pause(self) -> None:
        """Wait after this step, or continue."""
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
        left = "not known yet"
        if progress.seconds_left is not None:
            left = tqdm.format_interval(progress.seconds_left)
        over = progress.peak_bytes > progress.budget_bytes
        self.bar.value, self.memory.value = progress.step, progress.peak_bytes
        self.memory.bar_style = "danger" if over else "info"
        self.state.value = (
            f"epoch {progress.epoch} of {progress.epochs}, step {progress.step} of {progress.total_steps}; "
            f"time {tqdm.format_interval(progress.seconds)}, left {left}; energy {_energy(progress)}; "
            f"peak memory {format_bytes(progress.peak_bytes)}, "
            f"{'over' if over else 'within'} the budget of {format_bytes(progress.budget_bytes)}"
        )
        self.message.value = f"<small>{html.escape(message)}</small>"
        metric = task_of(self.experiment.dataset).metric
        self.picture.value = self.curves.png(
            [point[:2] for point in self.points],
            [point[::2] for point in self.points if point[2] is not None],
            self._validated("val_loss"),
            self._validated(f"val_{metric}"),
        )

    def _validated(self, name: str) -> list[tuple[float, float]]:
        return [(row["epoch"], row[name]) for row in self.rows if row.get(name) is not None]


class Curves:
    """Two small panels, of loss and of a score over epochs: training as a line, validation as squares."""

    @styled
    def __init__(self, epochs: int, score: str):
        self._canvas = FigureCanvasAgg(Figure(figsize=(8, 2), dpi=72, layout="constrained"))
        self.axes = self._canvas.figure.subplots(1, 2)
        for axes, label in zip(self.axes, ("loss", score)):
            axes.set(xlim=(0, epochs), xlabel="epoch", ylabel=label)
            axes.plot([], [], color="C0", label="training")
            axes.plot([], [], "s--", color="C1", label="validation")
        self.axes[0].legend()

    def png(self, *curves: list[tuple[float, float]]) -> bytes:
        """The picture with these points: loss and score in training, then in validation."""
        train_loss, train_score, val_loss, val_score = curves
        for axes, pair in zip(self.axes, ((train_loss, val_loss), (train_score, val_score))):
            for line, points in zip(axes.lines, pair):
                line.set_data(*zip(*points) if points else ([], []))
            axes.relim()
            axes.autoscale_view(scalex=False)
            axes.set_ylim(bottom=0)
        with io.BytesIO() as file:
            self._canvas.print_png(file)
            return file.getvalue()


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
