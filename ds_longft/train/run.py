"""One run from a checked config: processes joined, data tokenised, engine built, trained, written out."""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from filelock import FileLock

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.run_config import RunConfig
from ds_longft.config.shipped import find_template
from ds_longft.data.loader import StepLoader
from ds_longft.data.template_source import without_marks
from ds_longft.data.tokenized import TokenizedSet
from ds_longft.decide.advice import Adviser
from ds_longft.decide.of_run import foresee_run, write_plan
from ds_longft.errors import EXIT_HANG, EXIT_REQUEUE, GpuMemoryError
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import config_remarks, load_tokenizer, prepare_config, read_config
from ds_longft.model.lora import trainable_parameters
from ds_longft.model.peaks import peak_tflops
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Launch, join
from ds_longft.ranks.lock import lock_folder
from ds_longft.sequence.attention import ULYSSES
from ds_longft.train.card import write_card
from ds_longft.train.checkpoint import Checkpoints
from ds_longft.train.data_facts import write_data_facts
from ds_longft.train.health import Watchdog
from ds_longft.train.hub import Pusher, ready
from ds_longft.train.install import decided, known_run
from ds_longft.train.made_of import what_ranks_share, write_facts
from ds_longft.train.memory import device_memory, own_memory_gib
from ds_longft.train.metrics import Records, read_metrics, summary_table
from ds_longft.train.model_check import check_model
from ds_longft.train.rehearse import choose_passes, rehearse, settle
from ds_longft.train.same_run import (
    CHANGES,
    STAGE,
    TrainState,
    changes_since,
    in_words,
    refuse_another_run,
    what_decides,
    what_may_change,
    what_the_model_is,
)
from ds_longft.train.secrets import tracked_config
from ds_longft.train.sets import tokenized
from ds_longft.train.status import crashed_before
from ds_longft.train.trainer import Trainer
from ds_longft.train.weights import ModelWriter, start_fingerprint, trained_fingerprint

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
        return _run(config, settings, sp, launch, status, stop, started)
    except torch.OutOfMemoryError as error:
        raise memory_error(error, status) from error


def memory_error(error: torch.OutOfMemoryError, status: Status) -> GpuMemoryError:
    """The error with the planner's advice for this run."""
    known = status.run
    if known is None:
        return GpuMemoryError(f"out of GPU memory {status.where}: {error}")
    if status.passes is not None:
        dpo = known.config.dpo.model_copy(update={"passes": status.passes})
        known = replace(known, config=known.config.model_copy(update={"dpo": dpo}))
    return Adviser(known).error(error, status.where)


def _run(
    config: RunConfig,
    settings: DeepSpeedSettings,
    sp: int,
    launch: Launch,
    status: Status,
    stop: StopRequest,
    started: float,
) -> int:
    phases = Phases(started)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    hf_config, length = read_config(config.model), config.data.max_length_tokens
    remarks = config_remarks(hf_config, config.model.rope, length)
    hf_config = prepare_config(hf_config, config.model, length, attn_implementation=ULYSSES)
    facts = ModelFacts.from_config(hf_config)
    kernel, kernels = check_model(
        config,
        facts,
        sp,
        torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu"),
        torch.bfloat16 if settings.engine["bf16"]["enabled"] else torch.float32,
    )
    from ds_longft.train.engine import build  # imports deepspeed: after the checks, which are quick to refuse

    phases.done("checks and imports")
    hang_s = 60 * config.train.hang_minutes
    # The watchdog comes first; start-up, where ranks read a model at different speeds, has half an hour at least.
    device, agreement = join(launch, timeout_s=max(hang_s, 1800.0) + 60)
    folder = Path(config.output_dir).expanduser()
    agreement.rank0_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    locks: list[FileLock] = []  # held until the process ends
    agreement.on_rank0(lambda: locks.append(lock_folder(folder)))
    status.folder = folder
    status.where = "while the model was built"
    layout = ParallelLayout.create(sp)
    if config.hub.repo is not None:
        agreement.on_rank0(lambda: ready(config.hub))
    agreement.same(what_ranks_share(config, settings.engine))
    phases.done("processes joined")

    tokenizer = load_tokenizer(config.model)
    crashed = agreement.broadcast(crashed_before(folder))
    every_byte = crashed and launch.local_rank == 0
    train_set, eval_set = agreement.rank0_first(
        lambda: tokenized(config, tokenizer, facts.vocab, progress=launch.rank == 0, every_byte=every_byte)
    )
    held_out = {} if eval_set is None else {"the held-out rows": eval_set.content}
    agreement.same({"the training rows": train_set.content, **held_out})
    phases.done("data tokenised")

    memory_gib, taken_gib = own_memory_gib(device)
    checkpoints = Checkpoints(folder, agreement, config.train.keep_checkpoints)
    found = checkpoints.find(config.train.resume)
    saved_stage = found[1].decides.get(STAGE) if found else None
    known = known_run(
        config, settings, layout, device,
        hf_config=hf_config, facts=facts, memory_gib=memory_gib, saved_stage=saved_stage, kernel=kernel,
    )  # fmt: skip
    status.run, decisions = known, decided(known, device)
    if launch.rank == 0:  # on a CPU the memory of a whole process is what is measured: nothing is foreseen
        write_plan(folder, foresee_run(known, decisions) if device.type == "cuda" else None)
    built = build(known, layout, device, decisions=decisions, loaded=lambda: phases.done("model loaded"))
    phases.done("engine built")

    def loader(part: TokenizedSet, accumulation: int) -> StepLoader:
        return StepLoader(
            part, data=config.data, dp=layout.dp, dp_rank=layout.dp_rank, sp=layout.sp,
            accumulation=accumulation, seed=config.seed,
            equal_cost_tokens=facts.equal_cost_tokens(lora=config.lora is not None),
        )  # fmt: skip

    train_loader = loader(train_set, config.train.gradient_accumulation_steps)
    total_steps = sum(train_loader.steps_per_epoch(e) for e in range(config.train.epochs))
    state = TrainState(
        step=0,
        epoch=0,
        step_in_epoch=0,
        tokens_seen=0,
        total_steps=min(total_steps, config.train.max_steps or total_steps),
        world=layout.world,
        rows=train_set.content,
        order=train_loader.fingerprint,
        trained=trained_fingerprint(built.model),
        decides=what_decides(config, settings.engine, layout),
        may_change=what_may_change(config),
        model=what_the_model_is(hf_config),
        base=agreement.broadcast(start_fingerprint(built.model)),
    )
    if found is not None:
        refuse_another_run(*found, state)
    status.where = "in the dry run of the longest pack, before the first step"
    memory = device_memory(device)
    if memory is not None:  # before a checkpoint is loaded: it clears the optimizer's state
        settle(built.engine, layout, device)
    passes = choose_passes(built.engine, config.dpo.passes, train_loader.fullest_pack(0), layout, device, memory)
    status.passes = getattr(built.engine.module, "passes", None)  # of preference pairs
    fullest = train_loader.fullest_pack(0, of_a_side=status.passes == "two")
    kept = rehearse(built.engine, built.recompute, fullest, layout, device, memory)
    phases.done("rehearsed" if kept else "ready")
    if found is not None:
        status.where = "while a checkpoint was loaded"
        path, saved = found
        checkpoints.load(built.engine, path, saved)
        of_now = ("total_steps", "world", "decides", "may_change", "model", "base", "format", "written_by")
        now = {key: getattr(state, key) for key in of_now}
        state = replace(saved, **now, changes=changes_since(saved, state))
        phases.done("checkpoint loaded")
    aside = checkpoints.set_aside_after(state.step)
    records = Records(
        folder, config.log, total_steps=state.total_steps, first_step=state.step, active=launch.rank == 0,
        eval_due=state.eval_due,
    )  # fmt: skip
    tracked = tracked_config(config, {"world": layout.world, "dp": layout.dp, "total_steps": state.total_steps})
    tracker_id = agreement.broadcast(records.start_trackers(state.tracker_id, tracked))
    state = replace(state, tracker_id=tracker_id)
    ended_before = found is not None and state.step >= state.total_steps
    if launch.rank == 0 and not ended_before:  # else the records would tell of settings that nothing was trained with
        write_facts(folder, config, settings.engine, layout, device)
        write_data_facts(folder, train_set, eval_set, tokenizer, state.total_steps)
    if launch.rank == 0:
        header = _header(config, layout, device, train_loader, state, found[0] if found else None)
        records.say("\n".join([header, *remarks]))
        records.say(f"{trainable_parameters(built.model)}; {kernels}")
        if known.whole:
            records.say(
                "ZeRO-3 divides nothing here: the frozen weights fit on each GPU and stay there whole (stage 2)"
            )
        if ended_before:
            records.say(
                f"{folder} is finished: it has all {state.total_steps} steps, nothing is trained now, its records stay "
                "as they are. Give another output_dir to train with other settings, or more epochs to go on"
            )
        if taken_gib:
            records.say(
                f"other processes hold {taken_gib:.1f} GiB of a GPU (nvidia-smi names them): planned without it"
            )
    if launch.rank == 0:
        records.say(f"start-up {time.monotonic() - started:.1f} s: {phases.text()}")
        for line in (passes, kept):
            if line:
                records.say(line)
        if found is not None and found[1].world != layout.world:
            records.say(
                f"{found[0].name} was written by {found[1].world} ranks: optimizer and weights were divided anew"
            )
        if state.changes:
            (folder / CHANGES).write_text(json.dumps(state.changes, indent=1) + "\n")
            records.say(f"changed on the way: {in_words(state.changes)}")
        if aside:
            records.say(f"checkpoints of later steps belong to a different run; renamed to {', '.join(aside)}")
    status.training(state.step, phases.seconds)
    status.where = "in training"
    stop.saves = True
    watchdog = Watchdog(folder, launch.rank, launch.world, hang_s, partial(_hung, status))

    if config.data.chat_template is not None and not tokenizer.chat_template:  # a base model has learnt to chat
        tokenizer.chat_template = without_marks(find_template(config.data.chat_template).read_text(encoding="utf-8"))
    writer = ModelWriter(built.model, tokenizer, agreement)
    if launch.rank == 0 and writer.stop_remark:
        records.say(writer.stop_remark)
    pusher = Pusher(config.hub, records.say) if config.hub.repo is not None and launch.rank == 0 else None
    trainer = Trainer(
        config=config,
        layout=layout,
        device=device,
        built=built,
        train_loader=train_loader,
        eval_loader=loader(eval_set, 1) if eval_set is not None else None,
        records=records,
        checkpoints=checkpoints,
        write_model=writer.write_weights,
        state=state,
        agreement=agreement,
        stop=stop,
        watchdog=watchdog,
        saved_step=state.step,
        pusher=pusher if config.hub.push_every_save else None,
        relief=built.recompute.relief(device),
        peak_tflops=peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
    )
    try:
        finished = trainer.run()
    except BaseException:
        watchdog.last_word()
        raise
    watchdog.enter("the end")
    if finished:
        writer.write_all(folder, records.say)
    records.close()
    if not finished:
        records.say(_farewell(trainer, stop, config.train.resume))
        status.write(EXIT_REQUEUE)
        agreement.gather(None)  # whoever leaves first, the status is written: srun may end the others then
        watchdog.stop()
        return EXIT_REQUEUE
    if launch.rank == 0:
        history = read_metrics(folder / "metrics.jsonl")
        if not ended_before:
            write_card(folder, config, layout, history, hf_config.vocab_size)
        if pusher is not None and not ended_before:
            pusher.finish(folder)
        records.console.print(summary_table(history, folder, (time.monotonic() - started) / 60))
        export = shlex.join(["ds-longft", "export", str(folder), f"{folder}-merged"])
        records.console.print(f"Next: {export}   (an ordinary Hugging Face folder)")
    agreement.gather(None)
    dist.destroy_process_group()
    watchdog.stop()
    return 0


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


class Phases:
    """Seconds of each phase of the start-up."""

    def __init__(self, started: float) -> None:
        self.last = started
        self.seconds: dict[str, float] = {}

    def done(self, phase: str) -> None:
        """Close a phase."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self.last, 2)
        self.last = now

    def text(self) -> str:
        """All phases in one line."""
        return ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items())


def _header(
    config: RunConfig,
    layout: ParallelLayout,
    device: torch.device,
    loader: StepLoader,
    state: TrainState,
    resumed: Path | None,
) -> str:
    """A few lines that say what is about to happen."""
    alone = " (a longer row alone)" if loader.budget_tokens < config.longest_pack_tokens else ""
    lines = [
        f"{config.model.path}: {'LoRA r' + str(config.lora.r) if config.lora else 'full fine-tuning'}, "
        f"{layout.world} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
        f"sp {layout.sp} (ranks that share a sample) x dp {layout.dp}",
        f"{loader.steps_per_epoch(0)} steps an epoch, {state.total_steps} in all; packs of up to "
        f"{loader.budget_tokens:,} tokens{alone}, {layout.dp * config.train.gradient_accumulation_steps} in each step",
    ]
    if (config.optim.warmup_steps or 0) > state.total_steps:
        lines.append(
            f"optim.warmup_steps is {config.optim.warmup_steps}, more than the steps of this run: the learning rate "
            f"will not reach its peak; lower it, or train longer"
        )
    if resumed:
        lines.append(f"resumed from {resumed} at step {state.step}")
    return "\n".join(lines)
