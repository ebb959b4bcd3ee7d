"""Tokens that a model did not have: rows of its embeddings for them, made alike wherever the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel


def widen(model: PreTrainedModel, rows: int) -> None:
    """Give input and output embeddings `rows` rows where they have fewer; the new ones are the mean of the others.

    transformers would draw them at random about the mean: other rows on each rank, and in each program that loads the
    model.
    """
    matrices = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    before = matrices[0].weight.shape[0]
    if before >= rows:
        return
    trained = [m.weight.requires_grad for m in matrices]
    model.resize_token_embeddings(rows, mean_resizing=False)
    matrices = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    with torch.no_grad():
        for matrix, grad in zip(matrices, trained, strict=True):
            for tensor in (matrix.weight, getattr(matrix, "bias", None)):
                if tensor is not None:
                    tensor[before:] = tensor[:before].double().mean(0).to(tensor.dtype)
            matrix.weight.requires_grad_(grad)


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
