"""What moves in a notebook: widgets that need a live kernel, and work without a browser in tests."""

from toolkit.widgets.budget import BudgetExplorer
from toolkit.widgets.live import LiveView
from toolkit.widgets.results import ResultsBrowser

__all__ = ["BudgetExplorer", "LiveView", "ResultsBrowser"]
