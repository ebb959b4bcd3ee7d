"""A whole tiny job on disk: a two-layer Llama, a byte-level tokenizer with a chat template, ten chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 10


def pair_of(row: dict[str, Any]) -> dict[str, str]:
    """A chat as a preference pair: its answer, and a longer one."""
    question, answer = (message["content"] for message in row["messages"])
    return {"prompt": question, "chosen": answer, "rejected": answer.replace("It is", "You might ask whether it was")}


def pair_keys(config: Path) -> tuple[str, ...]:
    """Command line that makes preference training of the job: the same steps, one pair a pack, in two passes."""
    return (
        *("--objective", "dpo", "--data.train", str(config.parent / "pairs.jsonl")),
        *("--dpo.passes", "two", "--lora.dropout", "0"),
    )


def write_job(folder: Path) -> Path:
    """Model, tokenizer, data and run.yaml in `folder`; returns run.yaml. Beside it pairs.jsonl, see `pair_keys`.

    Two ranks, 8 training rows, 2 rows held out, 2 packs a step: 4 steps an epoch, 8 in all. Dropout, so that a resume
    with another random state is seen in the loss.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: i for i, token in enumerate([*special, *sorted(alphabet)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} times {i + 3}? " + "Think. " * (i % 4)},
                {"role": "assistant", "content": f"It is {i * (i + 3)}."},
            ]
        }
        for i in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair_of(row)) + "\n" for row in rows))
    run = {
        "ds_config": str(Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_sp.json"),
        "output_dir": str(folder / "out"),
        "sp": 2,
        "model": {"path": str(folder / "model")},
        "lora": {
            "r": 4,
            "dropout": 0.1,
            "targets": ["q_proj", "down_proj"],
        },  # all seven: 3.8 s a rank instead of 2.1
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "eval_fraction": 0.2,
            "max_length_tokens": 256,
            "packing": "none",
            "workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"learning_rate": 1e-2, "warmup_steps": 0},
        "train": {"epochs": 2, "gradient_accumulation_steps": 2, "save_every_steps": 2, "eval_every_steps": 4},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run, sort_keys=False))
    return path
