"""F28 and SLURM: the batch scripts, the decision to go on, and a real SLURM that signals, requeues and finishes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from ds_longft.errors import ConfigError
from ds_longft.tools.slurm.render import fill, limit_s
from ds_longft.tools.slurm.requeue import decide
from tests.faults import slurm_cluster
from tests.faults.assets import write_job
from tests.faults.ranks import Launcher, checkpoints, reached, status, trace

ONE = {
    "nodes": 1, "gpus_per_node": 2, "time": "1:00:00", "partition": None, "account": None, "signal_s": 60,
    "max_crashes": 2, "cpus_per_gpu": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("slurm"))


def test_one_node(config: Path) -> None:
    script = fill(str(config), **{**ONE, "device": "cuda", "partition": "long"})
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "@" not in script.replace("USR2@60", "").replace('"$@"', "")
    for line in (
        "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00:00", "--signal=USR2@60", "--requeue",
        "--open-mode=append", "--partition=long",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH {re.escape(line)}$", script, re.MULTILINE), line
    assert script.index("#SBATCH --output") < script.index("set -uo pipefail"), "sbatch reads until the first command"


def test_several_nodes(config: Path) -> None:
    script = fill(str(config), **{**ONE, "nodes": 2})
    assert "scontrol show hostnames" in script
    assert "--distribution=block" in script


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nodes": 0}, "--nodes is 0"),
        ({"time": "a day"}, "--time is 'a day'"),
        ({"time": "00:04:00", "signal_s": 300}, "--signal_s is 300, not less than --time"),
        ({"account": "mine\n#SBATCH --exclusive"}, "--account is "),
        ({"partition": "a b"}, "--partition is 'a b'"),
        ({"max_crashes": -1}, "--max_crashes is -1"),
        ({"gpus_per_node": 3, "nodes": 2}, "sp is 2, which does not divide the 3 GPUs of a node"),
        ({"gpus_per_node": 3}, "does not divide the world"),
    ],
)
def test_what_cannot_run_is_refused(config: Path, change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fill(str(config), **{**ONE, **change})


def changed(config: Path, folder: Path, old: str, new: str) -> Path:
    """The run config with a line of it replaced."""
    path = folder / "changed.yaml"
    text = config.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("resume", ["6", "never"])
def test_a_job_that_would_do_the_same_steps_again_is_refused(config: Path, tmp_path: Path, resume: str) -> None:
    again = changed(config, tmp_path, "\ntrain:\n", f"\ntrain:\n  resume: {resume}\n")
    with pytest.raises(ConfigError, match=f"train.resume is {resume}: every start of the job would do the same steps"):
        fill(str(again), **ONE)


@pytest.mark.parametrize("name", ["x\ntouch${IFS}PWNED\nexit", "a\tb", "a\x7fb"])
def test_control_characters_in_a_folder_are_refused(config: Path, tmp_path: Path, name: str) -> None:
    line = next(line for line in config.read_text().splitlines() if line.startswith("output_dir"))
    with pytest.raises(ConfigError, match="give a name without control characters"):
        fill(str(changed(config, tmp_path, line, f"output_dir: {json.dumps(str(tmp_path / name))}")), **ONE)


SRUN = """#!/bin/bash
printf '%s\\n' "$MASTER_PORT $LONGFT_START" >> "$CALLS"
echo "what the ranks say"
exit $(cat "$CODE")
"""


@pytest.mark.parametrize("name", ["plain", "lr5%j and %u 'quoted' $(touch PWNED)"])
def test_the_script_as_printed(config: Path, tmp_path: Path, name: str) -> None:
    """Handed to a shell as SLURM would: it makes its folder, logs there, and says after each start whether it goes on."""
    output, bins = tmp_path / name, tmp_path / "bin"
    bins.mkdir()
    for program, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" >> "$REQUEUED"\n')):
        (bins / program).write_text(text)
        (bins / program).chmod(0o755)
    line = next(line for line in config.read_text().splitlines() if line.startswith("output_dir"))
    script = fill(str(changed(config, tmp_path, line, f"output_dir: {json.dumps(str(output))}")), **ONE)
    assert all(not line.startswith("#SBATCH --output") or line.endswith("=/dev/null") for line in script.splitlines())
    env = {
        **os.environ, "PATH": f"{bins}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "CALLS": str(tmp_path / "calls"),
        "CODE": str(tmp_path / "code"), "REQUEUED": str(tmp_path / "requeued"), "PYTHONPATH": str(Path.cwd()),
    }  # fmt: skip
    for restart, (code, again) in enumerate([(75, 1), (69, 2), (64, 2)]):
        (tmp_path / "code").write_text(str(code))
        done = subprocess.run(
            ["bash", "-s"], input=script, text=True, capture_output=True, check=False, cwd=tmp_path,
            env={**env, "SLURM_RESTART_COUNT": str(restart)},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
        assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 7"] * again
    log = (output / "slurm-7.log").read_text()
    assert log.count("what the ranks say") == 3
    assert "requeued: the port was taken, another one is tried" in log
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len({port for port, _ in calls}) == 3
    assert all(20_000 <= int(port) < 32_000 for port, _ in calls)
    assert [start.rpartition(".")[0] for _, start in calls] == ["7.0", "7.1", "7.2"]
    assert not list(tmp_path.rglob("PWNED"))
    assert not list(Path.cwd().glob("PWNED"))


class Folder:
    """An output folder as a run would leave it."""

    def __init__(self, path: Path) -> None:
        self.path, self.restart = path, -1

    def start(
        self, code: int, *, first: int | None, newest: int, written: int | None = None, old: bool = False
    ) -> tuple[bool, str]:
        """One start: srun's code, the code in the status (None: killed before it could write one)."""
        self.restart += 1
        name = f"77.{self.restart - 1 if old else self.restart}"
        (self.path / f"checkpoint-{newest}").mkdir(exist_ok=True)
        (self.path / "run_status.json").write_text(
            json.dumps({"exit_code": written, "first_step": first, "start": name})
        )
        return decide(self.path, code, 2, f"77.{self.restart}")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_goes_on_after_a_planned_stop_and_not_after_the_end(folder: Folder) -> None:
    assert folder.start(75, first=0, newest=4, written=75)[0]
    assert not folder.start(0, first=4, newest=8, written=0)[0]


def test_srun_reports_a_killed_task_and_the_status_knows_better(folder: Folder) -> None:
    assert folder.start(137, first=0, newest=4, written=75)[0]
    assert not folder.start(137, first=4, newest=6, written=70)[0]


def test_never_repeats_a_mistake(folder: Folder) -> None:
    assert not folder.start(64, first=None, newest=0, written=64)[0]
    assert not folder.start(70, first=0, newest=8, written=70)[0]


def test_crash_goes_on_only_with_progress_and_at_most_so_often(folder: Folder) -> None:
    assert folder.start(137, first=0, newest=4)[0]
    assert not folder.start(137, first=4, newest=4)[0], "no step was added"
    assert folder.start(1, first=4, newest=6, written=1)[0]
    again, why = folder.start(137, first=6, newest=8)
    assert not again
    assert "at most 2" in why


def test_crash_before_training_leaves_an_old_status(folder: Folder) -> None:
    assert folder.start(137, first=0, newest=4)[0]
    assert not folder.start(137, first=0, newest=4, old=True)[0]


def test_planned_stops_without_progress_end(folder: Folder) -> None:
    again = [folder.start(75, first=4, newest=4, written=75)[0] for _ in range(5)]
    assert again == [True, True, True, False, False]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=f"no SLURM here: {slurm_cluster.why_not()}")
def test_real_slurm(launcher: Launcher, config: Path, tmp_path: Path) -> None:
    """Submit, signal, requeue, resume; crash, requeue, resume; finish, with the losses of a quiet run."""
    keys = ("--train.epochs", "10", "--train.save_every_steps", "5")
    expected = tmp_path / "expected"
    codes, run = launcher.run(expected, *keys, timeout_s=300)
    assert codes == [0, 0], run.text()
    output = tmp_path / "out"
    mine = tmp_path / "run.yaml"
    mine.write_text(
        config.read_text().replace("epochs: 2", "epochs: 10").replace("save_every_steps: 2", "save_every_steps: 5")
        .replace(re.search(r"output_dir: (.*)", config.read_text())[1], str(output))  # type: ignore[index]
    )  # fmt: skip
    with slurm_cluster.cluster(tmp_path) as slurm:
        script = tmp_path / "job.sbatch"
        script.write_text(fill(str(mine), **ONE))
        number = slurm.run("sbatch", "--parsable", str(script)).strip()

        wait_for_step(output, 6)
        slurm.run("scancel", "--signal=USR2", number)
        job = slurm.wait(number, "PENDING", 120)
        assert job["Restarts"] == "1"
        assert status(output)["exit_code"] == 75
        stopped = checkpoints(output)[-1]
        assert stopped >= 6
        restart(slurm, number)

        wait_for_step(output, stopped + 6)
        victim = status(output)["pid"]
        subprocess.run(["kill", "-9", str(victim)], check=True)
        job = slurm.wait(number, "PENDING", 120)
        assert job["Restarts"] == "2"
        restart(slurm, number)

        slurm.wait(number, "COMPLETED", 300)
        log = (output / f"slurm-{number}.log").read_text()
    assert trace(output) == trace(expected), log
    assert f"it stopped as planned; saved is step {stopped}" in log
    assert "crash 1 of at most 2" in log
    assert "not requeued: the run is complete" in log
    assert log.count("resumed from") == 2


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while reached(output) < step:
        logs = "".join(p.read_text() for p in output.glob("slurm-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def restart(slurm: slurm_cluster.Cluster, number: str) -> None:
    """Release a requeued job, held back for two minutes; in its first second the credential is still revoked."""
    time.sleep(6.0)
    deadline = time.monotonic() + 30
    while slurm.job(number)["JobState"] == "PENDING":
        subprocess.run(["scontrol", "update", f"jobid={number}", "StartTime=now"], env=slurm.env, check=False)
        assert time.monotonic() < deadline
        time.sleep(1.0)


def test_no_time_limit_leaves_room_for_the_signal(config: Path) -> None:
    assert "--time=0" in fill(str(config), **{**ONE, "time": "0"})


@pytest.mark.parametrize(
    ("time", "seconds"), [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("1-2", 93_600), ("1-2:03:04", 93_784)]
)
def test_slurm_times(time: str, seconds: int) -> None:
    assert limit_s(time) == seconds
