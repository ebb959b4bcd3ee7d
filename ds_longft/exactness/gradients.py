"""Loss and gradients of one way to compute a step against another: how far apart, and if too far, why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ds_longft.exactness.engine_step import Gradients
from ds_longft.exactness.finding import ROUNDING_GROWTH, Finding, Tolerance, nan_as_inf
from ds_longft.layout import ParallelLayout

CHECK = "1 loss and gradients"


@dataclass(frozen=True)
class Difference:
    """A step's distance from the reference's; relative."""

    loss: float
    ratio: float  # gradient norm over the reference's
    direction: float  # 1 - cosine between the two gradients
    worst: float  # largest difference of one parameter, against the norm of the whole reference gradient
    worst_name: str

    @property
    def gradient_norm(self) -> float:
        """Relative difference of the norms."""
        return abs(self.ratio - 1)


def difference(ours: Gradients, reference: Gradients) -> Difference:
    """How far `ours` lies from `reference`. Rank 0 only, where the gradients are."""
    assert set(ours.grads) == set(reference.grads), "other parameters are trained than in the reference"
    dot = squares = ours_squares = 0.0
    apart = {"": 0.0}
    for name, truth in reference.grads.items():
        a, b = ours.grads[name].double(), truth.double()
        dot += float((a * b).sum())
        squares, ours_squares = squares + float(b.square().sum()), ours_squares + float(a.square().sum())
        apart[name] = nan_as_inf(float((a - b).norm()))
    worst_name = max(apart, key=lambda name: apart[name])
    worst = apart[worst_name]
    norm, ours_norm = math.sqrt(squares), math.sqrt(ours_squares)
    away = 1 - dot / (norm * ours_norm) if norm and ours_norm else float(norm != ours_norm)
    return Difference(
        loss=abs(ours.loss - reference.loss) / max(abs(reference.loss), 1e-30),
        ratio=ours_norm / norm if norm else float(ours_norm == 0),
        direction=max(0.0, nan_as_inf(away)),
        worst=worst / norm if norm else worst,
        worst_name=worst_name,
    )


def judge(
    what: str, ours: Gradients, reference: Gradients, tolerance: Tolerance, *, cause: Callable[[Difference], str],
    rounding: Difference | None = None,
) -> tuple[list[Finding], Difference]:  # fmt: skip
    """Findings on one run (rank 0 only). `cause` puts a failure into words.

    `rounding`: the distance of a run without any splitting in the same type; what is judged may be ROUNDING_GROWTH
    times as far where that is more than the tolerance.
    """
    d = difference(ours, reference)

    def allowed(name: str) -> float:
        usual = float(getattr(tolerance, name))
        grown = ROUNDING_GROWTH * float(getattr(rounding, name)) if rounding else 0.0
        return max(usual, grown) if math.isfinite(grown) else usual

    rows = [
        ("loss", d.loss, allowed("loss"), f"{ours.loss:.6f} against {reference.loss:.6f}"),
        ("gradient norm", d.gradient_norm, allowed("gradient_norm"), f"{ours.norm:.6g} against {reference.norm:.6g}"),
        ("gradient direction, 1 - cosine", d.direction, allowed("direction"), ""),
        ("worst parameter's gradient", d.worst, allowed("worst"), d.worst_name),
    ]
    why = "" if all(value <= limit for _, value, limit, _ in rows) else cause(d)
    return [
        Finding.at_most(CHECK, f"{what}: {name}", value, limit, why, remark=note) for name, value, limit, note in rows
    ], d


@dataclass(frozen=True)
class Suspects:
    """What a wrong step is compared with, to name the cause."""

    layout: ParallelLayout
    loss: float
    means_of_means: Sequence[float] = ()  # losses that averaging over the ranks' own means would give, where known

    def cause(self, d: Difference) -> str:
        """The likely cause of a difference, in one or two sentences."""
        sp, dp, world = self.layout.sp, self.layout.dp, self.layout.world
        mean = min(self.means_of_means, key=lambda mean: abs(mean - self.loss), default=math.inf)
        if abs(mean - self.loss) < 0.1 * d.loss * abs(self.loss):
            return (
                f"the loss is the average of the ranks' own means ({mean:.6f}): weights are averaged per rank. Each "
                f"rank has to contribute its sum, divided by the weight of the whole step"
            )
        factors = {"sp": sp, "dp": dp, "the number of ranks": world}
        for name, n in factors.items():
            for ratio, how in ((float(n), "multiplied"), (1.0 / n, "divided")):
                if n > 1 and math.isclose(d.ratio, ratio, rel_tol=0.02) and d.direction < 0.05:
                    return (
                        f"the gradient points the right way and is {d.ratio:.3f} times as long: scaled by {name} "
                        f"({how} by {n}). The loss's factor and the engine's averaging over ranks do not match"
                    )
        if d.direction < 1e-2 and d.gradient_norm > 1e-2:
            return f"the gradient points the right way and is {d.ratio:.3f} times as long: the loss scale is wrong"
        if d.loss <= 1e-4 or (d.loss <= 1e-2 < d.direction):
            return "the loss is right, the gradient is not: the backward pass of attention, exchange or recomputation"
        return (
            "loss and gradient differ: the forward pass is another one. If check 2 fails as well, documents see each "
            "other; if 3 fails, labels are wrong; if 4 fails, positions are; if 7 fails, the attention kernel is"
        )


def finite(gradients: Gradients) -> bool:
    """Whether loss and gradients hold numbers only. Rank 0 only."""
    return math.isfinite(gradients.loss) and all(bool(torch.isfinite(g).all()) for g in gradients.grads.values())
