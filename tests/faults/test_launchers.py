"""B: whoever stops a run, by whatever process of the tree, under the launchers that users have: saved, and nothing left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.faults.assets import write_job
from tests.faults.processes import tree
from tests.faults.ranks import checkpoints, reached, status
from tests.faults.soak import SOAK_STEPS, Soak

ROOT = Path(__file__).resolve().parents[2]
LONG = ("--train.epochs", "1000", "--train.save_every_steps", "null", "--train.eval_every_steps", "null")
SECONDS = 25.0  # for a stop of a tiny run, on a busy machine


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("launchers"))


def process_of(output: Path, words: str, without: str = "\0") -> int:
    """The one process whose command has these words."""
    (pid,) = [pid for pid, command in tree(output).items() if words in command and without not in command]
    return pid


def _as_in_a_terminal() -> None:
    """A terminal of its own, and no signal that is ignored: a test started with `&` in a script would hand that on."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """A command in a terminal of its own, as a user has it."""

    def __init__(self, command: list[str], cwd: Path = ROOT, log: Path | None = None) -> None:
        self.master, slave = pty.openpty()
        self.command = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
            preexec_fn=_as_in_a_terminal,  # noqa: PLW1509
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(self.master, False)
        self.said = ""

    def read(self) -> str:
        """What it has printed; read on, or the terminal is full and the command waits."""
        try:
            while data := os.read(self.master, 65536):
                self.said += data.decode(errors="replace")
        except OSError:
            pass
        return self.said

    def wait_for(self, ready: Callable[[], object], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not ready():
            self.read()
            assert time.monotonic() < until, self.said[-3000:]
            time.sleep(0.1)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """Nothing of a failed test is left running."""
    folder = tmp_path / "a run"
    yield folder
    for pid in tree(folder):
        os.kill(pid, signal.SIGKILL)


def command_of(launcher: str, config: Path, output: Path) -> list[str]:
    keys = ["--config", str(config), "--output_dir", str(output), *LONG]
    program = str(Path(sys.executable).with_name(launcher))
    if launcher == "deepspeed":
        return [program, "--num_gpus", "2", "--master_port", str(free_port()), "launch/train.py", *keys]
    if launcher == "torchrun":
        return [program, "--nproc-per-node", "2", "--master-port", str(free_port()), "launch/train.py", *keys]
    if launcher == "train":
        return [str(Path(sys.executable).with_name("ds-longft")), "train", *keys[1:], "--gpus", "2"]
    return ["bash", str(ROOT / "launch" / "local.sh"), *keys]


def press(terminal: Terminal, output: Path) -> None:
    os.write(terminal.master, b"\x03")


def close(terminal: Terminal, output: Path) -> None:
    os.close(terminal.master)


def term_command(terminal: Terminal, output: Path) -> None:
    terminal.command.send_signal(signal.SIGTERM)


def kill_command(terminal: Terminal, output: Path) -> None:
    terminal.command.kill()


def kill_deepspeeds_launcher(terminal: Terminal, output: Path) -> None:
    os.kill(process_of(output, "deepspeed.launcher.launch"), signal.SIGKILL)


def term_one_rank(terminal: Terminal, output: Path) -> None:
    ranks = [pid for pid, command in tree(output).items() if "--local_rank=1" in command]
    os.kill(ranks[-1], signal.SIGTERM)


WAYS = [
    ("deepspeed", press),
    ("train", press),
    pytest.param("deepspeed", kill_deepspeeds_launcher, marks=pytest.mark.slow),
    pytest.param("local", term_command, marks=pytest.mark.slow),
    pytest.param("deepspeed", close, marks=pytest.mark.slow),
    pytest.param("deepspeed", term_command, marks=pytest.mark.slow),
    pytest.param("deepspeed", kill_command, marks=pytest.mark.slow),
    pytest.param("deepspeed", term_one_rank, marks=pytest.mark.slow),
    pytest.param("torchrun", press, marks=pytest.mark.slow),
    pytest.param("torchrun", close, marks=pytest.mark.slow),
    pytest.param("torchrun", kill_command, marks=pytest.mark.slow),
    pytest.param("local", press, marks=pytest.mark.slow),
    pytest.param("local", close, marks=pytest.mark.slow),
    pytest.param("local", kill_command, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("launcher", "stop"), WAYS)
def test_a_stop_is_saved(
    config: Path, output: Path, launcher: str, stop: Callable[[Terminal, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPROC", "2")
    terminal = Terminal(command_of(launcher, config, output))
    terminal.wait_for(lambda: reached(output) >= 3, 200)
    stop(terminal, output)
    terminal.wait_for(lambda: not tree(output), SECONDS)
    code = terminal.command.wait()
    step = reached(output)
    assert step >= 3
    assert checkpoints(output) == [step], "every step is in it"
    assert status(output)["exit_code"] == 75
    if launcher in ("local", "train") and stop in (press, close, term_command):
        assert code == 75
    if stop is press:
        assert "saving after this pack" in terminal.read()


@pytest.mark.slow
def test_deepspeed_is_killed_while_a_rank_waits_for_one_that_is_dead(config: Path, output: Path) -> None:
    """As the out-of-memory killer does it. The rank hears of both, and there is nobody to agree with."""
    terminal = Terminal(command_of("deepspeed", config, output))
    terminal.wait_for(lambda: any("--local_rank=1" in command for command in tree(output).values()), 60)
    other = process_of(output, "--local_rank=1", without="launcher.launch")
    os.kill(other, signal.SIGSTOP)
    terminal.wait_for(lambda: "processes join ..." in terminal.read(), 100)
    terminal.command.kill()
    os.kill(other, signal.SIGKILL)
    terminal.wait_for(lambda: not tree(output), SECONDS)


@pytest.mark.slow
def test_a_second_press_ends_at_once(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "2")
    terminal = Terminal([*command_of("local", config, output), "--train.gradient_accumulation_steps", "8"])
    terminal.wait_for(lambda: reached(output) >= 1, 200)
    for pid in tree(output):  # a rank that hangs would otherwise be gone before the second press
        os.kill(pid, signal.SIGSTOP) if "ds_longft.train " in tree(output).get(pid, "") else None
    press(terminal, output)
    time.sleep(3)
    for pid in tree(output):
        os.kill(pid, signal.SIGCONT)
    press(terminal, output)
    terminal.wait_for(lambda: not tree(output), SECONDS)
    assert terminal.command.wait() in (75, 130)


def start_local(
    config: Path, output: Path, *keys: str, cwd: Path = ROOT, before: str = ""
) -> subprocess.CompletedProcess[str]:
    words = ["bash", str(ROOT / "launch" / "local.sh"), "--config", str(config), "--output_dir", str(output), *keys]
    command = ["unshare", "-u", "bash", "-c", f'{before} exec "$@"', "-", *words] if before else words
    env = {**os.environ, "NPROC": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd, env=env)


def test_local_hands_on_this_starts_code_from_any_folder(config: Path, output: Path) -> None:
    """An earlier start had stopped and saved; this one has no data any more."""
    output.mkdir()
    (output / "run_status.json").write_text('{"exit_code": 75}')
    done = start_local(Path(config.name), output, "--sp", "1", "--data.train", "nowhere.jsonl", cwd=config.parent)
    assert done.returncode == 64, done.stderr
    assert "there is no nowhere.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert status(output)["exit_code"] == 64
    done = start_local(Path("nothing.yaml"), output)
    assert done.returncode == 64
    assert "cannot read nothing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="another host name needs root")
def test_local_needs_no_name_that_resolves(config: Path, output: Path) -> None:
    done = start_local(config, output, "--sp", "1", before="hostname nosuch-host.invalid;")
    assert done.returncode == 0, done.stderr
    assert status(output)["exit_code"] == 0


def victims(output: Path, command: int) -> dict[str, list[int]]:
    """Living processes of the run by what they are."""
    found: dict[str, list[int]] = {"command": [command], "launcher": [], "rank": []}
    for pid, words in tree(output).items():
        if pid == command:
            continue
        found["launcher" if "launcher.launch" in words else "rank"].append(pid)
    return {kind: pids for kind, pids in found.items() if pids}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("launcher", ["deepspeed", "local"])
def test_soak(
    config: Path, output: Path, launcher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random signals to random processes of the tree at random moments, and the same command again each time: the losses
    of a run left alone, nothing left behind, no exit code 0 before the end.
    """
    soak, dice = Soak(launcher, capsys), random.Random(int(os.environ.get("SOAK_SEED", "0")))
    monkeypatch.setenv("NPROC", "2")
    keys = ["--train.max_steps", str(SOAK_STEPS), "--train.save_every_steps", "5", "--train.epochs", "1000"]

    def start(folder: Path) -> Terminal:
        return Terminal([*command_of(launcher, config, folder)[: -len(LONG)], *keys])

    def finish(folder: Path) -> None:
        terminal = start(folder)
        terminal.wait_for(lambda: terminal.command.poll() is not None, 1200)
        assert terminal.command.returncode == 0, terminal.said[-3000:]
        assert not tree(folder)

    def one_round(folder: Path) -> None:
        terminal = start(folder)
        if not soak.moment(folder, dice, lambda: terminal.command.poll() is None and (terminal.read() or True)):
            return
        found = victims(folder, terminal.command.pid)
        kind = dice.choice(sorted(found))
        number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(found[kind]), number)
        terminal.said += f"\n--- {number.name} to {kind}, of {found}\n"
        terminal.wait_for(lambda: not tree(folder), 90)
        code = terminal.command.wait()
        # DeepSpeed ends well when its own launcher is killed; whether it should is not ours to say.
        if reached(folder) < SOAK_STEPS and not (launcher == "deepspeed" and kind == "launcher"):
            assert code != 0, (kind, number)
        soak.note(f"{number.name} to {kind}: {code}", reached(folder))

    soak.run(output, one_round, finish)
