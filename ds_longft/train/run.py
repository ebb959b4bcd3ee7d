"""One run from a checked config: processes joined, data tokenised, engine built, trained, written out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_longft.config import RunConfig, SourceConfig
from ds_longft.data.loader import StepLoader
from ds_longft.data.tokenize import TokenizedSet, tokenize_sources
from ds_longft.ds_config import DeepSpeedSettings
from ds_longft.errors import DataError
from ds_longft.layout import ParallelLayout
from ds_longft.model.flops import peak_tflops
from ds_longft.model.load import load_tokenizer
from ds_longft.settings import dump_config
from ds_longft.train.card import write_card
from ds_longft.train.checkpoint import Checkpoints, TrainState
from ds_longft.train.metrics import Records, read_metrics, summary_table
from ds_longft.train.ranks import Launch, join
from ds_longft.train.trainer import Trainer
from ds_longft.train.weights import ModelWriter, trained_fingerprint

if TYPE_CHECKING:
    from ds_longft.train.__main__ import Status

PACKAGES = (
    "ds-longft",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
)


def run(config: RunConfig, settings: DeepSpeedSettings, sp: int, launch: Launch, status: Status, started: float) -> int:
    """Train and write everything a user takes away; returns 0.

    Raises:
        LongftError: on every rank alike.
    """
    phases = Phases(started)
    device, agreement = join(launch)
    folder = Path(config.output_dir)
    agreement.rank0_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    status.folder = folder
    layout = ParallelLayout.create(sp)
    agreement.same("the run config", hashlib.sha256(dump_config(config).encode()).hexdigest()[:16])
    agreement.same("the version of torch", torch.__version__)
    phases.done("processes joined")

    tokenizer = load_tokenizer(config.model)
    train_set, eval_set = agreement.rank0_first(lambda: tokenized(config, tokenizer, progress=launch.rank == 0))
    phases.done("data tokenised")

    from ds_longft.train.engine import build  # imports deepspeed

    built = build(config, settings.engine, layout, device)
    phases.done("model built")

    def loader(part: TokenizedSet, accumulation: int) -> StepLoader:
        return StepLoader(
            part, data=config.data, dp=layout.dp, dp_rank=layout.dp_rank, sp=layout.sp,
            accumulation=accumulation, seed=config.seed, pad_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip

    train_loader = loader(train_set, config.train.gradient_accumulation_steps)
    total_steps = sum(train_loader.steps_per_epoch(e) for e in range(config.train.epochs))
    checkpoints = Checkpoints(folder, agreement, config.train.keep_checkpoints)
    state = TrainState(
        step=0,
        epoch=0,
        step_in_epoch=0,
        tokens_seen=0,
        total_steps=min(total_steps, config.train.max_steps or total_steps),
        world=layout.world,
        fingerprint=train_loader.fingerprint,
        trained=trained_fingerprint(built.model),
    )
    found = checkpoints.find(config.train.resume)
    if found is not None:
        path, saved = found
        checkpoints.check_same_run(
            path, saved, world=layout.world, fingerprint=state.fingerprint, trained=state.trained
        )
        checkpoints.load(built.engine, path)
        state = TrainState(**{**vars(saved), "total_steps": state.total_steps})
    records = Records(folder, config.log, total_steps=state.total_steps, first_step=state.step, active=launch.rank == 0)
    wandb_id = agreement.broadcast(records.start_wandb(state.wandb_id, config.model_dump(mode="json")))
    state = TrainState(**{**vars(state), "wandb_id": wandb_id})
    if launch.rank == 0:
        _write_facts(folder, config, settings.engine, layout, device)
        records.say(_header(config, layout, device, train_loader, state, found[0] if found else None))
    phases.done("ready")
    if launch.rank == 0:
        records.say("start-up: " + phases.text())

    writer = ModelWriter(built.model, tokenizer, agreement)
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
        peak_tflops=peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
    )
    trainer.run()
    writer.write_all(folder)
    records.close()
    if launch.rank == 0:
        history = read_metrics(folder / "metrics.jsonl")
        write_card(folder, config, layout, history)
        records.console.print(summary_table(history, folder, (time.monotonic() - started) / 60))
        records.console.print(f"Next: ds-longft export {folder} {folder}-merged   (an ordinary Hugging Face folder)")
    agreement.gather(None)
    dist.destroy_process_group()
    return 0


class Phases:
    """Seconds of each phase of the start-up."""

    def __init__(self, started: float) -> None:
        self.last = started
        self.seconds: list[tuple[str, float]] = []

    def done(self, phase: str) -> None:
        """Close a phase."""
        now = time.monotonic()
        self.seconds.append((phase, now - self.last))
        self.last = now

    def text(self) -> str:
        """All phases in one line."""
        return ", ".join(f"{name} {s:.1f} s" for name, s in self.seconds)


def tokenized(config: RunConfig, tokenizer: Any, *, progress: bool) -> tuple[TokenizedSet, TokenizedSet | None]:
    """The training set and, where asked for, the held-out set; from the cache when nothing changed."""

    def make(sources: list[SourceConfig]) -> TokenizedSet:
        return tokenize_sources(sources, tokenizer, config.data, seed=config.seed, progress=progress)

    train_set = make(config.data.train)
    if config.data.eval:
        return train_set, make(config.data.eval)
    if config.data.eval_fraction:
        train_set, eval_set = train_set.split(config.data.eval_fraction, config.seed)
        if not len(eval_set):
            raise DataError(
                f"data.eval_fraction {config.data.eval_fraction} of {len(train_set)} rows holds out none: raise it"
            )
        return train_set, eval_set
    return train_set, None


def _write_facts(
    folder: Path, config: RunConfig, engine_config: dict[str, Any], layout: ParallelLayout, device: torch.device
) -> None:
    """What the run was made of: re-runnable config, resolved DeepSpeed JSON, versions and machine."""
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "ds_config.json").write_text(json.dumps(engine_config, indent=2) + "\n")
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    machine = {"device": gpu, "cores": os.cpu_count(), "world": layout.world, "sp": layout.sp, "dp": layout.dp}
    (folder / "versions.json").write_text(json.dumps({"versions": versions, "machine": machine}, indent=2) + "\n")


def _header(
    config: RunConfig,
    layout: ParallelLayout,
    device: torch.device,
    loader: StepLoader,
    state: TrainState,
    resumed: Path | None,
) -> str:
    """A few lines that say what is about to happen."""
    lines = [
        f"{config.model.path}: {'LoRA r' + str(config.lora.r) if config.lora else 'full fine-tuning'}, "
        f"{layout.world} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, "
        f"sp {layout.sp} (ranks that share a sample) x dp {layout.dp}",
        f"{loader.steps_per_epoch(0)} steps an epoch, {state.total_steps} in all, packs of up to {config.data.budget_tokens:,} tokens, "
        f"{layout.dp * config.train.gradient_accumulation_steps} packs a step",
    ]
    if resumed:
        lines.append(f"resumed from {resumed} at step {state.step}")
    return "\n".join(lines)
