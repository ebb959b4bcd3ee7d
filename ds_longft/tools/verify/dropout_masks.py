"""LoRA's dropout: another mask on every rank, the same masks again from the same random state, and in recomputation."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ds_longft.batch import Pack
from ds_longft.exactness.engine_step import Backpropagate, weights_held
from ds_longft.exactness.finding import Finding, Gather
from ds_longft.exactness.packs import weight_of
from ds_longft.layout import ParallelLayout
from ds_longft.train.checkpoint import rng_state, set_rng_state

CHECK = "5 LoRA dropout"


def check_dropout(
    engine: Any, pack: Pack, layout: ParallelLayout, device: torch.device, backpropagate: Backpropagate, gather: Gather
) -> list[Finding]:
    """Run one step twice from this rank's random state as the run starts with it. Collective."""
    dropouts = [m for m in engine.module.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if not dropouts:
        return [Finding(CHECK, "masks", None, note="the model has no dropout (lora.dropout is 0)")]
    start = rng_state()
    losses, masks = [], []
    for _ in range(2):
        set_rng_state(start)
        seen: list[str] = []
        handle = dropouts[0].register_forward_hook(lambda _m, args, out, seen=seen: seen.append(_mask(args[0], out)))
        with weights_held(engine):
            losses.append(float(backpropagate(engine, [pack], weight_of([pack]), layout, device)))
            engine.step()
        handle.remove()
        masks.append(seen)
    set_rng_state(start)
    firsts = gather(masks[0][0])
    different = len(set(firsts))
    repeats = all(gather(masks[0] == masks[1] and losses[0] == losses[1]))
    recomputed = all(gather(len(set(masks[0])) == 1))
    one_seed = "ranks drop the same features: their random numbers start from one seed"
    not_again = "a step cannot be repeated: resuming would not give the same run"
    drawn_anew = "recomputation draws new masks: the gradient belongs to another forward pass"
    all_differ, of_all = different == len(firsts), f"{different} of {len(firsts)}"
    return [
        Finding.judged(CHECK, "different masks on the ranks", all_differ, of_all, "all", one_seed, value=different),
        *(
            Finding.judged(CHECK, what, ok, "yes" if ok else "no", "yes", cause)
            for what, ok, cause in (
                ("same masks and loss from the same random state", repeats, not_again),
                ("same mask when a layer is recomputed", recomputed, drawn_anew),
            )
        ),
    ]


def _mask(before: Tensor, after: Tensor) -> str:
    dropped = (after == 0) & (before != 0)
    return hashlib.sha256(dropped.detach().cpu().numpy().tobytes()).hexdigest()[:16]
