"""A SLURM of one machine for the length of a test: munged, slurmctld and slurmd, all of it in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch")


def why_not() -> str | None:
    """Why no SLURM can be started here; None: it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm munge)"
    return None if os.getuid() == 0 else "needs root"


class Cluster:
    """Commands of a running SLURM."""

    def __init__(self, conf: Path) -> None:
        self.env = {**os.environ, "SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin"}

    def run(self, *words: str) -> str:
        """Output of a SLURM command."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(w.split("=", 1) for w in self.run("scontrol", "show", "job", number).split() if "=" in w)

    def wait(self, number: str, state: str, timeout_s: float, *, restarts: str = "") -> dict[str, str]:
        """Until the job is in that state, after so many restarts."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] != state or restarts not in ("", job["Restarts"]):
            words = f"job is {job['JobState']} ({job.get('Reason')}), not {state}"
            assert time.monotonic() < deadline, words
            assert job["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED"), words
            time.sleep(0.5)
        return job

    def signal(self, number: str, name: str) -> None:
        """To the ranks of a job. scancel repeats it, and may find the job at its end then, which is no failure."""
        subprocess.run(["scancel", f"--signal={name}", number], env=self.env, timeout=300, check=False)

    def array(self, number: str) -> list[tuple[str, str]]:
        """(id, state) of each job of an array."""
        jobs = self.run("scontrol", "-o", "show", "job", number).splitlines()
        fields = [dict(w.split("=", 1) for w in job.split() if "=" in w) for job in jobs]
        return [(f"{f['ArrayJobId']}_{f['ArrayTaskId']}", f["JobState"]) for f in fields]

    def wait_for_array(self, number: str, timeout_s: float) -> list[str]:
        """States of its jobs when none is waiting or running."""
        deadline = time.monotonic() + timeout_s
        while {"PENDING", "RUNNING", "COMPLETING"} & {state for _, state in self.array(number)}:
            assert time.monotonic() < deadline, self.array(number)
            time.sleep(0.5)
        return sorted(state for _, state in self.array(number))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start it, wait until the node is idle, stop it by the ids of its processes."""
    host = socket.gethostname()
    conf = folder / "slurm.conf"
    cpus = max(8, os.cpu_count() or 2)  # said to be there, so that two jobs run at once
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
MessageTimeout=100
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10
"""
    )
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    for parent in (folder, *folder.parents):  # munged runs as a user of its own, and slurmctld reads its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    for path in (folder / "munge", key):
        shutil.chown(path, "munge", "munge")
    key.chmod(0o400)
    (folder / "munge").chmod(0o755)
    made = Cluster(conf)
    socket_path = folder / "munge" / "socket"
    commands = [
        ["munged", "-F", "--force", f"--key-file={key}", f"--socket={socket_path}", f"--pid-file={folder}/munge/pid",
         f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        ["slurmd", "-D", "-c", "-f", str(conf)],
    ]  # fmt: skip
    processes = []
    try:
        for i, command in enumerate(commands):
            user = {"user": "munge", "group": "munge"} if i == 0 else {}
            log = open(folder / f"{command[0]}.out", "wb") if i else subprocess.DEVNULL  # noqa: SIM115
            processes.append(subprocess.Popen(command, env=made.env, stdout=log, stderr=log, **user))  # type: ignore[call-overload]
            time.sleep(1.0)
        deadline = time.monotonic() + 60
        while (
            "idle"
            not in subprocess.run(
                ["sinfo", "-h", "-o", "%t"], env=made.env, capture_output=True, text=True, check=False
            ).stdout
        ):
            assert time.monotonic() < deadline, (folder / "ctld.log").read_text()[-3000:]
            time.sleep(0.5)
        yield made
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in reversed(processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
