"""Trackers beside metrics.jsonl: wandb, TensorBoard, trackio, MLflow, each by its own library, none ever waited for.

A tracker lives in a thread of its own and gets records through a queue: a server that is slow, gone or asks for a login
costs the training nothing. What a tracker cannot do is said once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ds_longft.config.run_config import LogConfig

Record = dict[str, Any]

PATIENCE_S = 10.0  # at the end, for what is still under way
WAITING_MAX = 10_000  # records; a tracker further behind than this is lost
THREAD = "ds_longft-tracker-"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its records."""

    id: str  # the same in every start of the run
    project: str
    name: str
    folder: Path  # of the run, for trackers that write files
    config: Record  # see `secrets.tracked_config`


class Tracker(Protocol):
    """One library. Every method may raise, wait or hang: see `Background`."""

    def start(self, run: TrackedRun) -> None:
        """Open the run, or go on with it where the id is known."""

    def log(self, record: Record) -> None:
        """Record numbers by name; `step` is among them, and may go back after a resume."""

    def finish(self) -> None:
        """Hand in what is left."""


def wandb_login_problem() -> str | None:
    """What to do where wandb knows no key on this machine. Asks neither the user nor a server."""
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return None
    except Exception as error:  # a key that it does not take
        return f"not logged in: {error}"
    return "not logged in: run `wandb login`, or set WANDB_API_KEY, or log.wandb: offline"


class Wandb:
    """wandb, told the chosen keys and the records: no command line, no files, nothing of the machine."""

    def __init__(self, mode: Literal["online", "offline"]) -> None:
        self.mode = mode

    def start(self, run: TrackedRun) -> None:
        """Raises RuntimeError without a login: wandb would ask for one at the terminal, under the progress bar."""
        import wandb

        if self.mode == "online" and (problem := wandb_login_problem()):
            raise RuntimeError(problem)
        unseen = wandb.Settings(
            console="off", disable_git=True, save_code=False, program="", host="", username="",
            root_dir=str(run.folder), x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True,
            x_save_requirements=False,
        )  # fmt: skip
        self.run = wandb.init(
            project=run.project, name=run.name, id=run.id, resume="allow", mode=self.mode, dir=str(run.folder),
            config=run.config, settings=unseen,
        )  # fmt: skip
        # Not wandb's own step, which may not go back: a resumed run repeats the steps after its checkpoint.
        self.run.define_metric("train/*", step_metric="train/step")

    def log(self, record: Record) -> None:  # noqa: D102
        self.run.log({f"train/{key}": value for key, value in record.items()})

    def finish(self) -> None:  # noqa: D102
        self.run.finish()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def start(self, run: TrackedRun) -> None:  # noqa: D102
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.folder / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in run.config.items()))

    def log(self, record: Record) -> None:  # noqa: D102
        for key, value in _numbers(record).items():
            self.writer.add_scalar(f"train/{key}", value, record["step"])

    def finish(self) -> None:  # noqa: D102
        self.writer.close()


class Trackio:
    """trackio: a local dashboard, or one on the hub."""

    def start(self, run: TrackedRun) -> None:  # noqa: D102
        import trackio

        self.trackio = trackio
        trackio.init(project=run.project, name=run.name, config=run.config, resume="allow", embed=False)

    def log(self, record: Record) -> None:  # noqa: D102
        self.trackio.log({f"train/{key}": value for key, value in record.items()}, step=record["step"])

    def finish(self) -> None:  # noqa: D102
        self.trackio.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI or in files; the run is found again by a tag."""

    def start(self, run: TrackedRun) -> None:  # noqa: D102
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(run.project)
        known = mlflow.search_runs(
            search_all_experiments=True, filter_string=f"tags.ds_longft = '{run.id}'", output_format="list"
        )
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
            return
        mlflow.start_run(run_name=run.name, tags={"ds_longft": run.id})
        mlflow.log_params(run.config)

    def log(self, record: Record) -> None:  # noqa: D102
        self.mlflow.log_metrics({f"train/{k}": float(v) for k, v in _numbers(record).items()}, step=record["step"])

    def finish(self) -> None:  # noqa: D102
        self.mlflow.end_run()


def chosen(log: LogConfig) -> dict[str, Tracker]:
    """Name -> the trackers that a config asks for."""
    made: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb("online" if log.wandb == "off" else log.wandb),
        "tensorboard": TensorBoard,
        "trackio": Trackio,
        "mlflow": Mlflow,
    }
    return {name: made[name]() for name in log.tracker_names}


class Background:
    """One tracker in its thread."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, say: Callable[[str], None]) -> None:
        self.name, self.tracker, self.run, self.say = name, tracker, run, say
        self.lost = False
        self._records: queue.Queue[Record | None] = queue.Queue(WAITING_MAX)
        self._thread = threading.Thread(target=self._work, name=f"{THREAD}{name}", daemon=True)
        self._thread.start()

    def log(self, record: Record) -> None:
        """Hand over one record; never waits."""
        self._put(record)

    def finish(self, patience_s: float = PATIENCE_S) -> None:
        """Give it `patience_s` to hand in what is left; then leave it behind."""
        until = time.monotonic() + patience_s
        self._put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._lose(f"still not done after {patience_s:.0f} s")

    def _put(self, record: Record | None) -> None:
        try:
            if not self.lost:
                self._records.put_nowait(record)
        except queue.Full:
            self._lose(f"{WAITING_MAX} records behind")

    def _work(self) -> None:
        try:
            self.tracker.start(self.run)
            while (record := self._records.get()) is not None:
                self.tracker.log({key: value for key, value in record.items() if value is not None})
            self.tracker.finish()
        except BaseException as error:  # whatever a library does, sys.exit included, training goes on
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, why: str) -> None:
        if not self.lost:
            self.lost = True
            self.say(f"{self.name} is lost ({why}); metrics.jsonl has every record")


def left_behind() -> bool:
    """Whether a tracker is still at work; its library may then keep an ordinary exit waiting."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def _numbers(record: Record) -> Record:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool) and k != "step"}
