"""Many experiments: sweeps, dry runs, clusters."""
