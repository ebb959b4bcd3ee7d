"""Checks 1 to 5 on a live engine, built as the run would build it; at the end its weights are saved for check 6."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ds_longft.config.run_config import OptimConfig
from ds_longft.exactness.engine_step import Gradients, step_gradients, weights_held
from ds_longft.exactness.finding import TOLERANCE, Finding
from ds_longft.exactness.gradients import Suspects, judge
from ds_longft.exactness.isolation import check_borders, check_isolation
from ds_longft.exactness.labels import check_labels
from ds_longft.exactness.packs import in_two, two_documents, weight_of
from ds_longft.model.dropout import without_dropout
from ds_longft.model.facts import ModelFacts
from ds_longft.tools.verify.baseline import Baseline
from ds_longft.tools.verify.dropout_masks import check_dropout
from ds_longft.tools.verify.kernel_error import Asked, asked_of_attention
from ds_longft.tools.verify.positions import check_positions
from ds_longft.tools.verify.verified_run import VerifiedRun, wake_adapters
from ds_longft.train.device_memory import own_memory_gib
from ds_longft.train.engine import Built, build
from ds_longft.train.install import known_run
from ds_longft.train.step import backpropagate
from ds_longft.train.weights import ModelWriter


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
        found[5] = check_dropout(engine, pack, layout, device, backpropagate, gather)
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
        found[4] = check_positions(engine, known.hf_config, subject.step.packs, pack, layout, device, gather)
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
