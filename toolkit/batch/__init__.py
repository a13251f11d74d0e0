"""Many experiments: grids, sweep files, dry runs, and workers on several devices."""

from toolkit.batch.sweep import execute_notebook, grid, run_experiments
from toolkit.batch.sweep_file import preset, read_sweep

__all__ = ["execute_notebook", "grid", "preset", "read_sweep", "run_experiments"]
