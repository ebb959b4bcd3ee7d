"""`python -m ds_longft.verify`, and under a launcher `deepspeed --module ds_longft.verify --config my.yaml`."""

from __future__ import annotations

from ds_longft.train.launch import run_rank
from ds_longft.verify.command import main

if __name__ == "__main__":
    run_rank(main)
