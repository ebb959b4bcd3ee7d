"""Checks 1 to 5 on a live engine, built as the run would build it; at the end its weights are saved for check 6."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PretrainedConfig

from ds_longft.batch import Pack
from ds_longft.config.run_config import OptimConfig
from ds_longft.errors import ModelError
from ds_longft.exactness.engine_step import Gradients, step_gradients, weights_held
from ds_longft.exactness.finding import TOLERANCE, Finding
from ds_longft.exactness.gradients import Suspects, judge
from ds_longft.exactness.isolation import check_borders, check_isolation, decoder_of
from ds_longft.exactness.labels import check_labels
from ds_longft.exactness.packs import in_two, two_documents, weight_of
from ds_longft.model.dropout import without_dropout
from ds_longft.model.facts import ModelFacts
from ds_longft.model.rope import MAX_RELATIVE_ERROR, check_rope
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.sequence.shard import shard
from ds_longft.tools.verify.baseline import Baseline
from ds_longft.tools.verify.kernel_error import Asked, asked_of_attention
from ds_longft.tools.verify.verified_run import VerifiedRun, wake_adapters
from ds_longft.train.checkpoint import rng_state, set_rng_state
from ds_longft.train.device_memory import own_memory_gib
from ds_longft.train.engine import Built, build
from ds_longft.train.install import known_run
from ds_longft.train.step import backpropagate
from ds_longft.train.weights import ModelWriter

ROPE, DROPOUT = "4 RoPE", "5 LoRA dropout"


def check_engine(
    subject: VerifiedRun, checks: frozenset[int], reference: Baseline | None, work: Path
) -> tuple[dict[int, list[Finding]], ModelFacts, list[Asked]]:
    """Findings by number of check, the model's facts, and what its layers ask of attention. Collective.

    The engine is gone when this returns; `work` holds what it saved, if check 6 is asked for.
    """
    layout, device, gather = subject.layout, subject.device, subject.agreement.gather
    memory_gib, _ = own_memory_gib(device)  # the engine that the run will have
    config = subject.config
    if config.optim.type == "muon":  # DeepSpeed keeps its updates where gradients are read; no step is taken here
        config = config.model_copy(update={"optim": OptimConfig()})
    known = known_run(config, subject.settings, layout, device, memory_gib=memory_gib)
    built = build(known, layout, device, prepare=wake_adapters)
    engine, pack = built.engine, subject.packs[0]
    found: dict[int, list[Finding]] = {}
    if 5 in checks:  # first: the random state is still the one a run starts with
        found[5] = _check_dropout(engine, subject)
    if 1 in checks and reference is not None:
        with weights_held(engine), without_dropout(engine.module):
            found[1] = _check_gradients(subject, built, reference)
    if 2 in checks:
        neighbours = two_documents(pack, layout.sp)
        found[2] = [check_borders(subject.step.packs, gather)]
        leak, vocab = TOLERANCE[subject.dtype].leak, known.facts.vocab
        found[2] += check_isolation(engine, neighbours, layout, device, leak, vocab)
    if 3 in checks:
        found[3] = check_labels(subject.step.packs, subject.step.total_weight, layout, gather)
    if 4 in checks:
        found[4] = _check_positions(engine, known.hf_config, subject)
    asked = asked_of_attention(engine, pack, layout, device)
    if 6 in checks:
        ModelWriter(built.model, subject.tokenizer, subject.agreement).write_all(work, print)
    engine.destroy()
    return found, known.facts, asked


def _check_gradients(subject: VerifiedRun, built: Built, reference: Baseline) -> list[Finding]:
    """Check 1: one step in four ways, each against the reference."""
    layout, packs, tolerance = subject.layout, subject.packs, TOLERANCE[subject.dtype]
    alone = replace(layout, sp=1, group=None)
    weight = weight_of(packs)

    def run(kind: str) -> Gradients:
        match kind:
            case "one":  # every rank does all of it: world times the weight
                mine, split, divisor = packs, alone, weight * layout.world
            case "dp":
                mine, split, divisor = packs[layout.rank :: layout.world], alone, weight
            case "sp":
                mine, split, divisor = packs[layout.dp_rank :: layout.dp], layout, weight
            case _:  # each pack's documents in two packs
                halves = [half for pack in packs for half in in_two(pack, layout.sp)]
                mine, split, divisor = halves[layout.dp_rank :: layout.dp], layout, weight
        return step_gradients(built.engine, backpropagate, mine, divisor, split, subject.device)

    rounding = None
    findings: list[Finding] = []
    ways = {"one": "one process"}
    if layout.world > 1:
        ways |= {"dp": f"dp {layout.world}", "sp": f"sp {layout.sp}" + (f" dp {layout.dp}" if layout.dp > 1 else "")}
    ways["halves"] = f"sp {layout.sp}, accumulation split in two"
    for kind, name in ways.items():
        ours = run(kind)
        if layout.rank:
            continue
        means = reference.means_of_means(packs, layout) if kind == "sp" and packs[0].documents_per_row == 1 else ()
        suspects = Suspects(alone if kind in ("one", "dp") else layout, ours.loss, means)
        rows, apart = judge(name, ours, reference.gradients, tolerance, cause=suspects.cause, rounding=rounding)
        findings += rows
        if kind == "one":
            rounding = apart
    return subject.agreement.broadcast(findings)


@torch.no_grad()
def _check_positions(engine: Any, hf_config: PretrainedConfig, subject: VerifiedRun) -> list[Finding]:
    """Check 4: the position ids of the run's own packs as the data made them, and those that reach the model in a
    forward pass.
    """
    pack, layout, gather = subject.packs[0], subject.layout, subject.agreement.gather
    decoder = decoder_of(engine.module.model)
    held = [f"{kind}_inv_freq" if kind else "inv_freq" for kind in rope_parts(hf_config)]
    rotary = [m for m in decoder.modules() if any(hasattr(m, name) for name in held)]
    seen: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    where = rotary[0] if rotary else decoder
    handle = where.register_forward_pre_hook(catch, with_kwargs=True)
    engine.eval()
    engine(shard(pack, layout, subject.device))
    engine.train()
    handle.remove()
    axes = seen[0].reshape(-1, seen[0].shape[-1]).cpu().numpy()  # one; three alike where images have places too
    live = np.concatenate(gather(axes)[: layout.sp], axis=1)  # [axes, S]
    expected = _restarting(pack)
    fits = live.shape[1] == len(expected)
    wrong = int((live != expected).any(0).sum()) if fits else len(expected)
    cause = ""
    if wrong:
        first = int(np.flatnonzero((live != expected).any(0))[0]) if fits else 0
        document = int(np.searchsorted(pack.cu_seqlens, first, side="right")) - 1
        cause = (
            f"token {first} (of document {document}) has position {live[:, first].max()}, expected {expected[first]}: "
            f"position ids have to restart at 0 in each document and go on over the shards of one"
        )
    made = sum(gather(sum(int((p.position_ids != _restarting(p)).sum()) for p in subject.step.packs)))
    when_made = "position ids do not restart at 0 in each document when packs are made"
    of_all = f"{wrong:,} of {len(expected):,} wrong"
    return [
        _frequencies(decoder, hf_config, pack),
        Finding.judged(ROPE, "position ids of the packs", not made, f"{made:,} wrong", "0", when_made, value=made),
        Finding.judged(ROPE, "position ids that reach the model", not wrong, of_all, "0", cause, value=wrong),
    ]


def _frequencies(decoder: nn.Module, hf_config: PretrainedConfig, pack: Pack) -> Finding:
    parts = rope_parts(hf_config)
    if not parts:
        return Finding(ROPE, "inverse frequencies", None, note=f"{hf_config.model_type} states no RoPE")
    try:
        error = check_rope(decoder, hf_config, np.diff(pack.cu_seqlens).tolist())
        note = ", ".join(str(p["rope_type"]) for p in parts.values())
    except ModelError as e:
        error, note = float("inf"), str(e)
    what = "inverse frequencies against the config's formula"
    return Finding.at_most(ROPE, what, error, MAX_RELATIVE_ERROR, note, remark=note)


def _restarting(pack: Pack) -> NDArray[np.int64]:
    """[S] positions that start at 0 in each document."""
    return np.concatenate([np.arange(n, dtype=np.int64) for n in np.diff(pack.cu_seqlens)])


def _check_dropout(engine: Any, subject: VerifiedRun) -> list[Finding]:
    """Check 5: one step twice from this rank's random state as the run starts with it. Another mask on every rank, the
    same masks again, and in recomputation.
    """
    pack, gather = subject.packs[0], subject.agreement.gather
    dropouts = [m for m in engine.module.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if not dropouts:
        return [Finding(DROPOUT, "masks", None, note="the model has no dropout (lora.dropout is 0)")]
    start = rng_state()
    losses, masks = [], []
    for _ in range(2):
        set_rng_state(start)
        seen: list[str] = []
        handle = dropouts[0].register_forward_hook(lambda _m, args, out, seen=seen: seen.append(_mask(args[0], out)))
        with weights_held(engine):
            losses.append(float(backpropagate(engine, [pack], weight_of([pack]), subject.layout, subject.device)))
            engine.step()
        handle.remove()
        masks.append(seen)
    set_rng_state(start)
    firsts = gather(masks[0][0])
    different = len(set(firsts))
    repeats = all(gather(masks[0] == masks[1] and losses[0] == losses[1]))
    recomputed = all(gather(len(set(masks[0])) == 1))
    one_seed = "ranks drop the same features: their random numbers start from one seed"
    not_again = "a step cannot be repeated: resuming would not give the same run"
    drawn_anew = "recomputation draws new masks: the gradient belongs to another forward pass"
    all_differ, of_all = different == len(firsts), f"{different} of {len(firsts)}"
    return [
        Finding.judged(DROPOUT, "different masks on the ranks", all_differ, of_all, "all", one_seed, value=different),
        *(
            Finding.judged(DROPOUT, what, ok, "yes" if ok else "no", "yes", cause)
            for what, ok, cause in (
                ("same masks and loss from the same random state", repeats, not_again),
                ("same mask when a layer is recomputed", recomputed, drawn_anew),
            )
        ),
    ]


def _mask(before: Tensor, after: Tensor) -> str:
    dropped = (after == 0) & (before != 0)
    return hashlib.sha256(dropped.detach().cpu().numpy().tobytes()).hexdigest()[:16]
