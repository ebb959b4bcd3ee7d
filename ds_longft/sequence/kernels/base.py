"""What a model's layer asks of an attention kernel, and what a kernel promises in return.

Letters: S tokens of the whole pack, hq query heads, hk key/value heads, d head dimension, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ds_longft.errors import ModelError

Capability = tuple[int, int]
Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

NOT_REPEATABLE = "is not shown to repeat to the bit (train.deterministic)"


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention inside each document, as one layer of the model asks for it. Hashable."""

    scale: float
    """Factor on q @ k, usually 1 / sqrt(d)."""

    window: int | None = None
    """Token i sees keys j with i - window < j <= i; None sees all of its document up to i."""

    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap); None leaves them alone."""

    repeatable: bool = False
    """The same inputs give the same gradients to the bit."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ModelError(f"the model's sliding window is {self.window} tokens; expected 1 or more, or none")
        if self.softcap is not None and self.softcap <= 0:
            raise ModelError(f"the model's attention softcap is {self.softcap}; expected above 0, or none")

    def window_for(self, lengths: Sequence[int]) -> int | None:
        """The window in tokens, or None where it is no narrower than the longest document: full attention is faster."""
        return None if self.window is None or self.window >= max(lengths) else self.window


@dataclass(frozen=True)
class Job:
    """What a kernel is asked whether it can do: one layer's attention on one type of device."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    spec: AttentionSpec
    capability: Capability | None = None
    """Compute capability of the GPU; None off CUDA."""


class Saved(NamedTuple):
    """What the backward pass reads of the forward one."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Kernel(Protocol):
    """One way to compute attention over a pack. Stateless; called below autograd.

    Shapes: q [S, hq, d]; k, v [S, hk, d] with hq % hk == 0, query head i reading kv head i // (hq / hk). Inputs may
    be strided views whose last dimension is contiguous. `documents_cu` is [N + 1] int32 on the device of q, `lengths`
    the same N lengths on the host, all at least 1, their sum S.
    """

    @property
    def name(self) -> str:
        """How configs and messages call it."""

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        """Why this kernel cannot do the job exactly, or None if it can.

        Without `here` the job is another machine's: what is installed on this one does not count.
        """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        """(out [S, hq, d] contiguous in q's dtype, lse [hq, S] float32, natural log; float64 for float64 inputs)."""

    def backward(
        self, dout: Tensor, saved: Saved, documents_cu: Tensor, lengths: Sequence[int], spec: AttentionSpec
    ) -> Gradients:
        """Gradients (dq, dk, dv), shaped as q, k, v; dk and dv summed over the query heads that read them."""


def spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each document, in tokens."""
    return pairwise(accumulate(lengths, initial=0))


def refusal(*checks: tuple[bool, str]) -> str | None:
    """The reason of the first check that holds."""
    return next((reason for wrong, reason in checks if wrong), None)


@lru_cache
def import_failure(module: str) -> str | None:
    """Why `module` cannot be imported, or None if it can."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:  # a compiled package built for another torch or CUDA fails in its own way
        return f"{module} does not import: {type(error).__name__}: {error}"
    return None


def flash_refusal(job: Job, oldest: Capability) -> str | None:
    """What every FlashAttention refuses; `oldest` is the first compute capability it runs on."""
    dtype, head_dim, capability = job.dtype, job.head_dim, job.capability
    return refusal(
        (job.device_type != "cuda", f"runs on cuda, not on {job.device_type}"),
        (dtype not in (torch.bfloat16, torch.float16), f"takes bf16 and fp16, not {dtype}"),
        (
            capability is None or capability < oldest,
            f"needs compute capability {oldest[0]}.{oldest[1]}, this GPU has {capability}",
        ),
        (head_dim > 256 or head_dim % 8 != 0, f"takes head dimensions up to 256 in steps of 8, not {head_dim}"),
    )


def flash_window_left(spec: AttentionSpec, lengths: Sequence[int]) -> int:
    """The window as FlashAttention counts it: keys to the left of the token itself, -1 for all."""
    window = spec.window_for(lengths)
    return -1 if window is None else window - 1
