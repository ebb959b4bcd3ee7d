"""Two hosts that lose each other: network namespaces joined by a veth pair, two ranks in each, the link cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.ranks import Launcher, Run, checkpoints, reached, trace

KEYS = ("--train.gradient_accumulation_steps", "1", "--train.hang_minutes", "0.15", "--sp", "2")


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def why_not() -> str | None:
    """Why there can be no namespaces here; None: there can."""
    if os.getuid():
        return "needs root"
    if shutil.which("ip") is None:
        return "ip is not installed (Debian: iproute2)"
    made = ip("netns", "add", "longft-try")
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}"
    ip("netns", "del", "longft-try")
    return None


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces that see each other as 10.77.0.1 and 10.77.0.2."""
    names = [f"longft-{os.getpid()}-{i}" for i in range(2)]
    links = [f"lf{os.getpid() % 100000}{i}" for i in range(2)]
    try:
        for name in names:
            assert ip("netns", "add", name).returncode == 0
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "link", "set", link, "name", "net0")
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "net0")
            ip("-n", name, "link", "set", "net0", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(launcher: Launcher, output: Path, hosts: list[str], slow: bool = False) -> Run:
    wait = {"point": "every_step", "do": "sleep", "seconds": 0.5} if slow else {}
    return launcher.start(
        output,
        *KEYS,
        world=4,
        faults={rank: {"netns": hosts[rank // 2], **wait} for rank in range(4)},
        rank_env=lambda rank: {
            "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1",
            "GLOO_SOCKET_IFNAME": "net0",
        },
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(why_not() is not None, reason=f"no namespaces here: {why_not()}")
def test_link_cut(launcher: Launcher, hosts: list[str], tmp_path: Path) -> None:
    expected, output = tmp_path / "expected", tmp_path / "out"
    run = start(launcher, expected, hosts)
    assert run.wait(120) == [0, 0, 0, 0], run.text()

    run = start(launcher, output, hosts, slow=True)
    run.wait_for(lambda: reached(output) >= 3, 120)
    ip("-n", hosts[1], "link", "set", "net0", "down")
    cut = time.monotonic()
    codes = run.wait(120)
    took = time.monotonic() - cut
    assert all(code not in (0, None) for code in codes), run.text()
    assert 71 in codes, "nothing tells the ranks but time"
    assert took < 60
    assert checkpoints(output)

    ip("-n", hosts[1], "link", "set", "net0", "up")
    run = start(launcher, output, hosts)
    assert run.wait(120) == [0, 0, 0, 0], run.text()
    assert "resumed from" in run.text(0)
    assert trace(output) == trace(expected)
