"""The optimizers of `optim.type`: what each may be combined with, and what it holds. Without torch.

ZeRO hands an optimizer flat pieces of all parameters. What works on each number by itself computes the same there; what
looks at a matrix or at a whole parameter does not, and is refused where nothing would say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_longft.config.run_config import RunConfig


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer."""

    state_bytes: float  # of a trained element, beside its float32 master
    stages: tuple[int, ...] = (0, 1, 2, 3)  # of ZeRO that compute what it is
    why: str = ""  # not under the others
    ds_config: str = ""  # the shipped JSON of an allowed stage
    offload: bool = False  # whether its state may lie in host memory
    package: str = ""  # an extra that it needs: name of the module


KINDS = {
    "adamw": OptimizerKind(8, offload=True),
    "sgd": OptimizerKind(0, offload=True),
    # Two moments of a byte, and of each 256 numbers two float32 scales.
    "adamw_8bit": OptimizerKind(2 + 8 / 256, package="bitsandbytes"),
    # Its momentum, and the next one until the step is taken.
    "muon": OptimizerKind(8),
    "adafactor": OptimizerKind(
        0.25,  # rows and columns of a matrix: 4 / r of an adapter of rank r = 16, less of larger ones
        stages=(0,),
        why="ZeRO cuts matrices into flat pieces, which have no rows and columns to be factored by",
        ds_config="ds_configs/zero0.json",
    ),
    "schedule_free": OptimizerKind(
        8,
        stages=(0, 1, 2),
        why="DeepSpeed steps it once for each piece of ZeRO-3, and each would count as a step of its average",
        ds_config="ds_configs/zero2_sp.json",
        package="schedulefree",
    ),
}


def optim_problems(config: RunConfig) -> list[str]:
    """Keys of `optim` that contradict each other, or would do nothing."""
    optim, kind = config.optim, config.optim.type
    default = type(optim)()
    problems = []
    if kind == "adafactor":
        problems += [
            f"optim.{key} is given, but optim.type is adafactor, which has none: leave it out"
            for key in ("betas", "eps")
            if getattr(optim, key) != getattr(default, key)
        ]
    if kind == "schedule_free":
        if optim.schedule != "constant":
            problems.append(
                f"optim.schedule is {optim.schedule}, but optim.type is schedule_free, which averages weights instead: "
                "set it to constant (the warmup stays)"
            )
        if optim.betas[0] == 0:
            problems.append("optim.betas begins with 0, but optim.type schedule_free divides by it: 0.9 is usual")
    problems += _muon_problems(config)
    return problems


def _muon_problems(config: RunConfig) -> list[str]:
    optim, lora = config.optim, config.lora
    if optim.type != "muon":
        return (
            ["optim.adam_learning_rate is given, but optim.type is not muon: optim.learning_rate is for all weights"]
            if optim.adam_learning_rate is not None
            else []
        )
    problems = []
    if optim.max_grad_norm is not None:
        problems.append(
            f"optim.max_grad_norm is {optim.max_grad_norm:g}, but optim.type is muon, whose updates have one length "
            "whatever the gradient's is, and which DeepSpeed would clip in its place: set it to null"
        )
    beside = lora is None or lora.modules_to_save or config.model.add_tokens
    if beside and optim.adam_learning_rate is None:
        problems.append(
            "optim.adam_learning_rate is missing: optim.type muon trains embeddings, output head and norms with AdamW, "
            "for which Muon's optim.learning_rate is far too high"
        )
    if config.train.verify_first:
        problems.append(
            "train.verify_first reads gradients, which DeepSpeed has replaced by Muon's updates by then: leave it out "
            "with optim.type muon; `ds-longft verify` checks the same"
        )
    return problems


def engine_problems(kind: str, stage: int, *, offloaded: bool, named: bool) -> list[str]:
    """What of the DeepSpeed JSON does not go with an optimizer.

    `named`: the JSON has a section `optimizer`, which this one is not made from.
    """
    facts, problems = KINDS[kind], []
    if facts.why and stage not in facts.stages:
        problems.append(
            f"ds_config: zero_optimization.stage is {stage}, but optim.type is {kind}: {facts.why}. "
            f"Set ds_config to {facts.ds_config}"
        )
    if offloaded and not facts.offload:
        problems.append(
            f"ds_config: zero_optimization.offload_optimizer is given, but optim.type is {kind}, whose state stays on "
            "the GPU: leave it out, or set optim.type to adamw"
        )
    if named:
        problems.append(
            f"ds_config: there is a section optimizer, but optim.type is {kind}, which is made from the keys optim.*: "
            "leave the section out"
        )
    return problems
