"""The loss of every token of one text that may be split over ranks, summed in stretches of positions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ds_longft.batch import Pack
from ds_longft.evaluate.subject import Loaded
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope import set_rope_length
from ds_longft.sequence.loss import CHUNK_BYTES, logit_transform
from ds_longft.sequence.shard import shard


@torch.no_grad()
def bucket_losses(loaded: Loaded, pack: Pack, layout: ParallelLayout, kernel: str, buckets: int) -> NDArray[np.float64]:
    """[2, buckets]: this rank's sums of losses (nats) and numbers of targets by position of the predicted token.

    Collective over the sp group: attention exchanges heads. The text's logits are never held whole.
    """
    config = loaded.plain.config
    transform, head = logit_transform(config), loaded.plain.get_output_embeddings()
    batch = shard(pack, layout, loaded.device)
    set_rope_length(loaded.plain.get_decoder(), pack.tokens)
    hidden = loaded.plain.get_decoder()(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        documents=batch.documents,
        layout=layout,
        kernel=kernel,
    ).last_hidden_state[0]  # [s, D]
    chunk_rows = max(1, CHUNK_BYTES // (4 * config.vocab_size))
    losses = torch.zeros(len(batch.targets), dtype=torch.float64, device=loaded.device)
    for a in range(0, len(batch.targets), chunk_rows):
        rows = slice(a, a + chunk_rows)
        logits = transform(head(hidden[batch.target_rows[rows]])).float()
        losses[rows] = F.cross_entropy(logits, batch.targets[rows], reduction="none").double()
    s = pack.tokens // layout.sp
    positions = batch.target_rows.cpu().numpy() + layout.sp_rank * s + 1  # of the token that is predicted
    bucket = np.minimum(positions * buckets // pack.tokens, buckets - 1)
    sums = np.bincount(bucket, weights=losses.cpu().numpy(), minlength=buckets)
    return np.stack([sums, np.bincount(bucket, minlength=buckets)])
