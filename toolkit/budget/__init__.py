"""Training inside a memory budget.  Needs nothing but torch: usable on any module and any loop.

`plan()` predicts, `auto_checkpoint()` keeps a budget.  From the bottom: `sizes` parses budgets, `memory`
reads what is allocated (on the CPU too), `flops` counts, `blocks` finds where a model can be cut,
`checkpointing` has the strategies of others, `lean` and `lean_conv` the layers that keep nothing twice or
in vain.  The planner: `tape` records operators and computes dropped tensors again, `profile` runs a step on
fake tensors, `levels` finds what a block can keep, `solver` chooses, `plan` puts it together, `auto` applies
it.
"""

from toolkit.budget.auto import AutoCheckpoint, auto_checkpoint, taken_beside_tensors
from toolkit.budget.blocks import find_blocks
from toolkit.budget.checkpointing import STRATEGIES, Checkpointing
from toolkit.budget.lean import LeanForms
from toolkit.budget.memory import (
    CudaMemory,
    DeviceMemory,
    TensorMemory,
    device_memory,
    format_bytes,
    is_out_of_memory,
    parse_bytes,
    release_failed_backward,
    tensors_of,
)
from toolkit.budget.plan import Plan, Planner, plan

__all__ = [
    "STRATEGIES",
    "AutoCheckpoint",
    "Checkpointing",
    "CudaMemory",
    "DeviceMemory",
    "LeanForms",
    "Plan",
    "Planner",
    "TensorMemory",
    "auto_checkpoint",
    "device_memory",
    "find_blocks",
    "format_bytes",
    "is_out_of_memory",
    "parse_bytes",
    "plan",
    "release_failed_backward",
    "taken_beside_tensors",
    "tensors_of",
]
