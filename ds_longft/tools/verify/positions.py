"""RoPE: the frequencies the model holds and the positions it is given, against its config and the documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

from ds_longft.batch import Pack
from ds_longft.errors import ModelError
from ds_longft.exactness.finding import Finding, Gather
from ds_longft.exactness.isolation import decoder_of
from ds_longft.layout import ParallelLayout
from ds_longft.model.rope import MAX_RELATIVE_ERROR, check_rope
from ds_longft.model.rope_formulas import rope_parts
from ds_longft.sequence.shard import shard

CHECK = "4 RoPE"


@torch.no_grad()
def check_positions(
    engine: Any,
    hf_config: PretrainedConfig,
    packs: Sequence[Pack],
    pack: Pack,
    layout: ParallelLayout,
    device: torch.device,
    gather: Gather,
) -> list[Finding]:
    """The position ids of `packs` as the data made them, and those that reach the model in a forward pass of `pack`.

    Collective; the findings are the same on every rank.
    """
    decoder = decoder_of(engine.module.model)
    held = [f"{kind}_inv_freq" if kind else "inv_freq" for kind in rope_parts(hf_config)]
    rotary = [m for m in decoder.modules() if any(hasattr(m, name) for name in held)]
    seen: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    where = rotary[0] if rotary else decoder
    handle = where.register_forward_pre_hook(catch, with_kwargs=True)
    engine.eval()
    engine(shard(pack, layout, device))
    engine.train()
    handle.remove()
    axes = seen[0].reshape(-1, seen[0].shape[-1]).cpu().numpy()  # one; three alike where images have places too
    live = np.concatenate(gather(axes)[: layout.sp], axis=1)  # [axes, S]
    expected = _restarting(pack)
    fits = live.shape[1] == len(expected)
    wrong = int((live != expected).any(0).sum()) if fits else len(expected)
    cause = ""
    if wrong:
        first = int(np.flatnonzero((live != expected).any(0))[0]) if fits else 0
        document = int(np.searchsorted(pack.cu_seqlens, first, side="right")) - 1
        cause = (
            f"token {first} (of document {document}) has position {live[:, first].max()}, expected {expected[first]}: "
            f"position ids have to restart at 0 in each document and go on over the shards of one"
        )
    made = sum(gather(sum(int((p.position_ids != _restarting(p)).sum()) for p in packs)))
    when_made = "position ids do not restart at 0 in each document when packs are made"
    of_all = f"{wrong:,} of {len(expected):,} wrong"
    return [
        _frequencies(decoder, hf_config, pack),
        Finding.judged(CHECK, "position ids of the packs", not made, f"{made:,} wrong", "0", when_made, value=made),
        Finding.judged(CHECK, "position ids that reach the model", not wrong, of_all, "0", cause, value=wrong),
    ]


def _frequencies(decoder: nn.Module, hf_config: PretrainedConfig, pack: Pack) -> Finding:
    parts = rope_parts(hf_config)
    if not parts:
        return Finding(CHECK, "inverse frequencies", None, note=f"{hf_config.model_type} states no RoPE")
    try:
        error = check_rope(decoder, hf_config, np.diff(pack.cu_seqlens).tolist())
        note = ", ".join(str(p["rope_type"]) for p in parts.values())
    except ModelError as e:
        error, note = float("inf"), str(e)
    what = "inverse frequencies against the config's formula"
    return Finding.at_most(CHECK, what, error, MAX_RELATIVE_ERROR, note, remark=note)


def _restarting(pack: Pack) -> NDArray[np.int64]:
    """[S] positions that start at 0 in each document."""
    return np.concatenate([np.arange(n, dtype=np.int64) for n in np.diff(pack.cu_seqlens)])
