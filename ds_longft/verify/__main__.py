"""`python -m ds_longft.verify`, and under a launcher `deepspeed --module ds_longft.verify --config my.yaml`."""

from __future__ import annotations

import os
import sys

from ds_longft.errors import LongftError
from ds_longft.train.ranks import Launch
from ds_longft.verify.command import main

if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except LongftError as error:
        if Launch.from_environment().local_rank == 0:
            print(f"\n{error}\n", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    if code and "RANK" in os.environ:
        os._exit(code)  # an ordinary exit can wait forever on the peers of an open process group
    raise SystemExit(code)
