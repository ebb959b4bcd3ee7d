"""`python -m tests.distributed.write_models [TYPE ...]`: walks all model types, or some of them, and writes what was found
to `ds_longft/config/proved.json`, each as it is found; `make docs` makes docs/models.md of it. A quarter of an hour for all.
Begun again at the same commit it goes on with those that it had not come to.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ds_longft.config.proof import proofs
from tests.distributed.pool import WorkerPool
from tests.distributed.walk import PROVED_FILE, find
from tests.unit.sequence.zoo import model_types

VERSIONS = ("transformers", "torch", "peft")
WALKED = Path(".cache/walked.json")
"""What a walk that was stopped had found, and its commit."""


def main(asked: list[str]) -> None:
    """Types that were not asked for keep what was found of them; those that transformers no longer has go."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=True, text=True).stdout.strip()
    begun = json.loads(WALKED.read_text(encoding="utf-8")) if WALKED.exists() else {}
    here = begun["types"] if begun.get("commit") == commit else {}
    types, pool = {name: proofs()["types"].get(name) for name in model_types()}, WorkerPool(2)
    for name in types:
        if name in asked or not asked:
            if name in asked or name not in here:
                here[name] = find(pool, name)
                print(name, here[name], flush=True)
                _write(WALKED, {"commit": commit, "types": here})
            types[name] = here[name]
            _write(PROVED_FILE, _content({name: entry for name, entry in types.items() if entry is not None}))
    pool.stop()


def _content(types: dict[str, dict[str, str | float] | None]) -> dict[str, object]:
    return {
        "written": str(datetime.datetime.now(datetime.UTC).date()),
        "versions": {name: version(name).partition("+")[0] for name in VERSIONS},
        "types": types,
    }


def _write(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
