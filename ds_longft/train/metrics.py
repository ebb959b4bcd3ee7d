"""What a run records: a console line a step, metrics.jsonl, trackers, a loss plot, a table at the end. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
import resource
import secrets
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ds_longft.config.run_config import LogConfig
from ds_longft.data.progress import duration
from ds_longft.run_files import MetricsLine
from ds_longft.stored import read_lines
from ds_longft.train import trackers
from ds_longft.train.durable import DurableLines, insist
from ds_longft.train.smooth import FEWEST, first_and_last, running_mean, steps_of_a_mean
from ds_longft.train.trackers import Background

Record = dict[str, Any]

METRICS = "metrics.jsonl"
FILE_WIDTH = 180  # of the last table where there is no terminal to ask
SPIKE_WINDOW_STEPS = 50  # what a loss is compared with
SPIKE_DEVIATIONS = 5.0  # far outside of what steps over different rows differ by
LATE_SHARE = 0.1  # of a step: a rank that is further behind at its end is named


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def spike_of(loss: float, before: Sequence[float]) -> float | None:
    """How many standard deviations a loss lies above the mean of those before it, where that is a spike.

    None where it is no spike, or fewer than half a window of losses is known.
    """
    if 2 * len(before) < SPIKE_WINDOW_STEPS:
        return None
    above = (loss - fmean(before)) / max(pstdev(before), 1e-9)
    return above if above > SPIKE_DEVIATIONS else None


NOTABLE_PERCENT = 5.0
"""Share of a step: less padding, or less waiting for data, is not worth a word on the console."""


def step_line(record: Record, total_steps: int) -> str:
    """The console line of one step, 80 columns where nothing is odd; metrics.jsonl has all of it."""
    on_gpu = record.get("mfu") is not None
    speed = f"{record['tokens_per_s_per_gpu']:,.0f} tok/s/{'GPU' if on_gpu else 'rank'}"
    speed += f"  MFU {record['mfu']:.0%}" if on_gpu else ""
    without = f"SKIPPED: {record['skipped']}" if "skipped" in record else "no targets"
    loss = without if record["loss"] is None else f"loss {record['loss']:.4f}"
    if "rewards/accuracies" in record:
        loss += f" | accuracy {record['rewards/accuracies']:.2f} | margin {record['rewards/margins']:.3f}"
    norm = "-" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
    spike = f" (spike: {record['loss_spike']:.1f} deviations)" if "loss_spike" in record else ""
    late = record.get("rank_spread_s", 0.0)
    behind = f" (rank {record['last_rank']} {late:.2f} s behind)" if late > LATE_SHARE * record["step_s"] else ""
    for share, what in ((record["padding_percent"], "padding"), (record["data_wait_percent"], "data wait")):
        behind += f" ({what} {share:.0f}%)" if share >= NOTABLE_PERCENT else ""
    return (
        f"{time.strftime('%H:%M:%S')} step {record['step']}/{total_steps}  {loss}{spike}  norm {norm}  {speed}  "
        f"{record['step_s']:.1f} s{behind}"
    )


PACE_STEPS = 3
"""Steps of a process after which its speed is known: the first of them warms up."""
SHORT_S = 60.0  # what is left of a run that needs no forecast


def pace(step_s: float, left: int, steps_per_epoch: int | None) -> str | None:
    """When a run will be over that takes `step_s` for each of the steps that are left; None where that is soon."""
    if left * step_s < SHORT_S:
        return None
    epoch = ""
    if steps_per_epoch is not None:
        steps = f"{steps_per_epoch:,} step" + "s" * (steps_per_epoch != 1)
        epoch = f"an epoch of {steps} takes about {duration(steps_per_epoch * step_s)}, "
    end = time.strftime("%a %H:%M", time.localtime(time.time() + left * step_s))
    return f"at {step_s:.1f} s per step {epoch}the {left:,} steps that are left {duration(left * step_s)}, until {end}"


class Records:
    """Writes a run's records; on ranks other than 0 every method does nothing."""

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        *,
        total_steps: int,
        first_step: int,
        active: bool,
        eval_due: bool = False,
        steps_per_epoch: int | None = None,
    ) -> None:
        """`eval_due`: the evaluation of `first_step` is about to be made up for."""
        self.steps_per_epoch, self.timed_s = steps_per_epoch, list[float]()
        self.folder, self.log, self.total_steps, self.active = folder, log, total_steps, active
        self.trackers: list[Background] = []
        self.progress: Progress | None = None
        self.started = time.monotonic()
        self.recent_losses: deque[float] = deque(maxlen=SPIKE_WINDOW_STEPS)
        if not active:
            return
        self.path = folder / METRICS
        width = None if sys.stdout.isatty() else FILE_WIDTH
        self.console = Console(soft_wrap=True, highlight=False, markup=False, width=width)
        earlier = self._forget_after(first_step, eval_due=eval_due)
        self.recent_losses.extend(r["loss"] for r in earlier if r.get("loss") is not None)
        self.lines = DurableLines(self.path, self.say)
        if sys.stdout.isatty():
            self.progress = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.progress.add_task("train", total=total_steps, completed=first_step)
            self.progress.start()

    def start_trackers(self, run_id: str | None, config: Record) -> str | None:
        """Begin to tell the trackers that are asked for; returns the run's id there, None where there is none."""
        chosen = trackers.chosen(self.log) if self.active else {}
        if not chosen:
            return run_id
        os.environ.setdefault("WANDB_SILENT", "true")  # libraries ask and print less, where they have a switch for it
        os.environ.setdefault("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        run_id = run_id or secrets.token_hex(4)  # a name that no other run has; wandb takes it as it is
        project = self.log.project or os.environ.get("WANDB_PROJECT") or "ds_longft"
        run = trackers.TrackedRun(run_id, project, self.log.name or self.folder.name, self.folder, config)
        self.trackers = [Background(name, tracker, run, self.say) for name, tracker in chosen.items()]
        return run_id

    def step(self, record: Record) -> None:
        """Record one optimizer step."""
        if not self.active:
            return
        if record["loss"] is not None:
            if (above := spike_of(record["loss"], self.recent_losses)) is not None:
                record = {**record, "loss_spike": above}
            self.recent_losses.append(record["loss"])
        self._write(record)
        self.console.print(step_line(record, self.total_steps))
        self.timed_s.append(record["step_s"])
        if len(self.timed_s) == PACE_STEPS and (
            line := pace(fmean(self.timed_s[1:]), self.total_steps - record["step"], self.steps_per_epoch)
        ):
            self.say(line)
        if self.progress:
            self.progress.update(self.task, completed=record["step"])

    def evaluation(self, record: Record) -> None:
        """Record one evaluation: step, eval_loss, eval_targets, eval_s, of pairs also eval_rewards/... and
        eval_logps/....
        """
        if not self.active:
            return
        self._write(record)
        accuracy = record.get("eval_rewards/accuracies")
        of_pairs = "" if accuracy is None else f" | accuracy {accuracy:.2f}"
        self.console.print(
            f"held-out loss at step {record['step']} | {record['eval_loss']:.4f}{of_pairs} over "
            f"{record['eval_targets']:,} target tokens | {record['eval_s']:.1f} s"
        )

    def say(self, text: str) -> None:
        """A line for the reader of the console."""
        if self.active:
            self.console.print(text)

    def close(self) -> None:
        """Stop the bar, close files, draw the loss plot."""
        if not self.active:
            return
        if self.progress:
            self.progress.stop()
        insist(self.lines.flush, METRICS, self.say)
        insist(lambda: plot_loss(read_metrics(self.path), self.folder / "loss.png"), "loss.png", self.say)
        for tracker in self.trackers:
            tracker.finish()

    def _write(self, record: Record) -> None:
        # JSON has no NaN: a loss that is not finite is null
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.lines.write(json.dumps(record, allow_nan=False))
        for tracker in self.trackers:
            tracker.log(record)

    def _forget_after(self, step: int, *, eval_due: bool) -> list[Record]:
        """Drop records of what is about to be made again, behind the checkpoint that is resumed; returns the others.

        Lines that cannot be read are said, and the file as it was is kept beside.
        """
        read, bad = read_lines(self.path, MetricsLine)
        kept = [r for r in read if r["step"] <= step] if step else []
        if eval_due:  # made up for once already, by a start that was killed before it saved
            kept = [r for r in kept if r["step"] < step or "eval_loss" not in r]
        if not self.path.exists() or (not bad and len(kept) == len(read)):
            return kept
        tmp = self.path.with_name(".metrics.jsonl")
        tmp.write_text("".join(json.dumps(r) + "\n" for r in kept))
        if bad:
            damaged = self.path.with_name("metrics-damaged.jsonl")
            shutil.copyfile(self.path, damaged)
            self.say(
                f"{METRICS}: lines that cannot be read: {len(bad)}, left out ({bad[0]}); all of it is in {damaged}"
            )
        os.replace(tmp, self.path)  # a kill in the middle must not cost the records
        return kept


def read_metrics(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; lines that cannot be read are left out."""
    return read_lines(path, MetricsLine)[0]


def plot_loss(records: list[Record], path: Path) -> None:
    """Training and evaluation loss over steps as a PNG."""
    train, evals = ([(r["step"], r[key]) for r in records if r.get(key) is not None] for key in ("loss", "eval_loss"))
    of_pairs = any("rewards/accuracies" in r for r in records)
    if not train:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    if len(train) < FEWEST:
        ax.plot(*zip(*train, strict=True), color="#1f77b4", marker=".", label="training")
    else:
        count = steps_of_a_mean(len(train))
        ax.plot(*zip(*train, strict=True), color="#1f77b4", alpha=0.5, label="training, each step")
        ax.plot(*zip(*running_mean(train, count), strict=True), color="#1f77b4", label=f"mean of {count}")
    if evals:
        ax.plot(*zip(*evals, strict=True), color="#d62728", marker="o", label="held out")
    if len(ax.lines) > 1:
        ax.legend(frameon=False)
    ax.set(xlabel="optimizer step", ylabel="loss per pair" if of_pairs else "loss per target token")
    ax.set_title(path.absolute().parent.name, fontsize=10, parse_math=False)
    if min(y for _, y in [*train, *evals]) >= 0:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def training_loss(steps: list[Record]) -> tuple[str, str]:
    """Label and value: mean loss over the first and the last steps, since rows differ and single steps say little."""
    n, first, last = first_and_last([r["loss"] for r in steps])
    label = "training loss, first -> last step" if n == 1 else f"training loss, first {n} -> last {n} steps"
    return label, f"{first:.4f} -> {last:.4f}"


def held_out(records: list[Record]) -> dict[str, str]:
    """Loss, and of pairs accuracy, of the first and the last evaluation."""
    kept = {"held-out loss": ("eval_loss", ".4f"), "held-out accuracy": ("eval_rewards/accuracies", ".2f")}
    found = {}
    for label, (key, digits) in kept.items():
        values = [format(r[key], digits) for r in records if r.get(key) is not None]
        if values:
            found[label] = " -> ".join([*values[:1], *values[1:][-1:]])
    return found


def summary_table(records: list[Record], folder: Path, minutes: float) -> Table:
    """The table a run ends with: first and last loss, speed, memory, and where everything lies."""
    steps = [r for r in records if r.get("loss") is not None]
    table = Table(title="\nDone", show_header=False, title_justify="left", box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    if steps:
        table.add_row(*training_loss(steps))
    for label, value in held_out(records).items():
        table.add_row(f"{label}, first -> last", value)
    if steps:
        timed = steps[1:] or steps  # the first step includes warming up
        speed = fmean(r.get("tokens_per_s_per_gpu") or 0.0 for r in timed)
        table.add_row("speed", f"{speed:,.0f} tokens/s per rank")
        table.add_row("peak memory", f"{max(r.get('peak_gib') or 0.0 for r in steps):.1f} GiB per rank")
    table.add_row("time", f"{minutes:.1f} min")
    adapter = "adapter_model.safetensors"
    result = ("adapter", adapter) if (folder / adapter).exists() else ("model", "")
    for name, file in (result, ("metrics", METRICS), ("config", "config.yaml"), ("loss plot", "loss.png")):
        table.add_row(name, str(folder / file))
    return table
