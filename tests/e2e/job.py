"""A whole small job as a user has it: a model folder, chats in JSONL files, a run config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.tokenizer import tiny_tokenizer

WINDOW = 256
HEADS = {"4": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32},
         "9": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}}  # fmt: skip


def write_model(folder: Path, heads: str = "4") -> Path:
    """A Llama of 2 layers with random weights, 4 query and 2 kv heads or 9 and 3, in `folder`."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=48, num_hidden_layers=2, head_dim=8, initializer_range=0.2,
        max_position_embeddings=WINDOW, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **HEADS[heads],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, numbers: range) -> Path:
    """Chats of different lengths, one a number."""
    rows = []
    for i in numbers:
        question = f"def times(a, b): what is {i} times {i + 3}? " + "Think about it. " * (i % 5)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": f"It is {i * (i + 3)}."},
                ]
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_job(folder: Path) -> Path:
    """Models, data and run.yaml: one row a pack, 2 packs a step, 4 steps an epoch, 6 steps in all, saved every 2."""
    write_model(folder / "model")
    write_model(folder / "model-9-heads", "9")
    run: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "model": {"path": str(folder / "model")},
        "lora": {"r": 4, "alpha": 16},
        "data": {
            "train": [str(write_rows(folder / "train.jsonl", range(8)))],
            "eval": [str(write_rows(folder / "eval.jsonl", range(8, 10)))],
            "max_length_tokens": WINDOW,
            "packing": "none",
            "workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"learning_rate": 2e-2, "warmup_steps": 0},
        "train": {
            "epochs": 2,
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
            "save_every_steps": 2,
            "eval_every_steps": 2,
            "keep_checkpoints": 3,
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
