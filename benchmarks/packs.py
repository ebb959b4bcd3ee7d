"""How full packs are, how evenly they load the ranks, and how long planning takes: one JSON line for each number.

python benchmarks/packs.py
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ds_longft.data.pack_plan import Packing, plan_epoch

PACKINGS: tuple[Packing, ...] = ("best_fit", "sorted", "none")


def longalign_like(rows: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths as LongAlign-10k describes them: 8K to 64K, most below 24K."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(16_000), 0.55, rows))
    return np.clip(lengths, 8000, 65536).astype(np.int64)


def measure() -> Iterator[tuple[str, float, str]]:
    """(what, value, unit)."""
    short = (np.exp(np.random.default_rng(1).normal(6, 1, 10_000)) + 16).astype(np.int64)
    sets = {
        "LongAlign-like": longalign_like(10_000),
        "with as many chats": np.concatenate([longalign_like(10_000), short]),
    }
    for name, lengths in sets.items():
        for packing in PACKINGS:
            plan = plan_epoch(lengths, budget_tokens=65536, dp=8, accumulation=1, seed=0, epoch=0, packing=packing)
            yield f"fill 65536 {packing}, {name}", float(plan.pack_tokens.sum() / (len(plan.packs) * 65536)), "share"
            yield f"costliest of 8 ranks over the mean, {packing}, {name}", float(plan.imbalance().mean()), "ratio"
    million = np.clip(np.exp(np.random.default_rng(0).normal(7, 1.2, 1_000_000)), 16, 131072).astype(np.int64)
    for packing in PACKINGS:
        start = time.process_time()
        plan_epoch(million, budget_tokens=131072, dp=8, accumulation=1, seed=0, epoch=0, packing=packing)
        yield f"plan of 1,000,000 rows, {packing}", time.process_time() - start, "s CPU"


def main() -> None:
    """Print them."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    same = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"one CPU core, {platform.machine()}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "command": "python benchmarks/packs.py",
    }
    for what, value, unit in measure():
        print(json.dumps({**same, "what": what, "value": round(value, 4), "unit": unit}), flush=True)


if __name__ == "__main__":
    main()
