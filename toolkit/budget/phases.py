"""Whether an operator runs in the forward pass, in the backward pass, or computes something again."""

from __future__ import annotations

import torch

from toolkit.budget.tape import recomputing

PHASES = ("forward", "backward", "recompute")


def current_phase() -> str:
    """The phase of the operator that a dispatch mode sees right now.

    During backward the engine runs a graph task.  What runs in it with gradients enabled, or for a tape
    (`budget.tape`), or under the saved-tensor hooks that torch's non-reentrant checkpoint sets while it
    repeats a forward pass (there the forward of an autograd function runs without gradients), is
    recomputation.  Gradients of gradients
    (`create_graph`) are not told from it.
    """
    if torch._C._current_graph_task_id() == -1:
        return "forward"
    if torch.is_grad_enabled() or recomputing():
        return "recompute"
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    repeats = hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
    return "recompute" if repeats else "backward"
