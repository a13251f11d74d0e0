"""The meter's windows of one run, summed by name across pauses and killed processes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

from toolkit.measure import Meter, Window, total


class RunWindows:
    """`with windows.window("train"): ...`, many times; then `windows.measured("train")` is their sum."""

    def __init__(self, meter: Meter):
        self.meter = meter
        self.earlier: dict[str, dict] = {}  # `totals` of the processes that were killed
        self._windows: dict[str, list[Window]] = defaultdict(list)  # of this process

    @contextlib.contextmanager
    def window(self, name: str) -> Iterator[Window]:
        """Measure the body of a with statement."""
        with self.meter.window(name) as window:
            self._windows[name].append(window)
            yield window

    def measured(self, name: str) -> Window:
        """The sum of all windows `name` up to now, an open one included."""
        earlier = [Window(**self.earlier[name])] if name in self.earlier else []
        return total([*earlier, *(self.meter.so_far(window) for window in self._windows[name])], name)

    def totals(self) -> dict[str, dict]:
        """`measured` of all names, as plain values."""
        return self.earlier | {name: self.measured(name).to_dict() for name in list(self._windows)}

    def pause(self, wait: Callable[[], None], *around: Stretches) -> None:
        """Call `wait` outside the windows `around` (the outermost first), in one of its own: "pause"."""
        for stretches in reversed(around):
            stretches.close()
        with self.window("pause"):
            wait()
        for stretches in around:
            stretches.start()


class Stretches(contextlib.ExitStack):
    """A window that `RunWindows.pause` can leave and enter anew; for a with statement."""

    def __init__(self, windows: RunWindows, name: str):
        super().__init__()
        self._windows, self._name = windows, name

    def __enter__(self) -> Stretches:
        self.start()
        return self

    def start(self) -> None:
        """Measure from here on."""
        self.enter_context(self._windows.window(self._name))
