"""One run from a checked config: processes joined, data tokenised, engine built, trained, written out."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.config.shipped import find_template
from ds_longft.data.loader import StepLoader
from ds_longft.data.template_source import without_marks
from ds_longft.decide.advice import Adviser
from ds_longft.errors import EXIT_HANG, EXIT_REQUEUE, GpuMemoryError
from ds_longft.layout import ParallelLayout
from ds_longft.model.load_packed import base_format
from ds_longft.model.lora import trainable_parameters
from ds_longft.model.lora_targets import adapted_in_words
from ds_longft.model.wrapped import is_wrapped
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Launch
from ds_longft.train.card import write_card
from ds_longft.train.data_facts import write_data_facts
from ds_longft.train.health import Watchdog
from ds_longft.train.hub import Pusher
from ds_longft.train.make_optimizer import averaged_weights
from ds_longft.train.metrics import Records, read_metrics, summary_table
from ds_longft.train.provenance import write_facts
from ds_longft.train.resume_rules import CHANGES, TrainState, in_words
from ds_longft.train.secrets import tracked_config
from ds_longft.train.start import (
    Joined,
    Phases,
    Prepared,
    Resumed,
    RunData,
    build_engine,
    join_processes,
    read_data,
    resume,
)
from ds_longft.train.trainer import Trainer
from ds_longft.train.weights import ModelWriter

if TYPE_CHECKING:
    from ds_longft.train.status import Status


def run(
    config: RunConfig,
    settings: DeepSpeedSettings,
    sp: int,
    launch: Launch,
    status: Status,
    stop: StopRequest,
    started: float,
) -> int:
    """Train and write everything a user takes away; returns 0, or 75 when asked to stop before the end.

    Raises:
        GpuMemoryError: on the rank whose GPU is full, with what would save memory.
        LongftError: any other, on every rank alike.
    """
    try:
        joined = join_processes(config, settings, sp, launch, status, stop, Phases(started, say=launch.rank == 0))
        data = read_data(joined)
        prepared = build_engine(joined)
        resumed = resume(joined, data, prepared)
        return _train(joined, data, prepared, resumed, stop, started)
    except torch.OutOfMemoryError as error:
        if status.run is None:
            raise GpuMemoryError(f"out of GPU memory {status.where}: {error}") from error
        raise Adviser(status.run).error(error, status.where) from error  # the planner's advice for this run


def _train(
    joined: Joined, data: RunData, prepared: Prepared, resumed: Resumed, stop: StopRequest, started: float
) -> int:
    """The records' first lines, the training loop, and the end."""
    config, status, launch, agreement = joined.config, joined.status, joined.launch, joined.agreement
    device, built, tokenizer, state = joined.device, prepared.built, data.tokenizer, resumed.state
    records = Records(
        joined.folder, config.log, total_steps=state.total_steps, first_step=state.step, active=launch.rank == 0,
        eval_due=state.eval_due,
        steps_per_epoch=None if config.data.stream_window_mib else resumed.train_loader.steps_per_epoch(state.epoch),
    )  # fmt: skip
    tracked = tracked_config(
        config, {"world": joined.layout.world, "dp": joined.layout.dp, "total_steps": state.total_steps}
    )  # fmt: skip
    state = replace(state, tracker_id=agreement.broadcast(records.start_trackers(state.tracker_id, tracked)))
    already_finished = prepared.found is not None and state.step >= state.total_steps
    if launch.rank == 0:
        _write_head(records, joined, data, prepared, resumed, already_finished=already_finished, started=started)
    status.training(state.step, joined.phases.seconds)
    status.where = "in training"
    stop.training_begun = True
    watchdog = Watchdog(joined.folder, launch.rank, launch.world, joined.hang_s, partial(_hung, status))
    if config.data.chat_template is not None and not tokenizer.chat_template:  # a base model has learnt to chat
        tokenizer.chat_template = without_marks(find_template(config.data.chat_template).read_text(encoding="utf-8"))
    writer = ModelWriter(built.model, tokenizer, agreement, partial(averaged_weights, built.engine))
    if writer.stop_remark:
        records.say(writer.stop_remark)
    pusher = Pusher(config.hub, records.say) if config.hub.repo is not None and launch.rank == 0 else None
    trainer = Trainer(
        config=config, layout=joined.layout, device=device, built=built, train_loader=resumed.train_loader,
        eval_loader=resumed.eval_loader, records=records, checkpoints=prepared.checkpoints,
        write_model=writer.write_weights, state=state, agreement=agreement, stop=stop, watchdog=watchdog,
        pusher=pusher if config.hub.push_every_save else None,
    )  # fmt: skip
    try:
        finished = trainer.run()
    except BaseException:
        watchdog.last_word()
        raise
    watchdog.enter("the end")
    if finished:
        writer.write_all(joined.folder, records.say)
    records.close()
    if not finished:
        records.say(_farewell(trainer, stop, config.train.resume))
        status.write(EXIT_REQUEUE)
        agreement.gather(None)  # until the status is written: srun may end all ranks once one has left
        watchdog.stop()
        return EXIT_REQUEUE
    if launch.rank == 0:
        _write_end(records, joined, pusher, already_finished=already_finished, started=started)
    agreement.gather(None)
    dist.destroy_process_group()
    watchdog.stop()
    return 0


def _write_head(
    records: Records,
    joined: Joined,
    data: RunData,
    prepared: Prepared,
    resumed: Resumed,
    *,
    already_finished: bool,
    started: float,
) -> None:
    """What a run is made of, as files and as lines for its reader. Rank 0 only."""
    config, layout, device, folder, state = joined.config, joined.layout, joined.device, joined.folder, resumed.state
    if not already_finished:  # else the records would tell of settings that nothing was trained with
        write_facts(folder, config, joined.settings.engine, layout, device)
        window = state.epoch if config.data.stream_window_mib is not None else None
        write_data_facts(
            folder, resumed.train_loader.rows(state.epoch), data.held_out, data.tokenizer, state.total_steps, window
        )
    header = _header(config, layout, device, resumed.train_loader, state, prepared.found[0] if prepared.found else None)
    records.say("\n".join([header, *joined.remarks]))
    records.say(f"{trainable_parameters(prepared.built.model)}; {joined.kernels}")
    if words := adapted_in_words(prepared.built.model):
        records.say(words)
    if already_finished:
        records.say(
            f"{folder} is finished: it has all {state.total_steps} steps, nothing is trained now, its records stay "
            "as they are. Give another output_dir to train with other settings, or more epochs to go on"
        )
    lines = [
        *prepared.remarks,
        f"start-up {time.monotonic() - started:.1f} s: {joined.phases.text()}",
        *resumed.remarks,
    ]
    if state.changes:
        (folder / CHANGES).write_text(json.dumps(state.changes, indent=1) + "\n")
        lines.append(f"changed on the way: {in_words(state.changes)}")
    if resumed.renamed:
        lines.append(f"checkpoints of later steps belong to a different run; renamed to {', '.join(resumed.renamed)}")
    for line in lines:
        records.say(line)


def _write_end(
    records: Records, joined: Joined, pusher: Pusher | None, *, already_finished: bool, started: float
) -> None:
    """The model card, the last table and what comes next. Rank 0 only."""
    folder = joined.folder
    history = read_metrics(folder / "metrics.jsonl")
    if not already_finished:
        form = base_format(joined.hf_config, joined.config.model)
        write_card(
            folder, joined.config, joined.layout, history, joined.facts.vocab, wrapped=is_wrapped(joined.hf_config),
            hybrid=joined.facts.state_products > 0, quantized=form.name if form else "",
        )  # fmt: skip
        if pusher is not None:
            pusher.finish(folder)
    records.console.print(summary_table(history, folder, (time.monotonic() - started) / 60))
    program = "ds-longft" if shutil.which("ds-longft") else os.path.relpath(Path(sys.executable).with_name("ds-longft"))
    export = shlex.join([program, "export", str(folder), f"{folder}-merged"])
    records.console.print(f"Next: {export}   (an ordinary Hugging Face folder)")
    records.console.print(f"      {shlex.join([program, 'chat', str(folder)])}   (talk to it)")


def _hung(status: Status, message: str, lowest: bool) -> None:
    status.failed(message, EXIT_HANG)
    if lowest:
        status.write(EXIT_HANG, force=True)


def _farewell(trainer: Trainer, stop: StopRequest, resume: str | int) -> str:
    step = trainer.state.step
    saved = f"saved as checkpoint-{step}" if step else "nothing was trained yet"
    reason = stop.reason or "another rank was asked to"
    again = "The same command goes on from there."
    if resume != "auto" and step:
        begins = "over" if resume == "never" else f"at step {resume}"
        again = f"train.resume is {resume}: the same command begins {begins} again; with auto it goes on from there."
    return f"stopped after step {step} ({reason}); {saved}. {again}"


def _header(
    config: RunConfig,
    layout: ParallelLayout,
    device: torch.device,
    loader: StepLoader,
    state: TrainState,
    resumed_from: Path | None,
) -> str:
    """A few lines that say what is about to happen."""
    period = "per epoch" if config.data.stream_window_mib is None else f"in window {state.epoch} of the stream"
    steps = loader.steps_per_epoch(state.epoch)
    alone = " (a longer row alone)" if loader.budget_tokens < config.longest_pack_tokens else ""
    lines = [
        f"{config.model.path}: {'LoRA r' + str(config.lora.r) if config.lora else 'full fine-tuning'}, "
        f"{layout.world} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
        f"sp {layout.sp} (ranks that share a sample) x dp {layout.dp}",
        f"{steps} {'step' if steps == 1 else 'steps'} {period}, {state.total_steps} in all; packs of up to "
        f"{loader.budget_tokens:,} tokens{alone}, {layout.dp * config.train.gradient_accumulation_steps} in each step",
    ]
    if (config.train.max_steps or 0) > state.total_steps:
        lines.append(
            f"train.max_steps is {config.train.max_steps}; train.epochs: {config.train.epochs:g} ends before it: raise "
            f"train.epochs to train that long"
        )
    if (config.optim.warmup_steps or 0) > state.total_steps:
        lines.append(
            f"optim.warmup_steps is {config.optim.warmup_steps}, more than the steps of this run: the learning rate "
            f"will not reach its peak; lower it, or train longer"
        )
    if resumed_from:
        lines.append(f"resumed from {resumed_from} at step {state.step}")
    return "\n".join(lines)
