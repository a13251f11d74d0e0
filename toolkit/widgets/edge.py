"""Which method for my device: two sliders, for memory and for FLOPs, and the recommendation with its reason.

Nothing here needs a browser: moving a slider is setting its value.
"""

from __future__ import annotations

import html

import ipywidgets
import pandas as pd

from toolkit.analysis.recommend import recommend
from toolkit.budget import format_bytes
from toolkit.errors import InputError
from toolkit.plots.pareto import printable

WIDE = ipywidgets.Layout(width="90%")


class MethodChooser(ipywidgets.VBox):
    """Sliders over the limits at which the choice can change, and what `recommend` says there.

    `frame`: rows of `edge.recommend.ranking` of one or several data sets.  The sliders begin at the
    highest limits; each stop is what a method needs, the first a little less than any.  Raises
    `InputError` for a frame in which nothing can be chosen.
    """

    def __init__(self, frame: pd.DataFrame):
        known = frame.dropna(subset=["accuracy_pct", "peak_bytes", "flops_per_step"])
        if known.empty:
            raise InputError("no row has accuracy, peak memory and FLOPs: nothing to choose from.")
        self._frame = known
        names = sorted(known.dataset.unique())
        self.dataset = ipywidgets.Dropdown(
            options=[(printable(str(name)), name) for name in names], description="data"
        )
        self.memory, self.flops = (
            ipywidgets.SelectionSlider(options=[("", 0.0)], description=text, layout=WIDE)
            for text in ("memory", "FLOPs")
        )
        self.answer, self.table = ipywidgets.HTML(), ipywidgets.HTML()
        super().__init__([self.dataset, self.memory, self.flops, self.answer, self.table])
        self._choose_data()
        self.dataset.observe(lambda _: self._choose_data(), "value")
        for slider in (self.memory, self.flops):
            slider.observe(lambda _: self._answer(), "value")

    def _choose_data(self) -> None:
        """Sliders with the stops of the chosen data set."""
        self._rows = self._frame[self._frame.dataset == self.dataset.value]
        for slider, column, text in (
            (self.memory, "peak_bytes", format_bytes),
            (self.flops, "flops_per_step", lambda flops: f"{flops / 1e6:,.1f} MFLOP"),
        ):
            needs = {text(need): need for need in sorted(self._rows[column])}  # the highest of a label
            least = 0.98 * self._rows[column].min()
            slider.options = [(f"below {next(iter(needs))}", least), *needs.items()]
            slider.index = len(slider.options) - 1
        self._answer()

    def _answer(self) -> None:
        found = recommend(self._rows, self.memory.value, self.flops.value)
        self.answer.value = f"<p><b>{html.escape(printable(found.why))}</b></p>"
        self.table.value = printable(found.table.to_html(index=False, escape=True))
