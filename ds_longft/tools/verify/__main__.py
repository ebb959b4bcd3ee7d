"""`python -m ds_longft.tools.verify`, alone or under a launcher (`deepspeed --module`)."""

from __future__ import annotations

from functools import partial

from ds_longft.command_line import call
from ds_longft.ranks.launch import run_rank
from ds_longft.tools.verify.command import verify

if __name__ == "__main__":
    run_rank(partial(call, verify, "ds-longft verify"))
