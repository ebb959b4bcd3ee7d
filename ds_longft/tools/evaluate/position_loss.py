"""The loss of every token of one text that may be split over ranks.

A text is read whole, or in windows: documents of one pack, isolated from each other as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ds_longft.batch import IGNORE_INDEX, Pack
from ds_longft.data.pack import pack_of
from ds_longft.layout import ParallelLayout
from ds_longft.objectives.forward import decode
from ds_longft.sequence.head import head_rule
from ds_longft.sequence.loss import CHUNK_BYTES
from ds_longft.sequence.shard import shard
from ds_longft.tools.evaluate.subject import Loaded

KEPT_SHARE = 4  # a window begins so long before its first loss: a fourth of it


@dataclass(frozen=True)
class ReadText:
    """One text as it is read: each of its tokens but the first is a target exactly once."""

    pack: Pack
    positions: NDArray[np.int64]  # [S] in the text, of the tokens of the pack


def read_in_windows(
    ids: Sequence[int], window_tokens: int, multiple: int, overlap_tokens: int | None = None
) -> ReadText:
    """Each token with a quarter of a window to a whole one before it; those of the first window with all there is.

    What a model of that window can do on this very text: windows overlap by a quarter, where only the earlier one
    counts. A window as long as the text reads it whole. `multiple`: the pack is padded to one of this.
    `overlap_tokens`: instead of the quarter.
    """
    array = np.asarray(ids, dtype=np.int64)
    overlap = window_tokens // KEPT_SHARE if overlap_tokens is None else overlap_tokens
    documents, positions = [], []
    for start in range(0, max(1, len(array) - overlap), window_tokens - overlap):
        part = array[start : start + window_tokens]
        first = overlap if start else 1  # the first token of the document that counts
        labels = np.full(len(part), IGNORE_INDEX, dtype=np.int64)
        labels[first - 1 : -1] = part[first:]
        documents.append((part, labels, (labels != IGNORE_INDEX).astype(np.float32)))
        positions.append(np.arange(start, start + len(part)))
    pack = pack_of(documents, multiple)
    positions.append(np.zeros(pack.padding_tokens, dtype=np.int64))
    return ReadText(pack, np.concatenate(positions))


@torch.no_grad()
def token_losses(
    loaded: Loaded, text: ReadText, layout: ParallelLayout, kernel: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """This rank's t targets: their positions in the text and their losses (nats), [t] each.

    Collective over the sp group: attention exchanges heads. The text's logits are never held whole.
    """
    pack = text.pack
    rule, head = head_rule(loaded.plain), loaded.plain.get_output_embeddings()
    batch = shard(pack, layout, loaded.device)
    hidden = decode(loaded.plain.get_decoder(), batch, layout, kernel)  # [s, D]
    chunk_rows = max(1, CHUNK_BYTES // (4 * loaded.plain.config.get_text_config().vocab_size))
    losses = torch.zeros(len(batch.targets), dtype=torch.float64, device=loaded.device)
    for a in range(0, len(batch.targets), chunk_rows):
        rows = slice(a, a + chunk_rows)
        logits = rule.logits(head(rule.inputs(hidden[batch.target_rows[rows]]))).float()
        losses[rows] = F.cross_entropy(logits, batch.targets[rows], reduction="none").double()
    rows = batch.target_rows.cpu().numpy() + pack.part(layout.sp, layout.sp_rank).start
    return text.positions[rows] + 1, losses.cpu().numpy()
