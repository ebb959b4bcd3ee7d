"""F22, F23, F24, F26, F30: who may write where, what may be written, and what a dead tracker does (nothing)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ConfigError
from ds_longft.ranks.lock import lock_folder
from ds_longft.train.secrets import redact, tracked_config
from tests.faults.ranks import Launcher, checkpoints, status, trace

CANARY = "hf_canary0123456789"
SECRETS = {
    "HF_TOKEN": CANARY,
    "WANDB_API_KEY": CANARY + "w",
    "OPENAI_API_KEY": CANARY + "o",
    "MY_PASSWORD": CANARY + "p",
}


def test_secrets_odd_paths_and_a_strict_umask(launcher: Launcher, golden: Path, tmp_path: Path) -> None:
    """F24 and F30 in one run: tokens in the environment, a symlink to a folder with an odd name, umask 077."""
    real = tmp_path / "a run with spaces, ünïcode 长"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real, target_is_directory=True)
    strict = {"umask": 0o077}
    codes, run = launcher.run(link, "--log.wandb", "offline", env=SECRETS, faults={0: strict, 1: strict}, timeout_s=120)
    assert codes == [0, 0], run.text()
    assert trace(real) == trace(golden)
    assert checkpoints(real) == [6, 8]
    assert stat.S_IMODE((real / "checkpoint-8").stat().st_mode) == 0o700
    written = [p for p in [*real.rglob("*"), *run.outs] if p.is_file()]
    assert len(written) > 30
    assert any("wandb" in str(p) for p in written)
    assert [str(p) for p in written if CANARY.encode() in p.read_bytes()] == []


def test_secrets_in_an_error(launcher: Launcher, tmp_path: Path) -> None:
    output = tmp_path / "out"
    codes, run = launcher.run(output, "--data.chat_template", f"https://user:{CANARY}@host/t.jinja", env=SECRETS)
    assert codes == [64, 64]
    assert CANARY not in run.text()


@pytest.mark.parametrize(
    "name", ["PGPASSWORD", "GITHUB_PAT", "DB_PASS", "SLURM_JWT", "TOKEN_HF", "AWS_SECRET_ACCESS_KEY"]
)
def test_names_of_secrets(name: str) -> None:
    assert redact(f"a {CANARY} b", {name: CANARY + "\n"}) == "a [redacted] b", "a file of a secret ends in a line break"
    assert redact("a bananananana b", {"MONKEY": "bananananana", "PASSAGE": "bananananana"}) == "a bananananana b"


@pytest.mark.parametrize("login", ["me", "me:pw", "me:p/w", "me:p@w", "me:p@/w:d"])
def test_logins_in_urls(login: str) -> None:
    for url in (
        f"https://{login}@hub.com/x",
        f"'https://{login}@hub.com'",
        f"see https://{login}@hub.com:80?q and more",
    ):
        assert redact(url, {}) == url.replace(login, "[redacted]")
    assert redact("https://hub.com/x and mail a@b.com", {}) == "https://hub.com/x and mail a@b.com"


def test_redact() -> None:
    env = {"HF_TOKEN": CANARY, "NUM_TOKENS": "4096000000", "SSH_KEY": "short"}
    assert redact(f"a {CANARY} b https://me:pw@hub/x 4096000000 short", env) == (
        "a [redacted] b https://[redacted]@hub/x 4096000000 short"
    )


def test_tracker_gets_chosen_keys() -> None:
    config = RunConfig.model_validate(
        {"output_dir": "/secret/place", "data": {"train": ["https://u:pw@host/rows.jsonl"]}}
    )
    tracked = tracked_config(config, {"world": 2})
    assert "/secret/place" not in str(tracked)
    assert "cache_dir" not in str(tracked)
    assert tracked["data"]["train"] == ["https://[redacted]@host/rows.jsonl"]
    assert tracked["optim"]["learning_rate"] == config.optim.learning_rate


@pytest.mark.parametrize("when", ["init", "log"])
def test_dead_tracker(launcher: Launcher, golden: Path, tmp_path: Path, when: str) -> None:
    """F23."""
    output = tmp_path / "out"
    codes, run = launcher.run(output, "--log.wandb", "online", faults={0: {"point": "dead_tracker", "when": when}})
    assert codes == [0, 0], run.text()
    assert trace(output) == trace(golden)
    assert run.text(0).count("tracker is down") == 1


def test_two_runs_in_one_folder(launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F26: the second refuses and names the first; a killed holder leaves no lock behind."""
    output = tmp_path / "out"
    slow = {"point": "every_step", "do": "sleep", "seconds": 30}
    run = launcher.start(output, faults={0: slow, 1: slow})
    run.wait_for((output / "run_status.json").exists)
    with pytest.raises(ConfigError, match=f"in use by process {run.processes[0].pid} on "):
        lock_folder(output, patience_s=0.5)
    run.kill()
    lock_folder(output, patience_s=5.0).release()


def test_ranks_that_differ(launcher: Launcher, tmp_path: Path) -> None:
    """F22: another learning rate and another setting of the mathematics on rank 1."""
    codes, run = launcher.run(
        tmp_path / "out",
        rank_keys=lambda rank: ["--optim.learning_rate", "0.5"] if rank else [],
        rank_env=lambda rank: {"NVIDIA_TF32_OVERRIDE": str(rank)},
    )
    assert codes == [64, 64]
    assert "the run config: rank 0 has" in run.text(0)
    assert "the environment variable NVIDIA_TF32_OVERRIDE: rank 0 has 0, rank 1 has 1" in run.text(0)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_unwritable_output(launcher: Launcher, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    codes, _ = launcher.run(tmp_path / "out")
    assert codes == [64, 64]


def test_status_of_a_good_run(golden: Path) -> None:
    assert status(golden)["exit_code"] == 0
    assert status(golden)["first_step"] == 0
