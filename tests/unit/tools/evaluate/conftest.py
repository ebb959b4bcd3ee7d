"""What the tests of evaluations share: a model that none of them changes, and a command on ranks that are there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.distributed.pool import WorkerPool
from tests.unit.tools.evaluate.test_needle import tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, window 4096."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def command(rank: int, world: int, argv: list[str]) -> tuple[int, str]:
    """Its exit code and what it printed, on this rank as under a launcher."""
    from ds_longft.cli import main

    printed = io.StringIO()
    # the ranks live on, and so does what joins them
    with patch("torch.distributed.destroy_process_group"), contextlib.redirect_stdout(printed):
        return main(argv), printed.getvalue()


@pytest.fixture
def on_two_ranks(pools: Callable[[int], WorkerPool]) -> Callable[[list[str]], None]:
    """Run a command with --gpus 2 or --sp 2 without starting processes for it, ten seconds each: that is tested once."""

    def run(argv: list[str]) -> None:
        (code, printed), (other_code, nothing) = pools(2).run(command, argv)
        assert (code, other_code) == (0, 0)
        assert printed
        assert not nothing, "rank 0 alone shows a result"

    return run
