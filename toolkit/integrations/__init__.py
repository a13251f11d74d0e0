"""Memory budgets in other training programs, each in a few lines on `auto_checkpoint`.

A trainer's own first step is recorded (`batch=None`), so batches, precision, collation, label smoothing and
the loss are read from what the trainer does.  The modules are named after the packages that they import:

    from toolkit.integrations.transformers import BudgetCallback  # also for TRL
    from toolkit.integrations.lightning import BudgetCallback
    from toolkit.integrations.accelerate import keep_budget
"""
