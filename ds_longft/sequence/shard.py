"""A pack on the CPU -> this rank's `Batch` on its device.

Labels were shifted and documents bordered before this, so a rank only slices: no collective, and every sp rank reads
the same pack.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ds_longft.batch import IGNORE_INDEX, Batch, Documents, Pack
from ds_longft.layout import ParallelLayout


def shard(pack: Pack, layout: ParallelLayout, device: torch.device, *, by_document: bool = False) -> Batch:
    """Slice [S] arrays into this rank's contiguous part: s = S / sp tokens, or the documents that were dealt to it.

    `by_document`: targets know their document. Copies are pinned and asynchronous on GPUs. Positions without a target
    are dropped here, on the host: finding them on the device would cost a synchronisation.
    """
    local = pack.part(layout.sp, layout.sp_rank)
    labels, weights = pack.labels[local], pack.loss_weights[local]
    rows = np.flatnonzero((labels != IGNORE_INDEX) & (weights != 0))

    def put(array: NDArray[np.generic]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    own = None
    if layout.sp > 1 and pack.whole_documents(layout.sp):
        first, last = np.searchsorted(pack.cu_seqlens, [local.start, local.stop])
        mine = pack.cu_seqlens[first : last + 1] - np.int32(local.start)
        own = Documents(put(mine), tuple(np.diff(mine).tolist()))

    return Batch(
        input_ids=put(pack.input_ids[None, local]),  # [1, s]
        position_ids=put(pack.position_ids[None, local]),  # [1, s]
        target_rows=put(rows.astype(np.int64)),  # [t]
        targets=put(labels[rows]),  # [t]
        target_weights=put(weights[rows]),  # [t]
        documents=Documents(put(pack.cu_seqlens), tuple(np.diff(pack.cu_seqlens).tolist()), own),
        document_tokens=tuple(np.diff(np.clip(pack.cu_seqlens, local.start, local.stop)).tolist()),
        target_documents=put(_documents_of(rows + local.start, pack)) if by_document else None,  # [t]
    )


def _documents_of(tokens: NDArray[np.int64], pack: Pack) -> NDArray[np.int64]:
    """The number of the document each token of the whole pack lies in."""
    return np.searchsorted(pack.cu_seqlens, tokens, side="right").astype(np.int64) - 1
