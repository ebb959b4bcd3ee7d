"""Tokens that a model did not have: rows of its embeddings for them, made alike wherever the model is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def widen(model: PreTrainedModel, rows: int) -> None:
    """Give input and output embeddings `rows` rows where they have fewer; the new ones are the mean of the others.

    transformers would draw them at random about the mean: other rows on each rank, and in each program that loads the
    model. Under ZeRO-3 both matrices lie whole on each rank afterwards, until the engine partitions what is not.
    """
    matrices = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    before = getattr(matrices[0].weight, "ds_shape", matrices[0].weight.shape)[0]
    if before >= rows:
        return
    _make_whole(matrices)
    trained = [m.weight.requires_grad for m in matrices]
    model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    with torch.no_grad():
        for matrix, grad in zip(matrices, trained, strict=True):
            for tensor in (matrix.weight, getattr(matrix, "bias", None)):
                if tensor is not None:
                    tensor[before:] = tensor[:before].double().mean(0).to(tensor.dtype)
            matrix.weight.requires_grad_(grad)


def _make_whole(modules: Sequence[nn.Module]) -> None:
    """Put whole parameters in place of those that ZeRO-3 has partitioned; one that several modules share stays one."""
    whole: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, own in list(module.named_parameters(recurse=False)):
            if not hasattr(own, "ds_id"):
                continue
            if own.ds_id not in whole:
                import deepspeed

                with deepspeed.zero.GatheredParameters([own], modifier_rank=None):
                    whole[own.ds_id] = nn.Parameter(own.detach().clone(), requires_grad=own.requires_grad)
            setattr(module, name, whole[own.ds_id])


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, PEFT takes the rows of new tokens from embeddings that lie whole in memory, as `widen` leaves them.

    Under ZeRO-3 it would gather and broadcast them, on CUDA only (PEFT 0.19).
    """
    from peft.tuners.trainable_tokens import layer as trainable_tokens  # two seconds, and `plan` adds no tokens

    asked = trainable_tokens.check_deepspeed_zero3_enabled
    trainable_tokens.check_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        trainable_tokens.check_deepspeed_zero3_enabled = asked


def rows_of_adapter(folder: Path, base_config: str) -> int:
    """How many rows the embeddings have that an adapter was trained on, as far as its files tell; else 0."""
    rows = 0
    written = folder / base_config / "config.json"
    if written.is_file():
        content = json.loads(written.read_text(encoding="utf-8"))
        rows = int((content.get("text_config") or content).get("vocab_size") or 0)
    for file in folder.glob("adapter_model.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                if name.endswith(("embed_tokens.weight", "lm_head.weight")):  # whole, not low-rank
                    rows = max(rows, tensors.get_slice(name).get_shape()[0])
    return rows


def narrowed(config: PretrainedConfig, base: PretrainedConfig) -> int:
    """Give a config the rows of the base's weights, so that they can be loaded; returns those it had."""
    text = config.get_text_config()
    rows = int(text.vocab_size)
    text.vocab_size = min(rows, int(base.get_text_config().vocab_size))
    return rows
