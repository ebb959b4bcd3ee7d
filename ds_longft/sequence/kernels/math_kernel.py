"""`math`: attention by its definition, for every device, dtype, window and softcap.

The yardstick of the other kernels, and the one that serves what they refuse. Scores live in float32 (float64 for
float64 inputs) and exist for one chunk of queries at a time, so 32K tokens do not build a 32K x 32K matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ds_longft.sequence.kernels.base import Attended, AttentionSpec, Gradients, Job, PerDocument, Saved

SCORES_PER_CHUNK = 1 << 24  # scores held at once: 64 MiB in float32, a few times that with what backward needs


def _chunks(length: int, heads: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of a document, and the keys that any of them may see: up to the last of the queries."""
    keys = length if window is None else min(length, window)
    rows = max(1, SCORES_PER_CHUNK // (heads * keys))
    for start in range(0, length, rows):
        end = min(start + rows, length)
        yield slice(start, end), slice(0 if window is None else max(0, start - window + 1), end)


def _scores(q: Tensor, keys: Tensor, rows: slice, seen: slice, spec: AttentionSpec) -> Tensor:
    """[hk, g, rows, seen]: scaled, capped, and -inf where a query may not look. q [hk, g, rows, d], keys [hk, L, d]."""
    scores = torch.matmul(q, keys[:, seen].transpose(1, 2)[:, None]) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    i = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    j = torch.arange(seen.start, seen.stop, device=q.device)[None, :]
    hidden = j > i
    if spec.window is not None:
        hidden = hidden | (j <= i - spec.window)
    return scores.masked_fill_(hidden, -torch.inf)


def _by_kv_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[L, h, d] -> [hk, h / hk, L, d] in `dtype`."""
    length, heads, d = x.shape
    return x.to(dtype).reshape(length, kv_heads, heads // kv_heads, d).permute(1, 2, 0, 3)


class MathKernel(PerDocument):
    """Reference kernel; see the module's head."""

    name = "math"
    has_window = has_softcap = True

    def refuses(self, job: Job, *, here: bool = True) -> str | None:
        """Never."""
        return None

    def forward_one(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Attended:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=wide)
        keys, values = (x.to(wide).transpose(0, 1) for x in (k, v))
        for rows, seen in _chunks(len(q), q.shape[1], spec.window):
            scores = _scores(_by_kv_head(q[rows], k.shape[1], wide), keys, rows, seen, spec)
            lse_rows = torch.logsumexp(scores, -1)
            weights = scores.sub_(lse_rows[..., None]).exp_()
            mixed = torch.matmul(weights, values[:, None, seen])
            out[rows] = mixed.flatten(0, 1).transpose(0, 1).to(out.dtype)
            lse[:, rows] = lse_rows.flatten(0, 1)
        return out, lse

    def backward_one(self, dout: Tensor, saved: Saved, spec: AttentionSpec) -> Gradients:
        """See `Kernel.backward`. The weights are rebuilt from `lse`, chunk by chunk."""
        q, k, v, out, lse = saved
        wide, kv_heads, dq = lse.dtype, k.shape[1], q.new_empty(q.shape)
        keys, values = (x.to(wide).transpose(0, 1) for x in (k, v))
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, seen in _chunks(len(q), q.shape[1], spec.window):
            q_rows, dout_rows, out_rows = (_by_kv_head(x[rows], kv_heads, wide) for x in (q, dout, out))
            scores = _scores(q_rows, keys, rows, seen, spec)
            weights = torch.exp(scores - lse[:, rows].unflatten(0, (kv_heads, -1))[..., None])
            dvalues[:, seen] += torch.matmul(weights.transpose(2, 3), dout_rows).sum(1)
            dweights = torch.matmul(dout_rows, values[:, None, seen].transpose(2, 3))
            dscores = weights * (dweights - (dout_rows * out_rows).sum(-1, keepdim=True))
            if spec.softcap is not None:  # hidden scores are -inf, their weight is 0: keep them out of inf * 0
                slope = 1 - (scores / spec.softcap).square()
                dscores = torch.where(weights == 0, 0.0, dscores * slope)
            dscores *= spec.scale
            dq[rows] = torch.matmul(dscores, keys[:, None, seen]).flatten(0, 1).transpose(0, 1).to(dq.dtype)
            dkeys[:, seen] += torch.matmul(dscores.transpose(2, 3), q_rows).sum(1)
        return dq, dkeys.transpose(0, 1).to(k.dtype), dvalues.transpose(0, 1).to(v.dtype)
