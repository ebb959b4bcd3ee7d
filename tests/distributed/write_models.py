"""`python -m tests.distributed.write_models [TYPE ...]`: walks all model types, or some of them, and writes what was found
to `ds_longft/config/proved.json`; `make docs` makes docs/models.md of it. A quarter of an hour for all.
"""

from __future__ import annotations

import datetime
import json
import sys
from importlib.metadata import version

from ds_longft.config.proof import proofs
from tests.distributed.pool import WorkerPool
from tests.distributed.walk import PROVED_FILE, walk
from tests.unit.sequence.zoo import model_types

VERSIONS = ("transformers", "torch", "peft")


def main(asked: list[str]) -> None:
    """Types that were not asked for keep what was found of them."""
    found = {name: entry for name, entry in proofs()["types"].items() if asked and name not in asked}
    pool = WorkerPool(2)
    for name in asked or model_types():
        found[name] = pool.run(walk, name)[0]
        print(name, found[name], flush=True)
    pool.stop()
    content = {
        "written": str(datetime.datetime.now(datetime.UTC).date()),
        "versions": {name: version(name).partition("+")[0] for name in VERSIONS},
        "types": dict(sorted(found.items())),
    }
    PROVED_FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
