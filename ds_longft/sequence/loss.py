"""The weighted sum of token losses, over labelled rows only, in chunks: no vocabulary-sized tensor of the whole sample.

The sum is what leaves a rank; who divides by what is one rule for everybody (`train/step.py`). A rank whose shard
holds no target still runs the head on zero rows: it contributes an exact zero, and under ZeRO-3 it takes part in the
gathers.

With documents given, one sum for each of them leaves a rank, in float64: the log-probability of a long answer is around
-1e5, where float32 is off by 0.01, and preference losses take differences of two of them.

Letters: s local tokens, t labelled rows, D hidden size, V vocabulary, N documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn

from ds_longft.errors import ModelError
from ds_longft.sequence.head import HeadRule, head_rule
from ds_longft.sequence.linear import Member, gather_with
from ds_longft.sequence.new_rows import WithRows
from ds_longft.sequence.tiles import tiles_of

CHUNK_BYTES = 1 << 29
"""Float32 logits of a chunk: 1,046 rows of a 128K vocabulary. Three and a half such tensors are alive at once."""


class TokenLoss(Protocol):
    """The losses of a chunk of tokens; everything else here is the same for any of them."""

    def __call__(
        self, logits: Tensor, targets: Tensor, weights: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses [rows] in at least float32, without a graph; with `gradient` also that of their sum [rows, V].

        logits [rows, V] are not needed again: the gradient may take their place. Losses are linear in `weights` [rows].
        """


@dataclass(frozen=True)
class WeightedCrossEntropy:
    """weights * cross_entropy(transform(logits), targets)."""

    transform: Callable[[Tensor], Tensor] | None = None  # what the model does with its head's logits, e.g. a soft cap

    def __call__(
        self, logits: Tensor, targets: Tensor, weights: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `TokenLoss`."""
        logits = logits.detach()
        if self._in_one_kernel(logits):
            from ds_longft.sequence.kernels.cross_entropy import cross_entropy_

            losses = cross_entropy_(logits, targets, weights, gradient=gradient)
            return losses, logits if gradient else None
        with torch.set_grad_enabled(gradient):
            x = logits.requires_grad_(gradient)
            x = x if self.transform is None else self.transform(x)
            log_p = torch.log_softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
            losses = F.nll_loss(log_p, targets, reduction="none") * weights
            dlogits = torch.autograd.grad(losses.sum(), logits)[0] if gradient else None
        return losses.detach(), dlogits

    def _in_one_kernel(self, logits: Tensor) -> bool:
        """On GPUs; torch's builds for them bring Triton."""
        return logits.is_cuda and self.transform is None


@dataclass(frozen=True)
class DocumentRows:
    """Which document each labelled row lies in."""

    of_row: Tensor  # [t] int64
    count: int  # N, of the whole pack

    def sums(self, losses: Tensor, rows: slice) -> Tensor:
        """[rows] -> [N] float64."""
        zeros = losses.new_zeros(self.count, dtype=torch.float64)
        return zeros.index_add(0, self.of_row[rows], losses.double())


@dataclass(frozen=True)
class _Rows:
    """What each labelled row of a pack is compared with, and how its losses are summed."""

    targets: Tensor  # [t]
    weights: Tensor  # [t]
    loss: TokenLoss
    chunk_rows: int
    documents: DocumentRows | None

    def chunks(self) -> list[slice]:
        """The rows in pieces whose logits fit."""
        return tiles_of(len(self.targets), self.chunk_rows)

    def losses(
        self, logits: Tensor, rows: slice, *, gradient: bool, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `TokenLoss` of some rows, logits [rows, V]. `scale` [t] or [1] multiplies the losses."""
        weights = self.weights[rows]
        if scale is not None:
            weights = weights * (scale if len(scale) == 1 else scale[rows])
        return self.loss(logits, self.targets[rows], weights, gradient=gradient)

    def zero(self, hidden: Tensor) -> Tensor:
        """The empty sum: a scalar in at least float32, or [N] float64."""
        if self.documents is not None:
            return hidden.new_zeros(self.documents.count, dtype=torch.float64)
        return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))

    def sum(self, losses: Tensor, rows: slice) -> Tensor:
        """[rows] -> scalar, or [N] with documents."""
        return losses.sum() if self.documents is None else self.documents.sums(losses, rows)

    def scale_of_rows(self, dtotal: Tensor) -> Tensor:
        """The gradient of the sum, or of each document's -> [t], or [1] where it is the same for all rows."""
        return dtotal.view(1) if self.documents is None else dtotal[self.documents.of_row]


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and its gradient by the hidden states in one pass over the chunks: with a frozen head nothing is left to
    compute in the backward pass, so its product runs twice and not three times.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Member, labelled: _Rows) -> Tensor:
        """hidden [t, D] -> scalar, or [N] with documents."""
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = labelled.zero(hidden)
        for rows in labelled.chunks():
            logits = head.plain(hidden[rows])  # [rows, V]
            losses, dlogits = labelled.losses(logits, rows, gradient=grad is not None)
            total += labelled.sum(losses, rows)
            if grad is not None:
                assert dlogits is not None
                torch.mm(dlogits, head.base.weight, out=grad[rows])
            del logits, dlogits  # gone before the next chunk's are made
        ctx.grad, ctx.labelled = grad, labelled
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """[t, D], each row scaled by what its sum is multiplied with."""
        grad, ctx.grad = ctx.grad, None  # the loss outlives the backward pass: it must not hold a hidden state
        # Keep the scale 2-D: a 0-dim tensor would be cast to bf16 before the product (0.4 % off).
        return grad.mul_(ctx.labelled.scale_of_rows(dtotal)[:, None]), None, None


class _TrainedHeadLoss(torch.autograd.Function):
    """The same where the head, its adapter or its bias is trained: each chunk's logits again in the backward pass,
    which alone knows by what the rows of each document are multiplied.

    The head's gradient is summed over the chunks in float32 and rounded once. Autograd would round the sum after each
    chunk: in bf16 1.4 % off with 128 chunks, and 131,072 rows of a 128K vocabulary are 125.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Member, labelled: _Rows, *tensors: Tensor | None) -> Tensor:
        """hidden [t, D] -> scalar, or [N] with documents. `tensors`: of the head, as `Member.tensors` names them."""
        ctx.save_for_backward(hidden)
        ctx.head, ctx.labelled = head, labelled
        total = labelled.zero(hidden)
        for rows in labelled.chunks():
            total += labelled.sum(labelled.losses(head.plain(hidden[rows]), rows, gradient=False)[0], rows)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """[t, D], and of each tensor that is trained."""
        (hidden,) = ctx.saved_tensors
        head, labelled, scale = ctx.head, ctx.labelled, ctx.labelled.scale_of_rows(dtotal)
        # Not the parameters themselves: they have hooks, for the gradient that leaves here.
        needed = ctx.needs_input_grad[3:]
        leaves = [
            None if t is None else t.detach().requires_grad_(need)
            for t, need in zip(head.tensors(), needed, strict=True)
        ]
        trained = [t for t in leaves if t is not None and t.requires_grad]
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in trained]
        dhidden = torch.empty_like(hidden)
        for rows in labelled.chunks():
            h = hidden[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = head.plain(h, leaves)
            _, dlogits = labelled.losses(logits, rows, gradient=True, scale=scale)
            dhidden[rows], *grads = torch.autograd.grad(logits, [h, *trained], dlogits)
            for total in sums:
                total.add_(grads.pop(0))
            del h, logits, dlogits  # not beside the next chunk's
        rounded = (total.to(t.dtype) for total, t in zip(sums, trained, strict=True))
        return dhidden, None, None, *(next(rounded) if need else None for need in needed)


def token_loss_sum(
    head: Member,
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor,
    loss: TokenLoss,
    chunk_rows: int,
    documents: DocumentRows | None = None,
) -> Tensor:
    """The sum of loss(head(hidden), targets, weights), a scalar in at least float32.

    hidden [t, D], targets [t], weights [t]. Each chunk's logits [rows, V] live only while it is computed.
    With `documents`: the sum of each document, [N] float64.
    """
    labelled, tensors = _Rows(targets, weights, loss, chunk_rows, documents), head.tensors()
    if any(t.requires_grad for t in tensors if t is not None):
        return _TrainedHeadLoss.apply(hidden, head, labelled, *tensors)
    return _FrozenHeadLoss.apply(hidden, head, labelled)


class ChunkedHead:
    """Makes a model's output head compute `token_loss_sum` in one module call.

    One call, because under ZeRO-3 each call of a module gathers its weights: a number of calls that depended on a
    rank's own labels would leave the other ranks waiting. For the same reason the parts of a head (LoRA on it,
    `modules_to_save`) are gathered with the head and computed here, without calling them.
    """

    def __init__(self, head: nn.Module, member: Member, rule: HeadRule, off: Member | None = None) -> None:
        self.head, self.plain, self.member, self.rule, self.off = head, head.forward, member, rule, off
        self.loss: TokenLoss = WeightedCrossEntropy(None if rule.plain else rule.logits)
        self.chunk_rows = max(1, CHUNK_BYTES // (4 * member.base.out_features))

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
        return token_loss_sum(member, self.rule.inputs(hidden), targets, weights, self.loss, self.chunk_rows, documents)

    @classmethod
    def install(cls, model: nn.Module, *, adapters_off: bool = False) -> nn.Module:
        """Replace the forward of the model's output head; returns the head.

        `adapters_off`: it will also run with PEFT's adapters switched off, by the weights it had before them. Under
        ZeRO-3 these are gathered with it; beside `modules_to_save` that is a second head.
        Raises ModelError: the model has no head, one that is not a linear layer, or a forward that does with it what
        the loss cannot do.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, TrainableTokensWrapper):
            with_rows = WithRows.of(head)
            head.forward = cls(head, with_rows, head_rule(model), Member(head.original_module, None))
            gather_with(head, with_rows.tensors())
            return head
        linear = head.modules_to_save[head.active_adapters[0]] if isinstance(head, ModulesToSaveWrapper) else head
        member = Member.of(linear) if linear is not None else None
        if member is None and isinstance(linear, BaseTunerLayer):
            raise ModelError(
                "the adapters on the output head have dropout or DoRA, which the chunked loss does not do: leave "
                "lm_head out of lora.targets, or set lora.dropout to 0 and lora.dora to false"
            )
        if member is None:
            raise ModelError(
                f"the output head of {type(model).__name__} is {type(linear).__name__}, not a linear layer"
            )
        off = (
            _without_adapters(head)
            if adapters_off and isinstance(head, (BaseTunerLayer, ModulesToSaveWrapper))
            else None
        )
        head.forward = cls(head, member, head_rule(model), off)
        gather_with(head, (weight for one in (member, off) if one is not None for weight in one.tensors()))
        return head


def _without_adapters(head: Any) -> Member:
    """The head PEFT found: behind LoRA the same weight, behind `modules_to_save` the frozen original."""
    return Member(head.original_module if isinstance(head, ModulesToSaveWrapper) else head.base_layer, None)
