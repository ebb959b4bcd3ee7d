"""The checks in the order that needs least memory: reference model, engine, what it saved, kernels; what they found."""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_longft.batch import Pack
from ds_longft.config.ds_json import Device
from ds_longft.config.preflight import preflight
from ds_longft.config.run_config import RunConfig
from ds_longft.errors import ModelError
from ds_longft.exactness.finding import Finding
from ds_longft.exactness.packs import documents_of, weight_of
from ds_longft.ranks.join import Launch, join
from ds_longft.tools import quickstart
from ds_longft.tools.look.commands import coloured
from ds_longft.tools.verify.baseline import baseline_model, baseline_step
from ds_longft.tools.verify.engine_checks import check_engine
from ds_longft.tools.verify.kernel_error import check_kernels
from ds_longft.tools.verify.quantized_distance import check_distance
from ds_longft.tools.verify.saving import check_saved
from ds_longft.tools.verify.verified_run import VerifiedRun, first_layers

MAX_CHARS = 400  # of a stretch without targets
FILE_WIDTH = 180  # of the table where there is no terminal to ask


def run_checks(
    config: RunConfig, launch: Launch, *, device: Device, checks: frozenset[int], layers: int | None,
    tokens: int | None, original: str | None, as_json: bool,
) -> int:  # fmt: skip
    """All ranks call it alike. Returns 0 where every check passed, 1 where one failed."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // launch.local_world)))
    quickstart.prepare(config)
    with first_layers(config, layers) as shortened, _dense(config, original, layers) as dense:
        settings, sp = preflight(shortened, world=launch.world, local_world=launch.local_world, device=device)
        torch_device, agreement = join(launch)
        from transformers.utils import logging

        logging.set_verbosity_error()  # it would list the weights of the layers left out
        try:
            made = VerifiedRun.make(shortened, settings, sp, torch_device, agreement, tokens=tokens)
            findings, facts, sample = verify_model(made, checks, dense)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of GPU memory: the reference needs the whole model in float32 on one GPU. Give --layers to "
                f"verify the first layers, or fewer --tokens ({str(error).splitlines()[0]})"
            ) from error
    if launch.rank == 0:
        if layers is not None:
            facts["model"] = f"the first {layers} layers of {config.model.path}"
        _print_report(findings, facts, sample, as_json=as_json)
    agreement.gather(None)
    dist.destroy_process_group()
    return 1 if any(f.ok is False for f in findings) else 0


@contextmanager
def _dense(config: RunConfig, original: str | None, layers: int | None) -> Iterator[str | None]:
    """The folder of the unquantised model, as many layers of it as are verified."""
    if original is None:
        yield None
        return
    model = config.model.model_copy(update={"path": original, "revision": None})
    with first_layers(config.model_copy(update={"model": model}), layers) as shortened:
        yield shortened.model.path


def verify_model(
    subject: VerifiedRun, checks: frozenset[int], original: str | None = None
) -> tuple[list[Finding], dict[str, Any], Text]:
    """The findings of the checks asked for, facts about the run, and a sample of trained text. Collective."""
    layout, device, packs = subject.layout, subject.device, subject.packs
    reference = None
    if checks & {1, 6}:
        model = baseline_model(subject.config, subject.dtype, device)
        dpo = subject.config.dpo if subject.config.pairs else None
        reference = baseline_step(model, packs, weight_of(packs), device, layout.rank, layout.world, dpo)
        del model
        _free()
    with tempfile.TemporaryDirectory(prefix="ds_longft-verify-") as work:
        found, model_facts, asked = check_engine(subject, checks, reference, Path(work))
        _free()
        if 6 in checks and reference is not None:
            here: list[Finding] = []
            if layout.rank == 0:
                before = float(reference.token_losses[0].sum())
                here = check_saved(Path(work), subject.config, packs[0], before, subject.dtype, device)
                _free()
            found[6] = subject.agreement.broadcast(here)
    if 7 in checks:
        found[7] = check_kernels(asked, model_facts, packs[0], layout, device, subject.agreement.gather)
    if 8 in checks:
        distance = partial(check_distance, subject.config, original, packs, subject.dtype, device)
        found[8] = subject.agreement.on_rank0(distance)
        _free()
    facts = {
        "model": subject.config.model.path,
        "ranks": layout.world,
        "sp": layout.sp,
        "dp": layout.dp,
        "ZeRO": subject.settings.engine["zero_optimization"]["stage"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "type": str(subject.dtype).removeprefix("torch."),
        "kernel": " ".join(dict.fromkeys(a.kernel for a in asked)),
        "tokens": sum(pack.tokens - pack.padding_tokens for pack in packs),
        "documents": sum(len(pack.cu_seqlens) - 1 - bool(pack.padding_tokens) for pack in packs),
    }
    return [f for number in sorted(found) for f in found[number]], facts, _trained_text(packs[0], subject.tokenizer)


def _free() -> None:
    """Give memory back before the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _trained_text(pack: Pack, tokenizer: Any) -> Text:
    """The first document of a pack that trains something, decoded; what the model learns to write is green."""
    documents = [d for d in documents_of(pack) if d[2].any()]
    if not documents:
        return Text()
    ids, _, weights = documents[0]
    trained = np.concatenate([[False], weights[:-1] != 0])  # a token is trained by the label of the one before it
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    return coloured(((tokenizer.decode(ids[a:b]), float(trained[a])) for a, b in pairwise(edges)), MAX_CHARS)


def _print_report(findings: list[Finding], facts: dict[str, Any], sample: Text | None, *, as_json: bool) -> None:
    """One table, or one JSON object with the same content."""
    failed = [f for f in findings if f.ok is False]
    if as_json:
        names = {"tolerance": "allowed"}
        rows = [{names.get(key, key): value for key, value in asdict(f).items()} for f in findings]
        print(json.dumps({"ok": not failed, **facts, "findings": rows}), flush=True)
        return
    width = None if sys.stdout.isatty() else FILE_WIDTH
    console = Console(highlight=False, width=width)
    if sample:
        console.rule("one document as it is trained: the model learns to write what is green", align="left")
        console.print(sample, soft_wrap=True)
        console.rule()
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    table = Table("check", "what", "measured", "allowed", "", "cause or remark")
    before = ""
    for f in findings:
        verdict = Text("-", "dim") if f.ok is None else Text("ok", "green") if f.ok else Text("FAILED", "bold red")
        table.add_row(f.check if f.check != before else "", f.what, f.measured, f.tolerance, verdict, f.note)
        before = f.check
    console.print(table)
    judged = sum(f.ok is not None for f in findings)
    if failed:
        console.print(
            f"[bold red]{len(failed)} of {judged} findings failed[/]: this run would not train what it should."
        )
    else:
        console.print(f"[bold green]All {judged} findings passed.[/]")
