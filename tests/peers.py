"""Other trainers' files, which tests compare with: TRL is installed, Axolotl lies beside, without what it needs to run."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def trl_folder() -> Path:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def axolotl_folder() -> Path:
    """`launch/setup.sh` puts it into .venv/peers; DS_LONGFT_TEST_PEERS names another folder."""
    folder = Path(os.environ.get("DS_LONGFT_TEST_PEERS", Path(sys.prefix) / "peers")) / "axolotl"
    if not folder.is_dir():
        pytest.skip("no axolotl: pip install --no-deps --target .venv/peers axolotl==0.19.0")
    return folder
