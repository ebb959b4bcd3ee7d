"""The nouns that travel from the data to the loss: `Pack`, `Pairs`, `Documents`, `Batch`, `Step`.

Letters: S tokens of the whole pack, s = S / sp tokens of one rank's shard, N documents of a pack, P preference pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a pack: documents 2i and 2i + 1 of it are the chosen and the rejected answer of pair i,
    each behind the prompt.
    """

    weights: NDArray[np.float32]  # [P], of each pair in the loss
    reference: NDArray[np.float64] | None = None  # [P, 2] the reference's log-probabilities, where they are precomputed

    def __len__(self) -> int:
        return len(self.weights)

    def part(self, which: slice) -> Pairs:
        """Some of the pairs without their reference: what is left of them may be cut."""
        return Pairs(self.weights[which])


@dataclass(frozen=True)
class Pack:
    """One unit of work on the CPU: documents laid head to tail, complete before any sharding.

    Everything that needs the whole sequence is done here, so that a rank only slices.
    A tail of padding, where there is one, is a document of its own with zero weights.
    """

    input_ids: NDArray[np.int64]  # [S]
    position_ids: NDArray[np.int64]  # [S], restarts at 0 in each document
    labels: NDArray[np.int64]  # [S], shifted inside each document; IGNORE_INDEX where there is no target
    loss_weights: NDArray[np.float32]  # [S], 0 where nothing is trained
    cu_seqlens: NDArray[np.int32]  # [N + 1], 0 ... S
    padding_tokens: int  # how many of the S tokens are padding
    rows: tuple[int, ...] = ()  # which rows of the tokenized set lie in it, in order
    rank_borders: tuple[int, ...] | None = None  # sp + 1 positions between which each sp rank holds whole documents
    pairs: Pairs | None = None  # of preference data; loss_weights are then 1 at each token of an answer

    @property
    def tokens(self) -> int:
        """S, padding included."""
        return len(self.input_ids)

    @property
    def documents_per_row(self) -> int:
        """A pair is two documents."""
        return 1 if self.pairs is None else 2

    @property
    def total_weight(self) -> float:
        """Sum of the loss weights, or of those of pairs: the pack's share of what the loss divides by."""
        weights = self.loss_weights if self.pairs is None else self.pairs.weights
        return float(weights.sum(dtype=np.float64))

    def whole_documents(self, sp: int) -> bool:
        """Whether each of `sp` ranks holds documents that no other has a part of."""
        return self.rank_borders is not None and len(self.rank_borders) == sp + 1

    def part(self, sp: int, sp_rank: int) -> slice:
        """The tokens of one rank: its documents, or an even part of all tokens."""
        if self.rank_borders is not None and self.whole_documents(sp):
            return slice(self.rank_borders[sp_rank], self.rank_borders[sp_rank + 1])
        assert self.tokens % sp == 0, f"{self.tokens} tokens over sp {sp}"
        s = self.tokens // sp
        return slice(sp_rank * s, (sp_rank + 1) * s)


@dataclass(frozen=True)
class Documents:
    """Borders of the documents of one pack, the same on every rank of an sp group.

    `lengths` lives on the host, so that no kernel choice needs a device synchronisation.
    """

    cu_seqlens: torch.Tensor  # [N + 1] int32, on the device, global positions
    lengths: tuple[int, ...]  # N document lengths in tokens
    own: Documents | None = None  # this rank's, where each rank holds whole documents: attention needs no other rank

    @cached_property
    def positions(self) -> torch.Tensor:
        """[S] int64, each token's place in its document; made for the first layer that asks."""
        starts = self.cu_seqlens.long()[:-1]
        of_each = starts.repeat_interleave(self.cu_seqlens.diff().long(), output_size=sum(self.lengths))
        return starts.new_ones(len(of_each)).cumsum(0) - 1 - of_each

    @cached_property
    def borders(self) -> dict[str, torch.Tensor]:
        """As flash-linear-attention takes them. It makes its own indices of chunks once for each tensor object; the
        copy on the host spares it a synchronisation.
        """
        on_device = self.cu_seqlens.long()
        return {
            "cu_seqlens": on_device,
            "cu_seqlens_cpu": on_device.new_tensor([0, *self.lengths], device="cpu").cumsum(0),
        }


@dataclass(frozen=True)
class Batch:
    """One rank's contiguous slice of a pack, on its device, with the borders of the whole pack.

    Only labelled positions are carried for the loss: t of the s local tokens have a target.
    """

    input_ids: torch.Tensor  # [1, s] int64
    position_ids: torch.Tensor  # [1, s] int64
    target_rows: torch.Tensor  # [t] int64, positions in the shard whose next token is trained
    targets: torch.Tensor  # [t] int64
    target_weights: torch.Tensor  # [t] float32
    documents: Documents
    document_tokens: tuple[int, ...]  # [N] how many of each document's tokens are in this slice, on the host
    target_documents: torch.Tensor | None = (
        None  # [t] int64, the document each target lies in; where sums are by document
    )


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on, as one dp rank sees it."""

    epoch: int
    index: int  # in the epoch
    packs: tuple[Pack, ...]  # this dp rank's, one per accumulation micro-step
    total_weight: float  # sum of loss_weights (of pair weights) over every pack of the step on every dp rank
    tokens: int  # tokens without padding over every dp rank
    padding_tokens: int  # padding over every dp rank
