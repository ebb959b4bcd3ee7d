"""The optimizers of `optim.type`: what each may be combined with, and what it holds. Without torch.

ZeRO hands an optimizer flat pieces of all parameters. What works on each number by itself computes the same there; what
looks at a matrix or at a whole parameter does not, and is refused where nothing would say so.
"""

from __future__ import annotations

from dataclasses import dataclass


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


def engine_problems(kind: str, stage: int, *, offloaded: bool, named: bool) -> list[str]:
    """What of the DeepSpeed JSON does not go with an optimizer, named by its key.

    `named`: the JSON has a section `optimizer`, which this one is not made from.
    """
    facts, problems = KINDS[kind], []
    if facts.why and stage not in facts.stages:
        problems.append(
            f"zero_optimization.stage is {stage}, but optim.type is {kind}: {facts.why}. "
            f"Set ds_config to {facts.ds_config}"
        )
    if offloaded and not facts.offload:
        problems.append(
            f"zero_optimization.offload_optimizer is given, but optim.type is {kind}, whose state stays on "
            "the GPU: leave it out, or set optim.type to adamw"
        )
    if named:
        problems.append(
            f"there is a section optimizer, but optim.type is {kind}, which is made from the keys optim.*: "
            "leave the section out"
        )
    return problems
