"""What a model's layer asks of an attention kernel, and what a kernel promises in return.

Letters: S tokens of the whole pack, hq query heads, hk key/value heads, d head dimension, N documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ds_longft.batch import Documents
from ds_longft.errors import ModelError

Capability = tuple[int, int]
Attended = tuple[Tensor, Tensor]  # out, lse
Gradients = tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

UNREPEATABLE = "is not shown to repeat to the bit (train.deterministic)"


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention inside each document, as one layer of the model asks for it. Hashable."""

    scale: float  # on q @ k, usually 1 / sqrt(d)
    window: int | None = None  # token i sees keys j with i - window < j <= i; None: all of its document up to i
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); None leaves them alone
    repeatable: bool = False  # the same inputs give the same gradients to the bit

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ModelError(f"the model's sliding window is {self.window} tokens; expected 1 or more, or none")
        if self.softcap is not None and self.softcap <= 0:
            raise ModelError(f"the model's attention softcap is {self.softcap}; expected above 0, or none")

    def window_for(self, lengths: Sequence[int]) -> int | None:
        """The window in tokens, or None where it is no narrower than the longest document: full attention is faster."""
        return None if self.window is None or self.window >= max(lengths) else self.window

    def keys_to_the_left(self, lengths: Sequence[int]) -> int:
        """The window as FlashAttention counts it: without the token itself, -1 for all."""
        window = self.window_for(lengths)
        return -1 if window is None else window - 1


@dataclass(frozen=True)
class Job:
    """What a kernel is asked whether it can do: one layer's attention on one type of device."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    spec: AttentionSpec
    capability: Capability | None = None  # of the GPU; None off CUDA


class Saved(NamedTuple):
    """What the backward pass reads of the forward one."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class Kernel:
    """One way to compute attention over a pack: what it can do, and its two passes. Stateless; called below autograd.

    Shapes: q [S, hq, d]; k, v [S, hk, d] with hq % hk == 0, query head i reading kv head i // (hq / hk). Inputs may
    be strided views whose last dimension is contiguous. `documents` lie on the device of q and fill the pack.
    """

    name: str  # as configs and messages call it
    device_type = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    oldest: Capability = (8, 0)  # the first compute capability it runs on
    widest_head: int | None = 256
    has_window = has_softcap = repeats = False
    package: str | None = None  # the module that has to be installed

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        """Why this kernel cannot do the job exactly, or None if it can.

        Without `here` the job is another machine's: what is installed on this one does not count.
        """
        dtype, head_dim, spec, on_gpu = job.dtype, job.head_dim, job.spec, self.device_type == "cuda"
        old = on_gpu and (job.capability is None or job.capability < self.oldest)
        oldest, wide = ".".join(map(str, self.oldest)), self.widest_head is not None and head_dim > self.widest_head
        up_to = f"up to {self.widest_head} " if self.widest_head is not None else ""
        names = "bf16 and fp16" if on_gpu else "floating point"
        checks = [
            (job.device_type != self.device_type, f"runs on {self.device_type}, not on {job.device_type}"),
            (dtype not in self.dtypes, f"takes {names}, not {dtype}"),
            (old, f"needs compute capability {oldest}, this GPU has {job.capability}"),
            (on_gpu and (wide or head_dim % 8 != 0), f"takes head dimensions {up_to}in steps of 8, not {head_dim}"),
            (spec.window is not None and not self.has_window, f"has no sliding window (asked for {spec.window})"),
            (spec.softcap is not None and not self.has_softcap, f"has no softcap (asked for {spec.softcap})"),
            (spec.repeatable and not self.repeats, UNREPEATABLE),
            *self.further_limits(job),
        ]
        return next((reason for wrong, reason in checks if wrong), None) or (self.missing() if here else None)

    def further_limits(self, job: Job) -> list[tuple[bool, str]]:
        """More of what it cannot do: whether the job asks for it, and words."""
        return []

    def missing(self) -> str | None:
        """What this machine lacks, or None."""
        return import_failure(self.package) if self.package else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        """(out [S, hq, d] contiguous in q's dtype, lse [hq, S] float32, natural log; float64 for float64 inputs)."""
        raise NotImplementedError

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        """Gradients (dq, dk, dv), shaped as q, k, v; dk and dv summed over the query heads that read them."""
        raise NotImplementedError


class PerDocument(Kernel):
    """A kernel that is called for each document, on slices of the pack."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> Attended:
        assert self.has_softcap or spec.softcap is None
        assert self.has_window or spec.window_for(documents.lengths) is None
        if len(documents.lengths) == 1:
            return self.forward_one(q, k, v, spec)  # no copy of the output
        out = q.new_empty(q.shape)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for a, b in spans(documents.lengths):
            out[a:b], lse[:, a:b] = self.forward_one(q[a:b], k[a:b], v[a:b], spec)
        return out, lse

    def backward(self, dout: Tensor, saved: Saved, documents: Documents, spec: AttentionSpec) -> Gradients:
        if len(documents.lengths) == 1:
            return self.backward_one(dout, saved, spec)
        q, k, v, out, lse = saved
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        for a, b in spans(documents.lengths):
            one = Saved(q[a:b], k[a:b], v[a:b], out[a:b], lse[:, a:b])
            dq[a:b], dk[a:b], dv[a:b] = self.backward_one(dout[a:b], one, spec)
        return dq, dk, dv

    def forward_one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Attended:
        """`forward` of one document."""
        raise NotImplementedError

    def backward_one(self, dout: Tensor, saved: Saved, spec: AttentionSpec) -> Gradients:
        """`backward` of one document."""
        raise NotImplementedError


def spans(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each document, in tokens."""
    return pairwise(accumulate(lengths, initial=0))


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
