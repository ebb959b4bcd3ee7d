"""RoPE: the frequencies the model holds and the positions it is given, against its config and the documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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
    engine: Any, hf_config: PretrainedConfig, pack: Pack, layout: ParallelLayout, device: torch.device, gather: Gather
) -> list[Finding]:
    """One forward pass of `pack`; the position ids that reach the rotary embedding are caught on the way. Collective."""
    decoder = decoder_of(engine.module.model)
    parts = rope_parts(hf_config)
    rotary = [m for m in decoder.modules() if any(hasattr(m, f"{t}_inv_freq" if t else "inv_freq") for t in parts)]
    seen: list[torch.Tensor] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"] if "position_ids" in kwargs else args[1])

    where = rotary[0] if rotary else decoder
    handle = where.register_forward_pre_hook(catch, with_kwargs=True)
    engine.eval()
    engine(shard(pack, layout, device))
    engine.train()
    handle.remove()
    live = np.concatenate([p for p in gather(seen[0].reshape(-1).cpu().numpy())[: layout.sp]])
    expected = np.concatenate([np.arange(n) for n in np.diff(pack.cu_seqlens)])
    wrong = int((live != expected).sum()) if len(live) == len(expected) else len(expected)
    findings = []
    if parts:
        length = int(np.diff(pack.cu_seqlens).max())
        try:
            error, note = check_rope(decoder, hf_config, length), ", ".join(str(p["rope_type"]) for p in parts.values())
        except ModelError as e:
            error, note = float("inf"), str(e)
        findings.append(
            Finding(CHECK, "inverse frequencies against the config's formula", error <= MAX_RELATIVE_ERROR, f"{error:.1e}",
                    f"{MAX_RELATIVE_ERROR:.0e}", note, error)
        )  # fmt: skip
    else:
        findings.append(Finding(CHECK, "inverse frequencies", None, note=f"{hf_config.model_type} states no RoPE"))
    note = ""
    if wrong:
        first = int(np.flatnonzero(live != expected)[0]) if len(live) == len(expected) else 0
        document = int(np.searchsorted(pack.cu_seqlens, first, side="right")) - 1
        note = (
            f"token {first} (document {document}) has position {live[first]}, expected {expected[first]}: positions have to restart at "
            f"0 in each document and go on over the shards of one"
        )
    findings.append(
        Finding(CHECK, "positions that do not restart at each document", wrong == 0, f"{wrong:,} of {len(expected):,}", "0", note, wrong)
    )  # fmt: skip
    return findings
