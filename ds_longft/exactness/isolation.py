"""Document isolation: change one token, and nothing of any other document (or before it) may move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_longft.batch import Pack
from ds_longft.exactness.finding import Finding, Gather, nan_as_inf
from ds_longft.layout import ParallelLayout
from ds_longft.sequence.shard import shard

CHECK = "2 document isolation"
PROBES = 3  # documents that are changed in turn


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers inside a causal language model or a PEFT model around one."""
    causal_lm: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return causal_lm.get_decoder()


def check_borders(packs: Sequence[Pack], gather: Gather) -> Finding:
    """Whether every row of the packs is a document of its own (a pair two), as the data made them. Collective."""
    missing = [  # of each pack, below zero where it has too many: one of each must not add up to none
        len(p.rows) * p.documents_per_row + bool(p.padding_tokens) - (len(p.cu_seqlens) - 1) for p in packs if p.rows
    ]
    lost, extra = (sum(gather(sum(max(0, sign * n) for n in missing))) for sign in (1, -1))
    cause = (
        f"{lost} borders between rows are missing in the packs' cu_seqlens: their rows would see each other"
        if lost
        else f"{extra} borders in the packs' cu_seqlens are none between rows: tokens would not see all of their row"
    )
    wrong = lost + extra
    return Finding.judged(CHECK, "rows without a border to the next", wrong == 0, str(wrong), "0", cause, value=wrong)


def check_isolation(
    engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device, allowed: float, vocab_size: int
) -> list[Finding]:
    """Change the middle token of some documents of `pack`, one at a time, and watch the last layer's hidden states.

    Logits are a function of the hidden state at the same place: what does not move there does not move in the logits.
    `allowed`: how far others may move, as a share of what the changed document moves. Collective over the world, with
    the same pack on every rank.
    """
    borders = pack.cu_seqlens.tolist()
    documents = list(pairwise(borders))
    real = documents[:-1] if pack.padding_tokens else documents
    long_enough = [i for i, (a, b) in enumerate(real) if b - a >= 2]
    if not long_enough or len(documents) < 2:
        return [Finding(CHECK, "other documents", None, note="the pack holds a single document")]
    before = _hidden_states(engine, pack, layout, device)
    worst_other = worst_earlier = 0.0
    least_own, most_own, leak = math.inf, 0.0, ""
    for i in long_enough[:: max(1, len(long_enough) // PROBES)][:PROBES]:
        a, b = documents[i]
        at = (a + b) // 2
        ids = pack.input_ids.copy()
        ids[at] = (ids[at] + vocab_size // 2) % vocab_size
        moved = (_hidden_states(engine, replace(pack, input_ids=ids), layout, device) - before).abs().amax(-1)  # [s]
        whole = torch.zeros(pack.tokens, device=device, dtype=moved.dtype)
        whole[pack.part(layout.sp, layout.sp_rank)] = moved.nan_to_num(nan=math.inf, posinf=math.inf)
        dist.all_reduce(whole, op=dist.ReduceOp.MAX)
        own = float(whole[at:b].max())
        least_own, most_own = min(least_own, own), max(most_own, own)
        shares = whole / max(own, 1e-30)
        worst_earlier = max(worst_earlier, nan_as_inf(float(shares[a:at].max())))
        for j, (c, d) in enumerate(documents):
            other = nan_as_inf(float(shares[c:d].max())) if j != i else 0.0
            if other > worst_other:
                worst_other, leak = other, f"a token of document {i} moves document {j}"
    dropped = (
        f"{leak}: attention does not stop at the borders of the documents (their mask, cu_seqlens, was dropped or "
        "documents were merged)"
    )
    backwards = "earlier tokens see a later one: attention is not causal"
    at_most = partial(Finding.at_most, CHECK)
    moves = partial(Finding.judged, CHECK, "states behind the changed token do move")
    if most_own < math.inf:
        still = "nothing moves at all: the model does not read its input"
        own_states = moves(least_own > 0, f"{least_own:.1e}", "> 0", still, value=least_own)
    else:
        own_states = moves(False, "no number", "> 0", "the model's hidden states are no numbers", value=most_own)
    return [
        at_most("states of other documents, one token changed", worst_other, allowed, dropped),
        at_most("states before the changed token", worst_earlier, allowed, backwards),
        own_states,
    ]


@torch.no_grad()
def _hidden_states(engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device) -> Tensor:
    """[s, D] float32: what the last layer hands to the head, for this rank's tokens."""
    was_training, seen = engine.training, list[Any]()
    handle = decoder_of(engine.module.model).register_forward_hook(lambda _module, _given, out: seen.append(out))
    engine.eval()
    try:
        engine(shard(pack, layout, device))
    finally:
        handle.remove()
    engine.train(was_training)
    return seen[0].last_hidden_state[0].float()
