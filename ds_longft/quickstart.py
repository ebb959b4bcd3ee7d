"""The job of the bare command: a small real model, real long-code data, nothing to download but Python packages."""

from __future__ import annotations

from pathlib import Path

import yaml
from filelock import FileLock

CACHE = "~/.cache/ds_longft/quickstart"

ROW_TOKENS = 3072
"""A row of the training data. On CPUs a step of two ranks takes about 20 s at this length."""


def prepare(cache: str = CACHE) -> Path:
    """Make the model and the data where they are missing; returns the run config (YAML) of the quickstart.

    Safe when every rank of a launch calls it: one works, the others wait.
    """
    from ds_longft.data.synth_code import write_code_set
    from ds_longft.model.smollm2 import prepare_smollm2

    folder = Path(cache).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        model = prepare_smollm2(folder)
        sets = {"train": folder / f"code-train-{ROW_TOKENS}.jsonl", "eval": folder / f"code-eval-{ROW_TOKENS}.jsonl"}
        if not all(path.exists() for path in sets.values()):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model)
            print("laying the standard library's source into long samples", flush=True)
            write_code_set(sets["train"], rows=64, context_tokens=ROW_TOKENS, part="train", tokenizer=tokenizer)
            write_code_set(sets["eval"], rows=2, context_tokens=ROW_TOKENS, part="eval", tokenizer=tokenizer)
        config = folder / "quickstart.yaml"
        config.write_text(yaml.safe_dump(quickstart_config(model, sets["train"], sets["eval"]), sort_keys=False))
    return config


def quickstart_config(model: Path, train: Path, held_out: Path) -> dict[str, object]:
    """The quickstart's settings; the same as recipes/quickstart.yaml but for the paths."""
    return {
        "output_dir": "runs/quickstart",
        "model": {"path": str(model)},
        "lora": {"r": 16, "alpha": 32},
        "data": {
            "train": [{"path": str(train), "format": "messages"}],
            "eval": [{"path": str(held_out), "format": "messages"}],
            "max_length_tokens": ROW_TOKENS,
        },
        "optim": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"max_steps": 8, "resume": "never"},
    }
