"""Start training from a clone: `deepspeed launch/train.py recipe.yaml`. The package does the work."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from ds_longft.train.__main__ import main

    raise SystemExit(main())
