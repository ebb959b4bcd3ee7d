"""F28 and SLURM: the batch scripts, the decision to go on, and a real SLURM that signals, requeues and finishes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_longft.errors import ConfigError
from ds_longft.tools.slurm.job import Job
from ds_longft.tools.slurm.render import fill, limit_s
from ds_longft.tools.slurm.requeue import decide
from tests.faults import slurm_cluster
from tests.faults.assets import write_job
from tests.faults.processes import tree
from tests.faults.ranks import Launcher, checkpoints, reached, status, trace
from tests.faults.soak import SOAK_STEPS, Soak

ONE = {
    "nodes": 1, "gpus_per_node": 2, "time": "1:00:00", "partition": None, "account": None, "signal_s": 60,
    "max_crashes": 2, "cpus_per_gpu": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("slurm"))


def test_one_node(config: Path) -> None:
    script = fill(str(config), Job(**{**ONE, "device": "cuda", "partition": "long"}))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "@" not in script.replace("USR2@60", "").replace('"$@"', "")
    for line in (
        "--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=1:00:00", "--signal=USR2@60", "--requeue",
        "--open-mode=append", "--partition=long",
    ):  # fmt: skip
        assert re.search(rf"^#SBATCH {re.escape(line)}$", script, re.MULTILINE), line
    assert script.index("#SBATCH --output") < script.index("set -uo pipefail"), "sbatch reads until the first command"


def test_options_of_a_cluster_and_lines_before_the_start(config: Path, tmp_path: Path) -> None:
    before = tmp_path / "my env.sh"
    before.write_text('echo "$UNSET"; export SEEN=yes\n')
    script = fill(str(config), Job(**{**ONE, "sbatch": "--qos=long --mem=0 --exclusive", "before": str(before)}))
    head, _, body = script.partition("set -uo pipefail")
    assert "#SBATCH --qos=long\n#SBATCH --mem=0\n#SBATCH --exclusive\n" in head
    (line,) = [line for line in body.splitlines() if "my env.sh" in line]
    seen = subprocess.run(["bash", "-uc", f"{line}; echo $SEEN $-"], capture_output=True, text=True, check=True).stdout
    assert seen.split()[0] == "yes"
    assert "u" in seen.split()[1]


def test_several_nodes(config: Path) -> None:
    script = fill(str(config), Job(**{**ONE, "nodes": 2}))
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
        ({"sbatch": "--output=x.log"}, "--sbatch holds '--output=x.log': .*what the script sets itself"),
        ({"sbatch": "--mem=0\n#SBATCH -p x"}, "--sbatch holds '#SBATCH'"),
        ({"sbatch": "--comment='a"}, "No closing quotation"),
        ({"before": "nothere.sh"}, "--before is nothere.sh: there is no such file"),
        ({"gpus_per_node": 3, "nodes": 2}, "sp is 2, which does not divide the 3 GPUs of a node"),
        ({"gpus_per_node": 3}, "does not divide the world"),
    ],
)
def test_what_cannot_run_is_refused(config: Path, change: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fill(str(config), Job(**{**ONE, **change}))


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
        fill(str(again), Job(**ONE))


@pytest.mark.parametrize("name", ["x\ntouch${IFS}PWNED\nexit", "a\tb", "a\x7fb"])
def test_control_characters_in_a_folder_are_refused(config: Path, tmp_path: Path, name: str) -> None:
    line = next(line for line in config.read_text().splitlines() if line.startswith("output_dir"))
    with pytest.raises(ConfigError, match="give a name without control characters"):
        fill(str(changed(config, tmp_path, line, f"output_dir: {json.dumps(str(tmp_path / name))}")), Job(**ONE))


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
    script = fill(str(changed(config, tmp_path, line, f"output_dir: {json.dumps(str(output))}")), Job(**ONE))
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


real = pytest.mark.skipif(slurm_cluster.why_not() is not None, reason=f"no SLURM here: {slurm_cluster.why_not()}")
KEYS = ("--train.epochs", "10", "--train.save_every_steps", "5")


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list]:
    """What a quiet run of the job that is handed to SLURM records."""
    launcher = Launcher(config)
    output = tmp_path_factory.mktemp("expected") / "out"
    codes, run = launcher.run(output, *KEYS, timeout_s=300)
    assert codes == [0, 0], run.text()
    yield trace(output)
    launcher.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def job_of(config: Path, folder: Path, *, into: Path | None = None, **changes: Any) -> tuple[Path, Path]:
    """(output folder, batch script) of the job, with another length."""
    written = yaml.safe_load(config.read_text())
    written["output_dir"] = str(into or folder / "out")
    written["train"] |= {"epochs": 10, "save_every_steps": 5} | changes
    (folder / "run.yaml").write_text(yaml.safe_dump(written))
    script = folder / "job.sbatch"
    script.write_text(fill(str(folder / "run.yaml"), Job(**ONE)))
    return into or folder / "out", script


@pytest.mark.slow
@pytest.mark.timeout(900)
@real
def test_real_slurm(slurm: slurm_cluster.Cluster, expected: list, config: Path, tmp_path: Path) -> None:
    """Submit, signal, requeue, resume; crash, requeue, resume; finish, with the losses of a quiet run."""
    output, script = job_of(config, tmp_path)
    number = slurm.run("sbatch", "--parsable", str(script)).strip()

    wait_for_step(output, 6)
    slurm.signal(number, "USR2")
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
    assert trace(output) == expected, log
    assert f"it stopped as planned; saved is step {stopped}" in log
    assert "crash 1 of at most 2" in log
    assert "not requeued: the run is complete" in log
    assert log.count("resumed from") == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@real
def test_a_preempted_job_finishes(slurm: slurm_cluster.Cluster, expected: list, config: Path, tmp_path: Path) -> None:
    """A job of a partition before ours takes the node: TERM, saved, requeued by SLURM, gone on with when it is free."""
    output, script = job_of(config, tmp_path)
    number = slurm.run("sbatch", "--parsable", str(script)).strip()
    wait_for_step(output, 3)
    urgent = slurm.run(
        "sbatch", "--parsable", "-p", "urgent", "--exclusive", "--wrap", "sleep 5", "-o", "/dev/null"
    ).strip()
    job = slurm.wait(number, "PENDING", 120)
    assert job["Restarts"] == "1"
    assert status(output)["exit_code"] == 75
    stopped = checkpoints(output)[-1]
    slurm.wait(urgent, "COMPLETED", 120)
    restart(slurm, number)
    slurm.wait(number, "COMPLETED", 300)
    log = (output / f"slurm-{number}.log").read_text()
    assert trace(output) == expected, log
    assert f"at step {stopped}" in log


@pytest.mark.slow
@pytest.mark.timeout(900)
@real
def test_array_jobs_take_turns(slurm: slurm_cluster.Cluster, expected: list, config: Path, tmp_path: Path) -> None:
    """`--array=0-2%1` of one run: each goes on where the one before was stopped, which is requeued, too; what comes after
    the end has nothing to do. Tasks of an array that run at once in one folder: the second is refused, not requeued.
    """
    output, script = job_of(config, tmp_path)
    number = slurm.run("sbatch", "--parsable", "--array=0-2%1", str(script)).strip()
    wait_for_step(output, 3)
    (first,) = [job for job, state in slurm.array(number) if state == "RUNNING"]
    slurm.signal(first, "USR2")
    job = slurm.wait(first, "PENDING", 120)
    assert job["Restarts"] == "1"
    restart(slurm, first)
    assert slurm.wait_for_array(number, 400) == ["COMPLETED"] * 3
    logs = {path.name: path.read_text() for path in output.glob("slurm-*.log")}
    assert len(logs) == 3
    assert trace(output) == expected, logs
    assert sum(log.count("requeued: it stopped as planned") for log in logs.values()) == 1
    assert sum("not requeued: the run is complete" in log for log in logs.values()) == 3

    (tmp_path / "at once").mkdir()
    output, script = job_of(config, tmp_path / "at once")
    number = slurm.run("sbatch", "--parsable", "--array=0-1", str(script)).strip()
    assert slurm.wait_for_array(number, 400) == ["COMPLETED", "FAILED"]
    assert trace(output) == expected
    logs = {path.name: path.read_text() for path in output.glob("slurm-*.log")}
    assert sum("not requeued: exit 64" in log and "is in use by" in log for log in logs.values()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@real
def test_a_port_in_use_is_tried_again(
    slurm: slurm_cluster.Cluster, expected: list, config: Path, tmp_path: Path
) -> None:
    output, script = job_of(config, tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        text = script.read_text()
        assert text.count("&& export MASTER_PORT\n") == 1
        first = f'[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] && MASTER_PORT={port}\n'
        script.write_text(text.replace("&& export MASTER_PORT\n", f"&& export MASTER_PORT\n{first}"))
        number = slurm.run("sbatch", "--parsable", str(script)).strip()
        job = slurm.wait(number, "PENDING", 120, restarts="1")
    assert job["Restarts"] == "1"
    restart(slurm, number)
    slurm.wait(number, "COMPLETED", 300)
    log = (output / f"slurm-{number}.log").read_text()
    assert f"port {port} is in use" in log
    assert "requeued: the port was taken, another one is tried; saved is step 0" in log
    assert trace(output) == expected, log


def processes_of_job(folder: Path) -> dict[str, list[int]]:
    """Living processes of the job by what they are."""
    found: dict[str, list[int]] = {}
    for pid, words in tree(folder).items():
        if "ds_longft.train " in words:
            found.setdefault("srun" if words.startswith("srun") else "rank", []).append(pid)
    for pid, words in tree(Path("slurm_script")).items():
        if words.startswith("/bin/bash"):
            found.setdefault("script", []).append(pid)
    if "srun" in found:  # it has a child, which hands nothing on
        found["srun"] = [min(found["srun"])]
    return found


@pytest.mark.slow
@pytest.mark.timeout(0)
@real
def test_soak_under_slurm(
    slurm: slurm_cluster.Cluster, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `test_launchers.py::test_soak`: signals to ranks, srun and the batch script. SLURM starts the job again, or,
    where it says why not, the test does.
    """
    soak, dice = Soak("slurm", capsys), random.Random(int(os.environ.get("SOAK_SEED", "0")))
    jobs: dict[Path, str] = {}

    def job(folder: Path) -> str:
        """The job that trains there, handed in if there is none."""
        if folder not in jobs:
            folder.mkdir(exist_ok=True)
            script = job_of(config, folder, epochs=1000, max_steps=SOAK_STEPS, into=folder)
            jobs[folder] = slurm.run("sbatch", "--parsable", str(script[1])).strip()
        return jobs[folder]

    def finish(folder: Path) -> None:
        slurm.wait(job(folder), "COMPLETED", 1200)

    def one_round(folder: Path) -> None:
        number = job(folder)
        if not soak.moment(folder, dice, lambda: slurm.job(number)["JobState"] in ("PENDING", "RUNNING")):
            return
        found = processes_of_job(folder)
        if not found:
            return
        kind = dice.choice(sorted(found))
        # Not INT: srun asks for a second one, and a script waits for what it runs.
        what = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2])
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(found[kind]), what)
        state = ended(slurm, number, 200)
        assert state != "COMPLETED" or reached(folder) == SOAK_STEPS, (kind, what)
        deadline = time.monotonic() + 60
        while left := processes_of_job(folder):
            assert time.monotonic() < deadline, left
            time.sleep(0.3)
        soak.note(f"{what.name} to {kind}: {'requeued' if state == 'PENDING' else state}", reached(folder))
        if state == "PENDING":
            restart(slurm, number)
        elif state != "COMPLETED":
            del jobs[folder]

    soak.run(tmp_path / "runs", one_round, finish)


def ended(slurm: slurm_cluster.Cluster, number: str, timeout_s: float) -> str:
    """The state of a job when nothing of it runs any more."""
    deadline = time.monotonic() + timeout_s
    while (state := slurm.job(number)["JobState"]) in ("RUNNING", "COMPLETING", "CONFIGURING"):
        assert time.monotonic() < deadline, state
        time.sleep(0.3)
    return state


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while reached(output) < step:
        logs = "".join(p.read_text() for p in output.glob("slurm-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def restart(slurm: slurm_cluster.Cluster, number: str) -> None:
    """Release a requeued job, held back for two minutes; in its first second the credential is still revoked."""
    time.sleep(6.0)
    deadline = time.monotonic() + 200  # of an array one at a time: another may have its turn first
    while slurm.job(number)["JobState"] == "PENDING":
        subprocess.run(["scontrol", "update", f"jobid={number}", "StartTime=now"], env=slurm.env, check=False)
        assert time.monotonic() < deadline
        time.sleep(1.0)


def test_no_time_limit_leaves_room_for_the_signal(config: Path) -> None:
    assert "--time=0" in fill(str(config), Job(**{**ONE, "time": "0"}))


@pytest.mark.parametrize(
    ("time", "seconds"), [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("1-2", 93_600), ("1-2:03:04", 93_784)]
)
def test_slurm_times(time: str, seconds: int) -> None:
    assert limit_s(time) == seconds
