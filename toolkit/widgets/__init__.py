"""What moves in a notebook: widgets that need a live kernel, and work without a browser in tests."""

from toolkit.widgets.budget import BudgetExplorer

__all__ = ["BudgetExplorer"]
