"""Training under SLURM: fill a batch script from a run config, and decide whether a job that ended goes on."""
