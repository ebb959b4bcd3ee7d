"""The model card: what was trained on what, how far, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_longft.config import RunConfig
from ds_longft.layout import ParallelLayout

LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""

LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""


def write_card(folder: Path, config: RunConfig, layout: ParallelLayout, history: list[dict[str, Any]]) -> None:
    """Write README.md into the output folder from the config and the recorded metrics."""
    base = config.model.path
    front = {
        "base_model": base,
        "library_name": "peft" if config.lora else "transformers",
        "tags": ["ds_longft", "long-context"],
    }
    steps = [r for r in history if r.get("loss") is not None]
    evals = [r for r in history if "eval_loss" in r]
    facts = {
        "base model": base,
        "training": f"LoRA r={config.lora.r}, alpha={config.lora.alpha:g}" if config.lora else "all weights",
        "data": ", ".join(s.path for s in config.data.train),
        "longest sample": f"{config.data.max_length_tokens:,} tokens",
        "RoPE change": config.model.rope.type,
        "ranks": f"{layout.world} (sp {layout.sp}, dp {layout.dp})",
        "loss": f"sum(w * ce) / sum(w) over the optimizer step, {config.data.weighting} weighting",
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
    }
    if steps:
        facts["optimizer steps"] = str(steps[-1]["step"])
        facts["tokens"] = f"{steps[-1]['tokens_seen']:,}"
        facts["training loss"] = f"{steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}"
    if evals:
        facts["held-out loss"] = " -> ".join(
            f"{r['eval_loss']:.4f}" for r in (evals[:1] + evals[-1:] if len(evals) > 1 else evals)
        )
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    load = (LOAD_ADAPTER if config.lora else LOAD_MODEL).format(base=base, folder=folder)
    (folder / "README.md").write_text(
        f"---\n{head}\n---\n\n# {folder.name}\n\n| | |\n|---|---|\n{rows}\n\n{load}\n\n"
        "`config.yaml` beside this file runs the same training again; `metrics.jsonl` holds every step.\n"
    )
