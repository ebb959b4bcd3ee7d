"""Trackers: each library for real where it is installed, and none that the training waits for."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_longft.config.run_config import LogConfig
from ds_longft.train import trackers
from ds_longft.train.metrics import Records
from ds_longft.train.trackers import Background, TrackedRun, Wandb, chosen
from tests.unit.train.test_metrics import record


def run_in(folder: Path) -> TrackedRun:
    return TrackedRun("abcd1234", "project", "name", folder, {"seed": 1, "model": {"path": "m"}})


class Fake:
    """A tracker that does what it is told at one place."""

    def __init__(self, where: str, what: str) -> None:
        self.where, self.what, self.seen, self.over = where, what, [], threading.Event()

    def _at(self, where: str) -> None:
        if where == self.where:
            if self.what == "hang":
                self.over.wait(60)
            elif self.what == "exit":
                sys.exit(3)
            else:
                raise ConnectionError("tracker is down")

    def start(self, run: TrackedRun) -> None:
        self._at("start")

    def log(self, record: dict[str, Any]) -> None:
        self._at("log")
        self.seen.append(record)

    def finish(self) -> None:
        self._at("finish")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
@pytest.mark.parametrize("what", ["raise", "hang", "exit"])
def test_nobody_waits_for_a_tracker(tmp_path: Path, where: str, what: str) -> None:
    said: list[str] = []
    fake = Fake(where, what)
    begun = time.monotonic()
    tracker = Background("fake", fake, run_in(tmp_path), said.append)
    for step in range(100):
        tracker.log({"step": step})
    assert time.monotonic() - begun < 1
    tracker.finish(patience_s=0.5)
    assert time.monotonic() - begun < 3
    assert len(said) == 1, "said, and once"
    assert said[0].startswith("fake is lost (")
    fake.over.set()


def test_a_tracker_gets_every_record_in_order(tmp_path: Path) -> None:
    said: list[str] = []
    fake = Fake("", "")
    tracker = Background("fake", fake, run_in(tmp_path), said.append)
    for step in range(500):
        tracker.log({"step": step, "loss": 1.0, "mfu": None})
    tracker.finish()
    assert fake.seen == [{"step": step, "loss": 1.0} for step in range(500)]
    assert said == []


def test_a_tracker_too_far_behind_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "WAITING_MAX", 5)
    said: list[str] = []
    fake = Fake("start", "hang")
    tracker = Background("fake", fake, run_in(tmp_path), said.append)
    for step in range(50):
        tracker.log({"step": step})
    assert len(said) == 1
    assert "5 records behind" in said[0]
    fake.over.set()


def test_wandb_without_a_login_is_said_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask at the terminal, under the progress bar, and wait."""
    fake = SimpleNamespace(login=lambda prompt, verify: prompt or verify, init=lambda **_: pytest.fail("it asked"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(RuntimeError, match="not logged in: run `wandb login`"):
        Wandb("online").start(run_in(tmp_path))


def test_which_trackers() -> None:
    assert LogConfig().tracker_names == []
    assert LogConfig(wandb="offline").tracker_names == ["wandb"]
    both = LogConfig(wandb="offline", trackers=["tensorboard", "wandb"])
    assert both.tracker_names == ["tensorboard", "wandb"]
    made = chosen(both)["wandb"]
    assert isinstance(made, Wandb)
    assert made.mode == "offline"
    alone = chosen(LogConfig(trackers=["wandb"]))["wandb"]
    assert isinstance(alone, Wandb)
    assert alone.mode == "online"


PROGRAM = """
import sys
from pathlib import Path
from ds_longft.config.run_config import LogConfig
from ds_longft.train.metrics import Records
from tests.unit.train.test_metrics import record
folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
run_id = None
for first in (0, 2):  # the second start repeats step 3
    records = Records(folder, LogConfig(trackers=names, wandb="offline" if "wandb" in names else "off"), total_steps=9,
                      first_step=first, active=True)
    run_id = records.start_trackers(run_id, {"seed": 1, "optim": {"learning_rate": 1e-4}})
    for step in range(first + 1, first + 4):
        records.step(record(step, 1.0 / step))
    records.close()
    assert not any(tracker.lost for tracker in records.trackers), names
"""


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio", "mlflow"])
def test_the_library_itself(tmp_path: Path, name: str) -> None:
    """Two starts of a run; nothing is told of the command line, the machine or its folders."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    root = Path(__file__).parents[3]
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path[1:])]), "HOME": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), name, "--secret", "https://me:CANARYARG@host/x"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is lost" not in done.stdout
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("metrics.jsonl", "loss.png")]
    assert written
    assert [str(p) for p in written if b"CANARYARG" in p.read_bytes()] == []
    if name == "wandb":
        host = rb"(?<!\w)" + re.escape(os.uname().nodename.encode()) + rb"(?!\w)"  # a short one is part of random ids
        assert [str(p) for p in tmp_path.rglob("run-*.wandb") if re.search(host, p.read_bytes())] == []
        assert len({p.stem for p in tmp_path.rglob("run-*.wandb")}) == 1, "the run id is kept"


def test_records_without_trackers_start_none(tmp_path: Path) -> None:
    records = Records(tmp_path, LogConfig(), total_steps=1, first_step=0, active=True)
    assert records.start_trackers(None, {}) is None
    records.step(record(1, float("nan")))
    records.close()
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
