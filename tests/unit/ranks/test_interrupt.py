"""Every way to ask for a stop: noted at once, also while the main thread is busy; a second Ctrl-C is obeyed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_longft.ranks import interrupt
from ds_longft.ranks.interrupt import SAME_PRESS_S, StopRequest, launchers
from tests.unit.ranks.test_launch import alive


def until(ready: Callable[[], object], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(ready())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    usual = signal.signal(number, signal.SIG_DFL)  # under nohup the tests' own process ignores SIGHUP
    stop, heard = StopRequest(), list[str]()
    stop.training_begun, stop.heard = True, heard.append
    try:
        with stop.listening():
            os.kill(os.getpid(), number)
            assert until(lambda: heard)
            assert heard == [stop.reason]
            assert stop.reason == f"signal {number.name}"
            assert stop.asked()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, usual)


def test_nohup_is_respected() -> None:
    """A run started by nohup goes on when the terminal is closed, and one in the background of a script over Ctrl-C."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        stop.training_begun = True
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert stop.reason is None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_one_press_saves_and_a_second_one_ends_at_once() -> None:
    """The terminal and the launcher both hand on the same press: within a moment it counts once."""
    clock, ended = Clock(), []
    stop = StopRequest(clock)
    stop.joined = stop.training_begun = True
    stop.at_once = lambda *said: ended.append(said)
    stop.note(signal.SIGINT)
    clock.now += SAME_PRESS_S / 2
    stop.note(signal.SIGINT)
    stop.note(signal.SIGTERM)  # what launchers send after it
    assert ended == []
    assert stop.asked()
    clock.now += SAME_PRESS_S
    stop.note(signal.SIGINT)
    assert len(ended) == 1


def test_a_press_before_training_has_nothing_to_save() -> None:
    ended: list[tuple[str, int]] = []
    stop = StopRequest()
    stop.joined, stop.at_once = True, lambda *said: ended.append(said)
    stop.note(signal.SIGTERM)
    assert ended == []
    stop.note(signal.SIGINT)
    assert ended == [("interrupted before training began", 130)]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)],
)
def test_before_the_ranks_have_joined_a_signal_ends_the_process(number: signal.Signals, code: int) -> None:
    """A peer that is dead would be waited for; and the TERM that follows a peer's crash is no wish to go on (75)."""
    ended: list[int] = []
    stop = StopRequest()
    stop.at_once = lambda why, code: ended.append(code)
    stop.note(number)
    assert ended == [code]


@pytest.mark.parametrize("joined", [False, True])
def test_a_launcher_that_is_gone_before_training_ends_it(joined: bool) -> None:
    """Whatever came before: with its command's terminal a rank gets HUP, and then waits for a peer that is dead."""
    ended: list[int] = []
    stop = StopRequest()
    stop.joined = True
    stop.note(signal.SIGHUP)
    stop.joined, stop.at_once = joined, lambda why, code: ended.append(code)
    stop.note_that_the_launcher_is_gone()
    assert ended == [129]
    stop.training_begun = True
    stop.note_that_the_launcher_is_gone()
    assert (ended, stop.reason) == ([129], "signal SIGHUP")


def test_the_machines_clock_may_be_set() -> None:
    """NTP after boot: an hour forward and back, and two hours back, neither stops a run early nor late."""
    clock, wall = Clock(), Clock()
    stop = StopRequest(clock, wall)
    stop.set_budget(60.0, env={})
    stop.saved(10.0)
    for jump in (3600.0, -3600.0, -7200.0):
        clock.now += 30
        wall.now += 30 + jump
        assert not stop.asked()
    assert stop.margin_s < 100
    clock.now = 1000.0 + 60 * 60 - 40
    assert stop.asked()


RANK = """
import os, signal, sys, time
from ds_longft.ranks.interrupt import StopRequest
stop = StopRequest()
stop.training_begun = True
with stop.listening(launched=True):
    print("ready", os.getpid(), flush=True)
    while not stop.asked():
        time.sleep(0.1)
    open(sys.argv[1], "w").write(stop.reason)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"


def test_a_rank_whose_launcher_was_killed_stops_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "reason"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", LAUNCHER, RANK, str(out)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline().split()[1])
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    assert until(lambda: not alive(rank), 10), "within seconds"
    assert out.read_text() == "the launcher is gone"


@pytest.mark.parametrize(
    ("commands", "watched"),
    [
        ({}, [(7, 6)]),
        ({6: "bash run.sh"}, [(7, 6)]),
        ({6: "python -m deepspeed.launcher.launch train.py", 5: "python bin/deepspeed train.py"}, [(7, 6), (6, 5)]),
        ({6: "python -m deepspeed.launcher.launch train.py", 5: "sshd: me@notty"}, [(7, 6)]),  # of another machine
        ({6: "python -m deepspeed.launcher.launch train.py", 5: "systemd --user"}, [(7, 6)]),
    ],
)
def test_who_is_watched(
    commands: dict[int, str], watched: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt.os, "getpid", lambda: 7)
    monkeypatch.setattr(interrupt, "parent_of", lambda pid: pid - 1)
    monkeypatch.setattr(interrupt, "_command_of", lambda pid: commands.get(pid, ""))
    assert launchers() == watched


TALKER = """
import os, sys, time
from ds_longft.ranks.console import outlive_the_console
outlive_the_console()
print("first", flush=True)
sys.stdin.read()
for i in range(3):
    print("nobody reads this" * 1000, flush=True)
    os.write(1, b"C code neither")
open(sys.argv[1], "w").write("still here")
"""


def test_a_console_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    """`deepspeed ... | tee log`, and Ctrl-C ends tee first; a closed terminal gives the same error."""
    out = tmp_path / "out"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", TALKER, str(out)]
    talker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert talker.stdout is not None
    assert talker.stdin is not None
    talker.stdout.readline()
    talker.stdout.close()
    talker.stdin.close()
    assert talker.wait(30) == 0
    assert out.read_text() == "still here"


def test_another_encoding_is_left_for_utf8() -> None:
    """As under LC_ALL=zh_CN.GBK; ASCII is there on every machine."""
    program = (
        "import sys; from ds_longft.ranks.console import speak_utf8; speak_utf8(); print(sys.flags.utf8_mode, sys.argv)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "LC_ALL": "C"}
    env |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", program, "长"], env=env, capture_output=True, check=False)
    assert done.stdout.decode() == "1 ['-c', '长']\n", done.stderr
