"""Save, load again as anybody would, merge: the loss has to stay what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ds_longft.batch import Pack
from ds_longft.config.run_config import RunConfig
from ds_longft.exactness.finding import Finding
from ds_longft.model.load import load_model
from ds_longft.model.lora import WEIGHTS_NAME
from ds_longft.model.packed import unpack
from ds_longft.model.wrapped import text_class
from ds_longft.tools.verify.baseline import document_losses, in_float32, plain_config

CHECK = "6 save and load"
SAME = 1e-5
"""Relative. Both sides are float32 over the same weights, so nothing but a lost or rounded weight is above it."""


def check_saved(
    folder: Path, config: RunConfig, pack: Pack, loss_before: float, dtype: torch.dtype, device: torch.device
) -> list[Finding]:
    """Read what the engine's weights were saved as and compare float32 losses over `pack`. Rank 0 only.

    `loss_before`: sum of w * ce over `pack` by the reference, whose weights the engine started with.
    """
    hf_config = plain_config(config)
    if config.lora is None:
        unset_hf_deepspeed_config()  # of the engine's models: this one is loaded by one rank alone
        model: Any = text_class(hf_config).from_pretrained(
            folder, config=hf_config, dtype=dtype, use_safetensors=True,
            attn_implementation=hf_config._attn_implementation,
        )  # fmt: skip
        loss = _loss(in_float32(model.to(device)), pack, device)
        return [_same("full model: loss after save and load", loss, loss_before)]
    base = load_model(config.model, hf_config, ds_engine_config=None, dtype=dtype, device=device, seed=config.seed)
    unpack(base)  # what is merged into a packed weight is lost
    model = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    in_float32(model)
    loss = _loss(model, pack, device)
    with model.disable_adapter():
        moved = abs(_loss(model, pack, device) - loss) / max(abs(loss), 1e-30)
    without = "adapter: the loss without it is another"
    lost = "the saved adapter does nothing: its weights were lost or are zeros"
    merged = _loss(model.merge_and_unload(), pack, device)
    return [
        _not_empty(folder / WEIGHTS_NAME),
        _same("adapter: loss after save and load", loss, loss_before),
        Finding.judged(CHECK, without, moved > SAME, f"{moved:.1e}", f"> {SAME:.0e}", lost, value=moved),
        _same("merged model: loss against the adapter's", merged, loss),
    ]


def _same(what: str, loss: float, expected: float) -> Finding:
    error = abs(loss - expected) / max(abs(expected), 1e-30)
    cause = "weights are lost, rounded or named otherwise on the way through the file"
    return Finding.at_most(CHECK, what, error, SAME, cause)


def _not_empty(file: Path) -> Finding:
    with safe_open(file, framework="pt") as tensors:
        sizes = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    empty = [name for name, t in sizes.items() if t.numel() == 0 or not bool(t.any())]
    cause = f"{empty[0] if empty else 'the file'} is empty or all zeros: shards were saved, not whole weights"
    what, counted = "adapter: tensors that are empty or zero", f"{len(empty)} of {len(sizes)}"
    return Finding.judged(CHECK, what, bool(sizes) and not empty, counted, "0", cause)


@torch.no_grad()
def _loss(model: nn.Module, pack: Pack, device: torch.device) -> float:
    model.eval()
    return sum(float(losses.double().sum()) for _, _, losses in document_losses(model, pack, device))
