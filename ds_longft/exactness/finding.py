"""`Finding`: one measured answer, and how far off it may be for each type of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Gather = Callable[[Any], list[Any]]
"""Every rank's small value, in rank order, on every rank; collective."""


def nan_as_inf(value: float) -> float:
    """A number that max() and min() can compare: they lose one that is none, max(0.0, nan) is 0.0."""
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True)
class Finding:
    """One row of the table. The same on every rank."""

    check: str  # its number and name, e.g. `1 loss and gradients`
    what: str  # what was compared
    ok: bool | None  # None: the check does not apply, `note` says why
    measured: str = ""  # for people
    tolerance: str = ""  # what is allowed
    note: str = ""  # where it failed: the likely cause. Else what was looked at
    value: float | None = None  # the number that was judged, for machines

    @classmethod
    def judged(
        cls, check: str, what: str, ok: bool, measured: str, tolerance: str, cause: str, *, value: float | None = None,
        remark: str = "",
    ) -> Finding:  # fmt: skip
        """A finding whose note is the cause where it failed, the remark where it did not."""
        return cls(check, what, ok, measured, tolerance, remark if ok else cause, value)

    @classmethod
    def at_most(cls, check: str, what: str, value: float, allowed: float, cause: str, *, remark: str = "") -> Finding:
        """A finding on a number that may be as large as `allowed`; not a number is too large."""
        ok = value <= allowed
        return cls.judged(check, what, ok, f"{value:.1e}", f"{allowed:.0e}", cause, value=value, remark=remark)


@dataclass(frozen=True)
class Tolerance:
    """How far a distributed step may lie from one process. Relative, by norm."""

    loss: float
    gradient_norm: float
    direction: float  # 1 - cosine between the two whole gradients
    worst: float  # largest difference of one parameter's gradient, against the norm of the whole gradient
    leak: float  # what another document's states may move, against those of the document that was changed


TOLERANCE = {
    # One process in float32 is itself 1e-6 to 1e-5 away from float64 on models of 30 layers (sums of thousands of terms
    # in another order). Every fault this is to find moves the numbers by percents.
    torch.float32: Tolerance(loss=1e-5, gradient_norm=1e-4, direction=1e-6, worst=2e-4, leak=1e-6),
    # bf16 keeps 8 bits: each rounding is 2e-3 relative, and they add up through the layers, forward and backward.
    torch.bfloat16: Tolerance(loss=1e-2, gradient_norm=4e-2, direction=1e-2, worst=1e-1, leak=1e-2),
}

ROUNDING_GROWTH = 1.5
"""In bf16 the reference is float32, so most of the distance is bf16's own. What sp adds is judged against the distance
of a run in bf16 without sp: at most this many times as far."""
