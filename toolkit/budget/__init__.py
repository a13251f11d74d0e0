"""Training inside a memory budget.  Needs nothing but torch: usable on any module and any loop.

`plan()` predicts, `auto_checkpoint()` keeps a budget.  From the bottom: `memory` parses budgets and reads
what is allocated (on the CPU too), `wrapping` puts functions around forwards, `tape` records operators and
computes dropped tensors again, `step` runs a training step, on fake tensors if wanted, `flops` counts it,
`checkpointing` has the strategies that decide block by block, `lean` the layers that keep less.  The planner:
`profile` runs a step on fake tensors, `levels` finds what a block can keep, `solver` chooses, `plan` puts it
together, `auto` applies it.

Other rooms register what they know: operators' workspaces (`memory.register_workspace`) and FLOPs
(`flops.register_flops`), lean forms (`lean.register_form`; of low-rank layers in `methods.lean`, from where
`toolkit.plan` and `toolkit.auto_checkpoint` are imported).
"""

from toolkit.budget.auto import AutoCheckpoint, auto_checkpoint, untracked_bytes
from toolkit.budget.checkpointing import STRATEGIES, Checkpointing, Strategy, find_blocks, register_strategy
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
    "Strategy",
    "TensorMemory",
    "auto_checkpoint",
    "device_memory",
    "find_blocks",
    "format_bytes",
    "is_out_of_memory",
    "parse_bytes",
    "plan",
    "register_strategy",
    "release_failed_backward",
    "tensors_of",
    "untracked_bytes",
]
