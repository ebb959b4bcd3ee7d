"""How far a quantised base lies from the model that it was made of: what adapters learn on is another model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ds_longft.batch import Pack
from ds_longft.config.run_config import ModelConfig, RunConfig
from ds_longft.errors import ModelError
from ds_longft.exactness.finding import Finding
from ds_longft.model.load import load_config
from ds_longft.model.load_packed import base_format, stored_as
from ds_longft.model.read_model import read_config
from ds_longft.tools.verify.baseline import baseline_model, document_logits

CHECK = "8 quantised base"
ROWS = 1024
"""Targets whose logits are compared: of a vocabulary of 128K they take 0.5 GiB of host memory."""

FAR = 0.7
"""Of the logits' norm. SmolLM2-135M, which is small and so suffers most, is 0.04 (int8), 0.08 (fp8) and 0.31 (nf4)
away, with losses of 0.0, 0.6 and 5.1 % more; of weights that are read wrongly they are 1 and more away."""


def check_distance(
    config: RunConfig, original: str | None, packs: Sequence[Pack], dtype: torch.dtype, device: torch.device
) -> list[Finding]:
    """Loss and logits of the base alone, without adapters, made dense, and of the unquantised model. One rank alone.

    `original`: where the unquantised model lies, if not at `model.path`.

    Raises:
        ModelError: `original` is quantised, or another model.
    """
    hf_config = load_config(config.model, config.data.max_length_tokens, attn_implementation="sdpa")
    form = base_format(hf_config, config.model)
    if form is None or (reason := _none_to_compare(config.model, hf_config, original)):
        note = "the base is not quantised" if form is None else reason
        return [Finding(CHECK, "distance to the unquantised model", None, note=note)]
    dense = config.model.model_copy(update={"quantize": "none"})
    if original is not None:
        dense = dense.model_copy(update={"path": original, "revision": None})
        if stored_as(read_config(dense)):
            raise ModelError(f"--original is {original}, which is quantised itself: give the checkpoint in 16 bits")
    ours, theirs = (_answers(config, model, packs, dtype, device) for model in (config.model, dense))
    if ours[1].shape != theirs[1].shape:
        raise ModelError(f"--original is {original}, another model: its logits are {list(theirs[1].shape)} in shape")
    apart = float((ours[1] - theirs[1]).norm() / theirs[1].norm())
    same = float((ours[1].argmax(-1) == theirs[1].argmax(-1)).float().mean())
    loss = f"{ours[0]:.4f} and {theirs[0]:.4f} ({(ours[0] / theirs[0] - 1):+.1%})"
    made = f"{form.name} made dense: what adapters learn on, and are merged into"
    cause = "weights are read in another order or with other scales than they were written with"
    remark = f"the likeliest next token is the same for {same:.1%} of {len(ours[1]):,} targets"
    return [
        Finding(CHECK, "loss of the base, and of the unquantised model", None, loss, note=made, value=ours[0]),
        Finding.at_most(CHECK, "logits, relative distance", apart, FAR, cause, remark=remark),
    ]


def _none_to_compare(model: ModelConfig, hf_config: PretrainedConfig, original: str | None) -> str:
    if model.random_weights:
        return "random weights are drawn as they lie: there is no other model"
    if stored_as(hf_config) and original is None:
        return "the checkpoint is quantised in its files: give what it was made of as --original"
    return ""


@torch.no_grad()
def _answers(
    config: RunConfig, model: ModelConfig, packs: Sequence[Pack], dtype: torch.dtype, device: torch.device
) -> tuple[float, Tensor]:
    """Mean loss of all targets, by weight; logits of the first `ROWS` [rows, V] float32 on the CPU, less their mean."""
    base: nn.Module = baseline_model(config.model_copy(update={"model": model, "lora": None}), dtype, device).eval()
    total = weight = 0.0
    kept: list[Tensor] = []
    for pack in packs:
        for document in document_logits(base, pack, device):
            total += float(document.losses.double().sum())
            weight += float(document.weights.double().sum())
            more = ROWS - sum(map(len, kept))
            if more > 0:
                kept.append((document.logits[:more] - document.logits[:more].mean(-1, keepdim=True)).cpu())
    return total / weight, torch.cat(kept)
