"""The start of a run, in four steps: processes joined, data read, engine built, an earlier run resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from transformers import PretrainedConfig

from ds_longft.config.ds_json import DeepSpeedSettings
from ds_longft.config.proof import proof_problem
from ds_longft.config.quantized import full_training_problem
from ds_longft.config.run_config import RunConfig
from ds_longft.data.loader import StepLoader
from ds_longft.data.stream import Stream, StreamLoader
from ds_longft.data.tokenized import TokenizedSet
from ds_longft.decide.plan_json import foresee_run, write_plan
from ds_longft.decide.where_base_lies import what_is_lost
from ds_longft.errors import ModelError
from ds_longft.layout import ParallelLayout
from ds_longft.model.facts import ModelFacts
from ds_longft.model.load import config_remarks, prepare_config
from ds_longft.model.load_packed import base_format, stored_as
from ds_longft.model.lora import check_lora
from ds_longft.model.read_model import load_tokenizer, read_config
from ds_longft.objectives.objective import Needs
from ds_longft.ranks.interrupt import StopRequest
from ds_longft.ranks.join import Agreement, Launch, join
from ds_longft.ranks.lock import lock_folder
from ds_longft.sequence.attention import ULYSSES
from ds_longft.train.checkpoint import Checkpoints
from ds_longft.train.device_memory import device_memory, own_memory_gib
from ds_longft.train.disk_room import check_disk, measured_gb_s
from ds_longft.train.engine import Built, build
from ds_longft.train.hub import ready
from ds_longft.train.install import decided, known_run
from ds_longft.train.model_check import check_model
from ds_longft.train.provenance import what_ranks_share
from ds_longft.train.rehearse import choose_passes, rehearse, settle
from ds_longft.train.resume_rules import (
    STAGE,
    TrainState,
    changes_since,
    refuse_another_run,
    what_decides,
    what_may_change,
    what_the_model_is,
)
from ds_longft.train.sets import tokenized
from ds_longft.train.status import crashed_before
from ds_longft.train.weights import start_fingerprint, trained_fingerprint

if TYPE_CHECKING:
    from ds_longft.train.status import Status


class Phases:
    """Seconds of each phase of the start-up; `say`: each is also said as it ends, with what comes next."""

    def __init__(self, started: float, *, say: bool = False) -> None:
        self.started = self.last = started
        self.say = say
        self.seconds: dict[str, float] = {}

    def done(self, phase: str, then: str = "") -> None:
        """Close a phase."""
        now = time.monotonic()
        self.seconds[phase] = round(now - self.last, 2)
        self.last = now
        if self.say and then:
            print(f"{now - self.started:6.1f} s  {phase}; {then} ...", flush=True)

    def text(self) -> str:
        """All phases in one line."""
        return ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds.items())


@dataclass(frozen=True)
class Joined:
    """A checked config on processes that know of each other."""

    config: RunConfig
    settings: DeepSpeedSettings
    launch: Launch
    status: Status
    phases: Phases
    hf_config: PretrainedConfig
    facts: ModelFacts
    remarks: tuple[str, ...]  # on the model's config
    kernel: str  # of the first layer
    kernels: str  # of all of them, a line for the reader
    hang_s: float
    device: torch.device
    agreement: Agreement
    layout: ParallelLayout
    folder: Path
    lock: FileLock | None  # of the folder, on rank 0, held until the process ends


@dataclass(frozen=True)
class RunData:
    """The rows of a run, tokenized."""

    tokenizer: Any
    train: TokenizedSet | Stream
    held_out: TokenizedSet | None


@dataclass(frozen=True)
class Prepared:
    """The engine, and what was found out on the way to it."""

    built: Built
    checkpoints: Checkpoints
    found: tuple[Path, TrainState] | None  # the checkpoint to go on from
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Resumed:
    """Where training begins."""

    state: TrainState
    train_loader: StepLoader
    eval_loader: StepLoader | None
    renamed: tuple[str, ...]  # checkpoints of steps that are about to be made again
    remarks: tuple[str, ...]


def join_processes(
    config: RunConfig,
    settings: DeepSpeedSettings,
    sp: int,
    launch: Launch,
    status: Status,
    stop: StopRequest,
    phases: Phases,
) -> Joined:
    """Check the model, join the other processes, and see that all are of the same run."""
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    hf_config, length = read_config(config.model), config.data.max_length_tokens
    remarks = config_remarks(hf_config, config.model.rope, length)
    hf_config = prepare_config(hf_config, config.model, length, attn_implementation=ULYSSES)
    problem = proof_problem(hf_config.model_type, hf_config.get_text_config().model_type)
    if problem and not config.model.unproved:
        raise ModelError(problem)
    form, stored = base_format(hf_config, config.model), bool(stored_as(hf_config))
    if problem := full_training_problem(form.name if form else "", lora=config.lora is not None, stored=stored):
        raise ModelError(problem)
    facts = ModelFacts.from_config(hf_config)
    if config.lora is not None:
        check_lora(hf_config, config.lora)
    own = torch.device("cuda", launch.local_rank) if cuda else torch.device("cpu")
    dtype = torch.bfloat16 if settings.engine["bf16"]["enabled"] else torch.float32
    kernel, kernels = check_model(config, facts, sp, own, dtype)
    phases.done("checks and imports", "processes join")
    hang_s = 60 * config.train.hang_minutes
    # The watchdog comes first; start-up, where ranks read a model at different speeds, has half an hour at least.
    device, agreement = join(launch, timeout_s=max(hang_s, 1800.0) + 60)
    stop.joined = True
    folder = Path(config.output_dir).expanduser()
    agreement.rank0_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    locks: list[FileLock] = []
    agreement.on_rank0(lambda: locks.append(lock_folder(folder)))
    status.folder = folder
    status.where = "while the model was built"
    layout = ParallelLayout.create(sp)
    if config.hub.repo is not None:
        agreement.on_rank0(lambda: ready(config.hub))
    agreement.same(what_ranks_share(config, settings.engine))
    phases.done("processes joined", "data is read")
    return Joined(
        config, settings, launch, status, phases, hf_config, facts, tuple(remarks), kernel, kernels, hang_s, device,
        agreement, layout, folder, locks[0] if locks else None,
    )  # fmt: skip


def read_data(joined: Joined) -> RunData:
    """Rank 0 tokenizes what is not in the cache, then all read it. Every rank has the same rows."""
    config, launch, agreement = joined.config, joined.launch, joined.agreement
    tokenizer = load_tokenizer(config.model)
    crashed = agreement.broadcast(crashed_before(joined.folder))
    every_byte = crashed and launch.local_rank == 0
    train_set, eval_set = agreement.rank0_first(
        lambda: tokenized(config, tokenizer, joined.facts.vocab, progress=launch.rank == 0, every_byte=every_byte)
    )
    held_out = {} if eval_set is None else {"the held-out rows": eval_set.content}
    agreement.same({"the training rows": train_set.content, **held_out})
    joined.phases.done("data tokenised", "the model is loaded")
    return RunData(tokenizer, train_set, eval_set)


def build_engine(joined: Joined) -> Prepared:
    """Decide how the run saves memory, write down what is foreseen of it, and build the engine."""
    config, settings, layout, device = joined.config, joined.settings, joined.layout, joined.device
    memory_gib, taken_gib = own_memory_gib(device)
    checkpoints = Checkpoints(joined.folder, joined.agreement, config.train.keep_checkpoints)
    found = checkpoints.find(config.train.resume)
    folder, disk_gb_s = config.train.offload_disk, 0.0
    if folder is not None:
        disk_gb_s = measured_gb_s(folder, device, joined.launch.local_world, joined.agreement)
    known = known_run(
        config, settings, layout, device, hf_config=joined.hf_config, facts=joined.facts, memory_gib=memory_gib,
        saved_stage=found[1].decides.get(STAGE) if found else None, kernel=joined.kernel, disk_gb_s=disk_gb_s,
    )  # fmt: skip
    remarks = []
    if known.why:
        remarks.append(f"model.base: {known.base} (ZeRO-3 divides nothing then, it is stage 2): {known.why}")
    if lost := what_is_lost(known, settings):
        remarks.append(lost)
    if taken_gib:
        remarks.append(f"other processes hold {taken_gib:.1f} GiB of a GPU (nvidia-smi names them): planned without it")
    joined.status.run, decisions = known, decided(known, device)
    if line := check_disk(known, decisions, device, joined.agreement):
        remarks.append(line)
    if joined.launch.rank == 0:  # on a CPU the memory of a whole process is what is measured: nothing is foreseen
        write_plan(joined.folder, foresee_run(known, decisions) if device.type == "cuda" else None)
    done = joined.phases.done
    built = build(
        known, layout, device, decisions=decisions, loaded=lambda: done("model loaded", "the engine is built")
    )
    done("engine built", "a rehearsal, where memory may be short")
    return Prepared(built, checkpoints, found, tuple(remarks))


def resume(joined: Joined, data: RunData, prepared: Prepared) -> Resumed:
    """See that a checkpoint is of this run, rehearse the longest pack, and load the checkpoint.

    The rehearsal comes before the load, because it clears the optimizer's state.
    """
    config, layout, built, found = joined.config, joined.layout, prepared.built, prepared.found
    first = found[1].epoch if found else 0
    train_loader = _loader(joined, data.train, config.train.gradient_accumulation_steps, first)
    state = _new_state(joined, prepared, train_loader, first)
    if found is not None:
        refuse_another_run(*found, state)
    remarks = _rehearse(joined, prepared, train_loader)
    if found is not None:
        joined.status.where = "while a checkpoint was loaded"
        path, saved = found
        prepared.checkpoints.load(built.engine, path, saved)
        of_now = ("total_steps", "world", "decides", "may_change", "model", "base", "format", "written_by")
        now = {key: getattr(state, key) for key in of_now}
        state = replace(saved, **now, changes=changes_since(saved, state))
        joined.phases.done("checkpoint loaded")
        if saved.world != layout.world:
            remarks += (f"{path.name} was written by {saved.world} ranks: optimizer and weights were divided anew",)
    eval_loader = None if data.held_out is None else _loader(joined, data.held_out, 1)
    return Resumed(state, train_loader, eval_loader, tuple(prepared.checkpoints.set_aside_after(state.step)), remarks)


def _loader(joined: Joined, part: TokenizedSet | Stream, accumulation: int, first: int = 0) -> StepLoader:
    """`first`: window of a stream that training goes on in."""
    config, layout = joined.config, joined.layout
    settings: dict[str, Any] = {
        "data": config.data, "dp": layout.dp, "dp_rank": layout.dp_rank, "sp": layout.sp,
        "accumulation": accumulation, "seed": config.seed,
        "equal_cost_tokens": joined.facts.equal_cost_tokens(lora=config.lora is not None),
    }  # fmt: skip
    if isinstance(part, TokenizedSet):
        return StepLoader(part, **settings)
    return StreamLoader(
        part, first=first, longest_tokens=config.longest_pack_tokens, makes_windows=joined.launch.local_rank == 0,
        **settings,
    )  # fmt: skip


def epochs_in_steps(epochs: float, steps_of: Callable[[int], int], at_most: int | None = None) -> int:
    """Optimizer steps of N epochs; a part of an epoch has at least one step. Counts no further than `at_most`."""
    steps, whole = 0, int(epochs)
    for epoch in range(whole):
        steps += steps_of(epoch)
        if at_most is not None and steps >= at_most:
            return at_most
    part = max(1, round((epochs - whole) * steps_of(whole))) if epochs > whole else 0
    return steps + part if at_most is None else min(steps + part, at_most)


def _new_state(joined: Joined, prepared: Prepared, loader: StepLoader, first: int) -> TrainState:
    """The state of this run before its first step, as far as it can be compared with that of window `first`."""
    config, layout, built = joined.config, joined.layout, prepared.built
    total_steps = config.train.max_steps if config.data.stream_window_mib is not None else None
    if total_steps is None:
        total_steps = epochs_in_steps(config.train.epochs, loader.steps_per_epoch, config.train.max_steps)
    return TrainState(
        step=0, epoch=0, step_in_epoch=0, tokens_seen=0, total_steps=total_steps, world=layout.world,
        rows=loader.rows_name(first), order=loader.fingerprint, trained=trained_fingerprint(built.model),
        decides=what_decides(config, joined.settings.engine, layout), may_change=what_may_change(config),
        model=what_the_model_is(joined.hf_config),
        base=joined.agreement.broadcast(start_fingerprint(built.model)),
    )  # fmt: skip


def _rehearse(joined: Joined, prepared: Prepared, loader: StepLoader) -> tuple[str, ...]:
    """The dry run of the longest pack, where memory can be told; what was found, for the reader."""
    config, layout, device, built, status = joined.config, joined.layout, joined.device, prepared.built, joined.status
    status.where = "in the dry run of the longest pack, before the first step"
    memory = device_memory(device)
    if memory is not None:
        settle(built.engine, layout, device)
    passes = choose_passes(built.engine, Needs.of(config).passes, loader.fullest_pack(0), layout, device, memory)
    chosen = built.objective.passes
    assert status.run is not None
    dpo = config.dpo.model_copy(update={"passes": chosen})
    status.run = replace(status.run, config=config.model_copy(update={"dpo": dpo}))
    fullest = loader.fullest_pack(0, of_a_side=chosen == "two")
    kept = rehearse(built.engine, built.recompute, fullest, layout, device, memory)
    joined.phases.done("rehearsed" if kept else "ready")
    return tuple(line for line in (passes, kept) if line)
