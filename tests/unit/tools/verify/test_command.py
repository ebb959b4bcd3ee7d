"""`ds-longft verify` refuses what no rank could work with before it starts one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ds_longft.command_line import call
from ds_longft.errors import ConfigError
from ds_longft.tools.verify import command
from tests.distributed.user_files import user_config


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of a model with 4 query heads, on a machine where nothing is started."""
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "visible_gpus", lambda: 0)
    monkeypatch.setattr(command, "launch_ranks", lambda module, argv, *, ranks, gpus: ranks)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(user_config(tmp_path)))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--sp 5", "sp is 5, but the model has 4 query heads .* with 4 ranks 4"),
        ("--sp 2 --ranks 3", "--ranks is 3, sp is 2: give 2 ranks or a multiple of it"),
        ("--sp 4 --ranks 2", "--ranks is 2, sp is 4: give 4 ranks or a multiple of it"),
        ("--sp 2 --model.path nowhere/at/all", "model.path: there is no nowhere/at/all"),
    ],
)
def test_refused_before_a_rank_is_started(run_yaml: str, flags: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        call(command.verify, "ds-longft verify", ["--config", run_yaml, *flags.split()])


@pytest.mark.parametrize(("flags", "ranks"), [("--sp 3", 3), ("--sp 2 --ranks 4", 4), ("", 2)])
def test_what_fits_is_started(run_yaml: str, flags: str, ranks: int) -> None:
    assert call(command.verify, "ds-longft verify", ["--config", run_yaml, *flags.split()]) == ranks
