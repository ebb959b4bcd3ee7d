"""One tiny job, one server of ranks and one uninterrupted run for all fault tests; worker pools for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.assets import write_job
from tests.faults.ranks import Launcher

__all__ = ["golden", "launcher"]


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts runs of the tiny job."""
    launcher = Launcher(write_job(tmp_path_factory.mktemp("job")))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def golden(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing happened to."""
    output = tmp_path_factory.mktemp("golden") / "out"
    codes, run = launcher.run(output)
    assert codes == [0, 0], run.text()
    return output
