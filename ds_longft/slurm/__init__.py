"""Training under SLURM: fill a batch script from a run config, hand it in, and decide whether a job that ended goes on."""
