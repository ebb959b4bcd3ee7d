"""What the loss of preference pairs multiplies the token losses of each document with, computed by one process.

The log-probabilities come from the yardstick's own documents, one at a time; the reference is the same model without
adapters, or, where every weight is trained, the model itself, which nothing has changed yet.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from ds_longft.batch import Pack
from ds_longft.config.run_config import DpoConfig
from ds_longft.objectives.objective import reference_of
from ds_longft.objectives.pair_loss import pair_losses
from ds_longft.tools.verify.baseline import document_losses


@torch.no_grad()
def pair_scales(model: nn.Module, pack: Pack, dpo: DpoConfig, device: torch.device) -> tuple[float, dict[int, float]]:
    """(weighted sum of the pairs' losses, scale of each document's token losses by its first token)."""
    if not pack.pairs:  # padding alone
        return 0.0, {}
    count = len(pack.pairs)
    starts = pack.cu_seqlens[: 2 * count].tolist()
    policy = _logps(model, pack, starts, device)
    reference = None
    if reference_of(dpo, lora=hasattr(model, "peft_config")) != "none":
        with model.disable_adapter() if hasattr(model, "peft_config") else nullcontext():  # type: ignore[operator]
            reference = _logps(model, pack, starts, device)
    targets = [float((pack.loss_weights[a:b] != 0).sum()) for a, b in zip(starts, pack.cu_seqlens[1:], strict=False)]
    lengths = torch.tensor(targets, dtype=torch.float64, device=device).clamp_min(1.0).view(-1, 2)
    weights = torch.from_numpy(pack.pairs.weights.astype(np.float64)).to(device)
    pairs = pair_losses(policy, reference, lengths, dpo)
    # The token losses are -log p.
    scales = (-pairs.gradient * weights[:, None]).flatten().tolist()
    return float(pairs.losses @ weights), dict(zip(starts, scales, strict=True))


def _logps(model: nn.Module, pack: Pack, starts: list[int], device: torch.device) -> Any:
    """[P, 2] float64; 0 for a document without a target."""
    sums = dict.fromkeys(starts, 0.0)
    for a, _, losses in document_losses(model, pack, device):
        sums[a] = -float(losses.double().sum())
    return torch.tensor(list(sums.values()), dtype=torch.float64, device=device).view(-1, 2)
