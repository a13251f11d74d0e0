"""What moves in a notebook: widgets that need a live kernel, and work without a browser in tests."""

from toolkit.widgets.budget import BudgetExplorer
from toolkit.widgets.live import LiveView

__all__ = ["BudgetExplorer", "LiveView"]
