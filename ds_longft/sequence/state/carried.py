"""What layers with a state hand on from texts to their next tokens, where answers are made.

A text is read as training reads it. Each rank keeps the states of the heads that it worked on: there they stay. A new
token of each text is computed on every rank; of a layer with a state a rank does its heads, or channels, and their
outputs are gathered. Convolutions that run before channels are dealt are done by every rank.

Letters: B texts, n tokens, k taps of a convolution, c channels of this rank, H heads of this rank, G groups of heads
that share keys, K and V features of a head's keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ds_longft.batch import Documents
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.tiles import wide

L2_EPSILON = 1e-6
"""Of the norm of queries and keys in delta rules, as flash-linear-attention and transformers have it."""


@dataclass
class Carried:
    """Of one layer. It is filled when the texts are read."""

    texts: int  # B, the first documents of the pack
    tails: list[Tensor] = field(default_factory=list)  # [B, k - 1, c] the last inputs of each of its convolutions
    state: Tensor | None = None  # [B, H, K, V], of Mamba-1 [B, c, N]; in float32 at least

    def keep_tail(self, x: Tensor, documents: Documents, tokens: int, first: int, group: ProcessGroup | None) -> None:
        """x [n, c], the pack's tokens from `first` on: the last `tokens` of each text; of the ranks of a group, which
        have other tokens each. Zeros stand for those before the text.
        """
        borders = documents.cu_seqlens[: self.texts + 1].long()
        at = borders[1:, None] - torch.arange(tokens, 0, -1, device=x.device)  # [B, k - 1]
        here = (at >= borders[:-1, None]) & (at >= first) & (at < first + len(x))
        tail = torch.where(here[..., None], x[(at - first).clamp(0, len(x) - 1)], 0.0)
        if group is not None:
            dist.all_reduce(tail, group=group)
        self.tails.append(tail)

    def with_tail(self, which: int, x: Tensor) -> Tensor:
        """x [B, c], the next inputs of a convolution -> [B, k, c] with those before them."""
        seen = torch.cat([self.tails[which], x[:, None]], 1)
        self.tails[which] = seen[:, 1:]
        return seen

    def keep(self, states: Sequence[Tensor] | Tensor) -> None:
        """States behind each document of the pack, [..] of each."""
        state = states if isinstance(states, Tensor) else torch.stack(list(states))
        self.state = wide(state[: self.texts])

    def delta(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """A delta rule's next token: q, k [B, G, K], v [B, H, V], g [B, H] or [B, H, K], beta [B, H] -> [B, H, V]."""
        assert self.state is not None
        q, k = (_normalised(self._of_heads(t)) for t in (q, k))
        decayed = self.state * (g if g.dim() == 3 else g[..., None]).to(q.dtype).exp()[..., None]
        missing = (v - torch.einsum("bhk,bhkv->bhv", k, decayed)) * beta[..., None]
        self.state = decayed + k[..., None] * missing[:, :, None]
        return torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, self.state).to(v.dtype)

    def decayed(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """Decayed attention's next token: q, k [B, G, K], v [B, H, V], g [B, H] -> [B, H, V]."""
        assert self.state is not None
        q, k = (self._of_heads(t) for t in (q, k))
        self.state = self.state * g.to(q.dtype).exp()[..., None, None] + k[..., None] * v[:, :, None]
        return torch.einsum("bhk,bhkv->bhv", q, self.state).to(v.dtype)

    def scan(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Mamba-1's next token: x and dt [B, c], a [c, N], b and c [B, N] -> [B, c]."""
        assert self.state is not None
        self.state = self.state * torch.exp(dt[..., None] * a) + (dt * x)[..., None] * b[:, None]
        return torch.einsum("bcn,bn->bc", self.state, c)

    def _of_heads(self, t: Tensor) -> Tensor:
        """[B, G, K] -> [B, H, K] in the state's type."""
        assert self.state is not None
        return t.to(self.state.dtype).repeat_interleave(self.state.shape[1] // t.shape[1], 1)


class States:
    """Of all layers of a model."""

    def __init__(self, documents: Documents, layout: ParallelLayout, texts: int) -> None:
        """`documents`: of the pack in which the texts are read."""
        self.documents, self.layout, self.texts = documents, layout, texts
        self._of: dict[nn.Module, Carried] = {}

    def of(self, layer: nn.Module) -> Carried:
        """What this layer carries."""
        return self._of.setdefault(layer, Carried(self.texts))


def _normalised(t: Tensor) -> Tensor:
    return t * torch.rsqrt((t * t).sum(-1, keepdim=True) + L2_EPSILON)
