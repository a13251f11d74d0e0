"""The budget explorer: a slider over the budgets of an `Explorer`, and what each of them means.

Nothing here needs a browser: moving the slider and pressing the button are methods.
"""

from __future__ import annotations

import html
import io
import statistics
import time
from pathlib import Path

import ipywidgets
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from toolkit.budget import (
    format_bytes,
    parse_bytes,
)
from toolkit.errors import InputError
from toolkit.explorer import MARKS, Explorer


class BudgetExplorer(ipywidgets.VBox):
    """A slider over budgets, the picture and the table of its budget, and a button that writes them down.

    The button writes to `path`, see `Explorer.write`.
    """

    def __init__(self, explorer: Explorer, path: Path):
        self.explorer, self.path = explorer, Path(path)
        self._layout: list[Bbox] = []  # where the axes lie
        stops, wanted = explorer.stops, explorer.experiment.budget_bytes
        self.slider = ipywidgets.SelectionSlider(
            options=[(_label(size), size) for size in stops],
            index=min(range(len(stops)), key=lambda i: abs(stops[i] - wanted)),
            description="budget",
            continuous_update=False,
            layout=ipywidgets.Layout(width="90%"),
        )
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%"))
        self.legend, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        self.button = ipywidgets.Button(description="Use this budget")
        self.message = ipywidgets.HTML()
        e = explorer.experiment
        title = ipywidgets.HTML(
            html.escape(f"{e.method} on {e.backbone}, batches of {e.batch_size}, {e.precision} on {e.device}")
        )
        super().__init__(
            [title, self.slider, self.picture, self.legend, self.table, self.button, self.message]
        )
        self.slider.observe(lambda change: self.update(change["new"]), "value")
        self.button.on_click(lambda _: self.write())
        self.update(self.slider.value)

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

    def _draw(self) -> bytes:
        """The picture as PNG.  Text takes longest: legends are HTML, and the layout is found once."""
        with plt.rc_context({"figure.dpi": 72}):
            figure = self.explorer.figure(self.budget_bytes)
        try:
            self.legend.value = "<br>".join(_legend(axes) for axes in figure.axes)
            for axes in figure.axes:
                axes.get_legend().remove()
                axes.locator_params(axis="y", nbins=4)
            figure.axes[0].locator_params(axis="x", nbins=5)
            if not self._layout:
                figure.draw_without_rendering()
                self._layout = [axes.get_position() for axes in figure.axes]
                for box in self._layout:
                    box.x0 += 0.02  # room for longer numbers
            figure.set_layout_engine("none")
            for axes, position in zip(figure.axes, self._layout):
                axes.set_position(position)
            with io.BytesIO() as file:
                # Not savefig, which draws twice.
                FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 1})
                return file.getvalue()
        finally:
            plt.close(figure)

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
    return f"{size // 10**9} GB" if size in MARKS else format_bytes(size)


def _legend(axes: Axes) -> str:
    """The legend of `axes` as HTML."""
    parts = []
    for handle, label in zip(*axes.get_legend_handles_labels()):
        artist = handle[0] if isinstance(handle, BarContainer) else handle
        colour = artist.get_color() if isinstance(artist, Line2D) else np.ravel(artist.get_facecolor())
        square = f'<span style="color:{to_hex(colour, keep_alpha=True)}">&#9632;</span>'
        parts.append(f"{square} {html.escape(label)}")
    return " &ensp; ".join(parts)
