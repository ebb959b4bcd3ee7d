"""docs/python.md: plan, verify and train as functions: what they give, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ds_longft
from ds_longft import load_run_config, plan, train_from, verify
from ds_longft.cli import main
from ds_longft.errors import EXIT_CONFIG, ConfigError, LongftError

pytestmark = pytest.mark.timeout(900)


def test_the_package_has_them_and_says_what_it_has_not() -> None:
    assert {plan, verify, train_from, load_run_config} == {getattr(ds_longft, n) for n in ("plan", "verify", "train_from", "load_run_config")}  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'trian_from'"):
        ds_longft.trian_from  # noqa: B018


def test_plan_is_what_the_command_prints(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(job.parent / "model")
    foreseen = plan(model, gpus=2, gpu="h100-80", length=256)
    assert main(["plan", model, "--gpus", "2", "--gpu", "h100-80", "--length", "256", "--json"]) == 0
    assert foreseen == json.loads(capsys.readouterr().out)
    foreseen = plan(load_run_config(str(job)), gpus=2, gpu="h100-80")
    assert main(["plan", str(job), "--gpus", "2", "--gpu", "h100-80", "--json"]) == 0
    assert foreseen == json.loads(capsys.readouterr().out)
    with pytest.raises(ConfigError, match="a run config has keys for them"):
        plan(str(job), gpus=2, length=256)


def test_mistakes_are_raised_before_anything_starts(job: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key spp: did you mean sp"):
        train_from([str(job), "--spp", "2"])
    with pytest.raises(LongftError, match=r"no such file|nothere") as wrong:
        train_from([str(job), "--data.train", "nothere.jsonl"], ranks=1)
    assert f"exit code {EXIT_CONFIG}" in str(wrong.value)
    with pytest.raises(LongftError, match="unknown key spp"):
        verify([str(job), "--spp", "2"])
