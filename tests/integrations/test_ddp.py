"""A budget in each of two processes that average their gradients."""

import torch
from ddp_process import run


def test_processes_keep_their_budgets_and_the_weights(tmp_path):
    torch.multiprocessing.spawn(run, args=(str(tmp_path / "store"),), nprocs=2)
