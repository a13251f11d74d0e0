"""The budget explorer: a slider over the budgets of an `Explorer`, and what each of them means.

Nothing here needs a browser: moving the slider and pressing the buttons are methods.
"""

from __future__ import annotations

import html
import statistics
import time
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from toolkit.backbones import BACKBONES
from toolkit.budget import format_bytes, parse_bytes
from toolkit.budget.memory import CARDS_BYTES
from toolkit.errors import InputError
from toolkit.experiment import PRECISIONS, Experiment
from toolkit.forecast.explorer import Explorer
from toolkit.methods import METHODS
from toolkit.plots.step import StepFigure


class BudgetExplorer(ipywidgets.VBox):
    """A slider over budgets, the picture and the table of its budget, and fields for another model.

    One button profiles what the fields say, in place of what is shown; the other writes the shown budget
    to `path`, see `Explorer.write`.
    """

    def __init__(self, explorer: Explorer, path: Path):
        self.explorer, self.path = explorer, Path(path)
        e = explorer.experiment
        self.backbone = ipywidgets.Combobox(
            value=e.backbone, options=BACKBONES, ensure_option=False, description="backbone"
        )
        methods = [name for name, method in METHODS.items() if e.task in method.tasks]
        self.method = ipywidgets.Dropdown(value=e.method, options=methods, description="method")
        self.batch_size = ipywidgets.BoundedIntText(e.batch_size, min=1, max=10**6, description="batch size")
        self.precision = ipywidgets.Dropdown(value=e.precision, options=PRECISIONS, description="precision")
        self.num_classes = ipywidgets.BoundedIntText(
            explorer.num_classes, min=1, max=10**6, description="classes"
        )
        self.profiler = ipywidgets.Button(description="Profile")
        self.progress = ipywidgets.Output()
        self.title = ipywidgets.HTML()
        self.slider = ipywidgets.SelectionSlider(
            options=[("", 0)],
            description="budget",
            continuous_update=False,
            layout=ipywidgets.Layout(width="90%"),
        )
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.table = ipywidgets.HTML()
        self.button = ipywidgets.Button(description="Use this budget")
        self.message = ipywidgets.HTML()
        fields = [self.backbone, self.method, self.batch_size, self.precision, self.num_classes]
        super().__init__(
            [
                ipywidgets.HBox([*fields, self.profiler], layout=ipywidgets.Layout(flex_flow="row wrap")),
                self.progress, self.title, self.slider, self.picture, self.table, self.button,
                self.message,
            ]
        )  # fmt: skip
        self.slider.observe(self._moved, "value")
        self.profiler.on_click(lambda _: self.profile())
        self.button.on_click(lambda _: self.write())
        self._show(explorer, e.budget_bytes)

    def profile(self) -> None:
        """Explore what the fields say; what cannot be is a message, and what is shown stays."""
        self.message.value, self.profiler.disabled = "", True
        self.progress.clear_output()
        with self.progress:
            try:  # inside: an Output shows errors itself, with their tracebacks
                self._show(
                    Explorer(self._chosen(), self.num_classes.value, self.explorer.folder), self.budget_bytes
                )
            except Exception as error:  # a model may raise anything
                self.message.value = html.escape(str(error) or type(error).__name__)
            finally:
                self.profiler.disabled = False

    def _chosen(self) -> Experiment:
        """The experiment that the fields say; the rest is as before."""
        before = self.explorer.experiment
        backbone, method = self.backbone.value.strip(), self.method.value
        same = (backbone, method) == (before.backbone, before.method)
        return before.variant(
            backbone=backbone,
            method=method,
            batch_size=self.batch_size.value,
            micro_batch_size=min(before.micro_batch_size, self.batch_size.value),
            precision=self.precision.value,
            lr=before.lr if same else 0,  # the table's
        )

    def update(self, budget: int | str) -> None:
        """Show `budget`; bad input is a message, and what is shown stays."""
        try:
            table = self.explorer.summary(budget)
        except InputError as error:
            self.message.value = html.escape(str(error))
            return
        self.budget_bytes = parse_bytes(budget)
        self.table.value = table.to_html(index=False, escape=True)
        self.picture.value = self._draw()
        self.message.value = ""

    def _show(self, explorer: Explorer, budget_bytes: int) -> None:
        """Put `explorer` in place, at the stop next to a budget."""
        stops, e = explorer.stops, explorer.experiment
        self.explorer, self._kinds = explorer, None
        self.title.value = html.escape(
            f"{e.method} on {e.backbone}, batches of {e.batch_size}, {e.precision} on {e.device}"
        )
        nearest = min(stops, key=lambda stop: abs(np.log(stop / budget_bytes)))
        self.slider.unobserve(self._moved, "value")  # new options move it, too
        self.slider.options = [(_label(size), size) for size in stops]
        self.slider.value = nearest
        self.slider.observe(self._moved, "value")
        self.update(nearest)

    def _moved(self, change: dict) -> None:
        self.update(change["new"])

    def _draw(self) -> bytes:
        """The picture as PNG."""
        picture, kinds = self.explorer.picture(self.budget_bytes), self.explorer.kinds
        if kinds != self._kinds:
            figure = Figure(figsize=(12, 6), dpi=72, layout="constrained")
            self._kinds, self._figure = kinds, StepFigure(figure, picture, kinds)
        return self._figure.png(picture)

    def write(self) -> None:
        """Write the shown budget's experiment, and show the command that runs it."""
        try:
            command = self.explorer.write(self.budget_bytes, self.path)
        except (InputError, OSError) as error:
            self.message.value = html.escape(str(error))
            return
        self.message.value = f"<pre>{html.escape(command)}</pre>"

    def reaction_seconds(self, moves: int = 20) -> float:
        """Median time from a change of the slider to the picture and the table."""
        before, count, seconds = self.slider.index, len(self.slider.options), []
        for _ in range(moves):
            start = time.perf_counter()
            self.slider.index = (self.slider.index + max(1, count // 3)) % count
            seconds.append(time.perf_counter() - start)
        self.slider.index = before
        return statistics.median(seconds)


def _label(size: int) -> str:
    return f"{size // 10**9} GB" if size in CARDS_BYTES else format_bytes(size)
