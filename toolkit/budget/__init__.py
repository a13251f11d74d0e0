"""Training inside a memory budget.  Needs nothing but torch: usable on any module and any loop.

`sizes` parses budgets, `memory` reads what is allocated (on the CPU too), `blocks` finds where
activations may be dropped, `checkpointing` drops them.
"""

from toolkit.budget.blocks import find_blocks
from toolkit.budget.checkpointing import STRATEGIES, Checkpointing
from toolkit.budget.memory import CudaMemory, DeviceMemory, TensorMemory, device_memory, is_out_of_memory
from toolkit.budget.sizes import format_bytes, parse_bytes

__all__ = [
    "STRATEGIES",
    "Checkpointing",
    "CudaMemory",
    "DeviceMemory",
    "TensorMemory",
    "device_memory",
    "find_blocks",
    "format_bytes",
    "is_out_of_memory",
    "parse_bytes",
]
