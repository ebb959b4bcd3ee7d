"""`python -m ds_longft.tools.verify`, alone or under a launcher (`deepspeed --module`)."""

from __future__ import annotations

from ds_longft.ranks.launch import run_rank
from ds_longft.tools.verify.command import main

if __name__ == "__main__":
    run_rank(main)
