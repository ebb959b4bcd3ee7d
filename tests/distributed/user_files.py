"""What a user brings: a model folder with a tokenizer, chats in a JSONL file, a run config. Tiny, made in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.distributed.models import tiny_config, tiny_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[1], eos_token=special[2], pad_token=special[0], chat_template=TEMPLATE
    )


def user_config(
    folder: Path, *, stage: int = 3, family: str = "llama", rows: int = 24, **changes: Any
) -> dict[str, Any]:
    """Make the files in `folder`; a run config as nested dicts. `changes` go into the model's config."""
    model = tiny_model(
        tiny_config(family, **{"vocab_size": 259, "max_position_embeddings": 256, **changes}), attn="eager",
        dtype=torch.float32, std=0.1,
    )  # fmt: skip
    assert isinstance(model, AutoModelForCausalLM) or hasattr(model, "save_pretrained")
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rng = random.Random(0)

    def words(n: int) -> str:
        return "".join(rng.choices("abcdefgh ", k=n))

    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(rows):
            turns = [("user", words(rng.randint(4, 40))), ("assistant", words(rng.randint(2, 30)))]
            file.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}))
    return {
        "ds_config": str(folder / "ds.json"),
        "output_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "lora": {"r": 4, "dropout": 0.0},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}],
            "max_length_tokens": 192,
            "cache_dir": str(folder / "cache"),
            "workers": 1,
        },
    }
