"""The model card: what was trained on what, how far, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_longft.config.model_keys import ModelConfig
from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import BASE_CONFIG_FOLDER
from ds_longft.model.read_model import model_path
from ds_longft.objectives.objective import loss_in_words
from ds_longft.train.hub import hub_id, named_elsewhere
from ds_longft.train.metrics import held_out, training_loss

STRETCHED = """\
The base model's rotary position embedding was stretched ({rope}), and an adapter does not carry that:
load the base with the config in `base_config/`, or it works with other positions than it was trained with.

"""
EXPORT = "`ds-longft export {folder} {folder}-merged` makes an ordinary model folder of it, adapter merged and checked."
LOADING = "## Loading it"
CAUSAL, MULTIMODAL = "AutoModelForCausalLM", "AutoModelForImageTextToText"


def copy_card(run: Path, work: Path, out: Path) -> None:
    """The card of a run as that of the model exported from it, which loads without anything else."""
    card = run / "README.md"
    about, heading, loading = card.read_text(encoding="utf-8").partition(LOADING) if card.is_file() else ("", "", "")
    if heading:
        load = _load_model(MULTIMODAL if MULTIMODAL in loading else CAUSAL, out)
        about = about.replace('library_name: "peft"', 'library_name: "transformers"')
        (work / "README.md").write_text(f"{about}{heading}\n\n{load}\n", encoding="utf-8")


def write_card(
    folder: Path, config: RunConfig, layout: ParallelLayout, history: list[dict[str, Any]], vocab_size: int = 0,
    *, wrapped: bool = False, hybrid: bool = False, quantized: str = "",
) -> None:  # fmt: skip
    """Write README.md into the output folder from the config and the recorded metrics.

    `vocab_size`: of the model, where tokens were added. `wrapped`: it is a multimodal model's text model.
    `hybrid`: some of its layers carry a state. `quantized`: format of the base's weights.
    """
    base, stretched = model_path(config.model), config.model.rope.type != "none"
    on_hub = hub_id(base)
    front = ({"base_model": on_hub} if on_hub else {}) | {  # a hub refuses a card whose base is a folder
        "library_name": "peft" if config.lora else "transformers",
        "tags": ["ds_longft", "long-context"],
    }
    steps = [r for r in history if r.get("loss") is not None]
    facts = {
        "base model": named_elsewhere(base) + (f", quantised ({quantized})" if quantized else ""),
        "training": f"LoRA r={config.lora.r}, alpha={config.lora.alpha:g}" if config.lora else "all weights",
        "data": ", ".join(s.path for s in config.data.train),
        "longest sample": f"{config.data.max_length_tokens:,} tokens",
        "RoPE change": config.model.rope.type + ", of the softmax attention layers" * (hybrid and stretched),
        "ranks": f"{layout.world} (sp {layout.sp}, dp {layout.dp})",
        "loss": loss_in_words(config),
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
    }
    if steps:
        facts["optimizer steps"] = str(steps[-1]["step"])
        facts["tokens"] = f"{steps[-1].get('tokens_seen') or 0:,}"
        facts |= dict([training_loss(steps)])
    facts |= held_out(history)
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    kind = MULTIMODAL if wrapped else CAUSAL
    load = _load_adapter(kind, folder, config.model, vocab_size) if config.lora else _load_model(kind, folder)
    (folder / "README.md").write_text(
        f"---\n{head}\n---\n\n# {folder.resolve().name}\n\n| | |\n|---|---|\n{rows}\n\n{LOADING}\n\n{load}\n\n"
        "`config.yaml` beside this file runs the same training again; `metrics.jsonl` holds every step.\n"
    )


def _load_model(kind: str, folder: Path) -> str:
    """How a whole model is loaded."""
    lines = [f"from transformers import {kind}, AutoTokenizer", "", f"model = {kind}.from_pretrained({str(folder)!r})"]
    return _code([*lines, f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"])


def _load_adapter(kind: str, folder: Path, model: ModelConfig, vocab_size: int) -> str:
    """How an adapter is loaded on its base, which may need other positions, and rows for tokens that were added."""
    stretched, added = model.rope.type != "none", model.add_tokens
    more = ", config=config" * stretched + (f", revision={model.revision!r}" if model.revision else "")
    lines = ["from peft import PeftModel"]
    lines += [f"from transformers import {'AutoConfig, ' * stretched}{kind}, AutoTokenizer", ""]
    if stretched:
        lines.append(f"config = AutoConfig.from_pretrained({str(folder / BASE_CONFIG_FOLDER)!r})")
    lines.append(f"base = {kind}.from_pretrained({model_path(model)!r}{more})")
    if added:
        named = ", ".join(added[:3]) + (", ..." if len(added) > 3 else "")
        lines.append(f"base.resize_token_embeddings({vocab_size})  # {named} were added")
    lines.append(f"model = PeftModel.from_pretrained(base, {str(folder)!r})")
    code = _code([*lines, f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})"])
    return f"{STRETCHED.format(rope=model.rope.type) if stretched else ''}{code}\n\n{EXPORT.format(folder=folder)}"


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
