"""Interactive widgets for notebooks; they need a live kernel, and work without a browser in tests."""

from toolkit.widgets.budget import BudgetExplorer
from toolkit.widgets.live import LiveView, live_view
from toolkit.widgets.results import MethodChooser, ResultsBrowser

__all__ = ["BudgetExplorer", "LiveView", "MethodChooser", "ResultsBrowser", "live_view"]
