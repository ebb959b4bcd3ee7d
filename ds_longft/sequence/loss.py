"""The weighted sum of token losses, over labelled rows only, in chunks: no vocabulary-sized tensor of the whole sample.

The sum is what leaves a rank; who divides by what is one rule for everybody (`train/trainer.py`). A rank whose shard
holds no target still runs the head on zero rows: it contributes an exact zero, and under ZeRO-3 it takes part in the
gathers.

With documents given, one sum for each of them leaves a rank, in float64: the log-probability of a long answer is around
-1e5, where float32 is off by 0.01, and preference losses take differences of two of them.

Letters: s local tokens, t labelled rows, D hidden size, V vocabulary, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from ds_longft.errors import ModelError
from ds_longft.sequence.linear import Member, gather_with

CHUNK_BYTES = 1 << 29
"""Float32 logits of a chunk: 1,046 rows of a 128K vocabulary. Three and a half such tensors are alive at once."""

Transform = Callable[[Tensor], Tensor]


def logit_transform(config: PretrainedConfig) -> Transform:
    """What the model does to its logits after the head: soft capping (Gemma) or nothing.

    Raises:
        ModelError: the config scales its logits in a way this loss does not know.
    """
    unknown = [
        key
        for key in ("logits_scaling", "logit_scale", "lm_head_multiplier")
        if getattr(config, key, None) not in (None, 1, 1.0)
    ]
    if unknown:
        raise ModelError(
            f"{config.model_type} scales its logits ({', '.join(unknown)}), which the chunked loss does not do"
        )
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None:
        return lambda logits: logits
    return lambda logits: torch.tanh(logits / cap) * cap


def _chunk_losses(logits: Tensor, targets: Tensor, weights: Tensor, transform: Transform) -> Tensor:
    """Weighted cross-entropy of a chunk: logits [rows, V] -> [rows] in at least float32."""
    logits = transform(logits)
    # Not of `logits.to(float32)`: on GPUs the conversion is part of this kernel, and of the one of its backward pass.
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return F.nll_loss(log_p, targets, reduction="none") * weights


@dataclass(frozen=True)
class DocumentRows:
    """Which document each labelled row lies in."""

    of_row: Tensor  # [t] int64
    count: int  # N, of the whole pack

    def sums(self, losses: Tensor, rows: slice) -> Tensor:
        """[rows] -> [N] float64."""
        zeros = losses.new_zeros(self.count, dtype=torch.float64)
        return zeros.index_add(0, self.of_row[rows], losses.double())


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and its gradient by the hidden states in one pass over the chunks: with a frozen head nothing is left to
    compute in the backward pass, so its product runs twice and not three times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Member,
        targets: Tensor,
        weights: Tensor,
        transform: Transform,
        chunk_rows: int,
        documents: DocumentRows | None,
    ) -> Tensor:
        """hidden [t, D] -> scalar, or [N] with documents."""
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=dtype)
        if documents is not None:
            total = hidden.new_zeros(documents.count, dtype=torch.float64)
        for a in range(0, len(hidden), chunk_rows):
            rows = slice(a, a + chunk_rows)
            logits = head.plain(hidden[rows])  # [rows, V]
            with torch.enable_grad():
                leaf = logits.detach().requires_grad_(grad is not None)
                losses = _chunk_losses(leaf, targets[rows], weights[rows], transform)  # [rows]
                part = losses.sum()
            total += part.detach() if documents is None else documents.sums(losses.detach(), rows)
            if grad is not None:
                (dlogits,) = torch.autograd.grad(part, leaf)
                torch.mm(dlogits, head.base.weight, out=grad[rows])
                del dlogits
            del logits, leaf, losses, part  # a chunk's logits are gone before the next one's are made
        ctx.grad, ctx.documents = grad, documents
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """[t, D], each row scaled by what its sum is multiplied with."""
        grad, ctx.grad = ctx.grad, None  # the loss outlives the backward pass: it must not hold a hidden state
        # In float32, so of two dimensions: one of none would be rounded to bf16 first, up to 0.4 % off.
        scale = dtotal.view(1, 1) if ctx.documents is None else dtotal[ctx.documents.of_row, None]
        return grad.mul_(scale), None, None, None, None, None, None


def weighted_nll(
    head: Member,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    transform: Transform,
    chunk_rows: int,
    documents: DocumentRows | None = None,
) -> Tensor:
    """sum(weights * cross_entropy(transform(head(hidden)), targets)), a scalar in at least float32.

    hidden [t, D], targets [t], weights [t]. Each chunk's logits [rows, V] live only while it is computed.
    With `documents`: the sum of each document, [N] float64.
    """
    if not any(t.requires_grad for t in head.tensors() if t is not None):
        return _FrozenHeadLoss.apply(hidden, head, targets, weights, transform, chunk_rows, documents)

    def chunk_losses(h: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return _chunk_losses(head.plain(h), y, w, transform)

    chunks = zip(hidden.split(chunk_rows), targets.split(chunk_rows), weights.split(chunk_rows), strict=True)
    parts: list[Any] = [checkpoint(chunk_losses, h, y, w, use_reentrant=False) for h, y, w in chunks]
    if documents is None:
        return torch.stack([part.sum() for part in parts]).sum()
    return documents.sums(torch.cat(parts), slice(None))


class ChunkedHead:
    """Makes a model's output head compute `weighted_nll` in one module call.

    One call, because under ZeRO-3 each call of a module gathers its weights: a number of calls that depended on a
    rank's own labels would leave the other ranks waiting. For the same reason the parts of a head (LoRA on it,
    `modules_to_save`) are gathered with the head and computed here, without calling them.
    """

    def __init__(self, head: nn.Module, member: Member, config: PretrainedConfig, off: Member | None = None) -> None:
        self.head, self.plain, self.member, self.off = head, head.forward, member, off
        self.transform = logit_transform(config)
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * config.vocab_size))

    def __call__(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        documents: DocumentRows | None = None,
    ) -> Tensor:
        """Logits [.., V] as before without targets; with them, the weighted sum over rows [t, D]."""
        if targets is None or weights is None:
            return self.plain(hidden)
        member = self.member
        if getattr(self.head, "disable_adapters", False):
            assert self.off is not None, "the head was installed without its adapter-free form"
            member = self.off
        return weighted_nll(member, hidden, targets, weights, self.transform, self.chunk_rows, documents)

    @classmethod
    def install(cls, model: nn.Module, config: PretrainedConfig, *, adapters_off: bool = False) -> nn.Module:
        """Replace the forward of the model's output head; returns the head.

        `adapters_off`: it will also run with PEFT's adapters switched off, by the weights it had before them. Under
        ZeRO-3 these are gathered with it; beside `modules_to_save` that is a second head.

        Raises:
            ModelError: the model has no head, or one that is not a linear layer.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        linear = head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head
        member = Member.of(linear) if linear is not None else None
        if member is None:
            raise ModelError(
                f"the output head of {type(model).__name__} is {type(linear).__name__}, not a linear layer"
            )
        off = (
            _without_adapters(head)
            if adapters_off and isinstance(head, (BaseTunerLayer, ModulesToSaveWrapper))
            else None
        )
        head.forward = cls(head, member, config, off)
        gather_with(head, (weight for one in (member, off) if one is not None for weight in one.tensors()))
        return head


def _without_adapters(head: Any) -> Member:
    """The head PEFT found: behind LoRA the same weight, behind `modules_to_save` the frozen original."""
    return Member(head.original_module if isinstance(head, ModulesToSaveWrapper) else head.base_layer, None)
