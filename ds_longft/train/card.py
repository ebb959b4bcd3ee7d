"""The model card: what was trained on what, how far, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_longft.config.run_config import RunConfig
from ds_longft.layout import ParallelLayout
from ds_longft.model.lora import BASE_CONFIG_FOLDER
from ds_longft.model.read_model import model_path
from ds_longft.objectives.objective import loss_in_words
from ds_longft.train.hub import hub_id, named_elsewhere
from ds_longft.train.metrics import held_out, training_loss

LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```"""

WIDER = "base.resize_token_embeddings({rows})  # {tokens} were added"

LOAD_STRETCHED = """\
The base model's rotary position embedding was stretched ({rope}), and an adapter does not carry that:
load the base with the config in `base_config/`, or it works with other positions than it was trained with.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained({base_config!r})
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config{revision})
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```"""

EXPORT = "`ds-longft export {folder} {folder}-merged` makes an ordinary model folder of it, adapter merged and checked."

LOAD_MODEL = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```"""


LOADING = "## Loading it"


def copy_card(run: Path, work: Path, out: Path) -> None:
    """The card of a run as that of the model exported from it, which loads without anything else."""
    card = run / "README.md"
    about, heading, loading = card.read_text(encoding="utf-8").partition(LOADING) if card.is_file() else ("", "", "")
    if heading:
        load = LOAD_MODEL.format(folder=str(out))
        if "AutoModelForImageTextToText" in loading:
            load = load.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
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
    how = (LOAD_STRETCHED if stretched else LOAD_ADAPTER) + "\n\n" + EXPORT if config.lora else LOAD_MODEL
    if config.lora and config.model.add_tokens:
        tokens = ", ".join(config.model.add_tokens[:3]) + (", ..." if len(config.model.add_tokens) > 3 else "")
        grow = WIDER.format(rows=vocab_size, tokens=tokens)
        how = how.replace("model = PeftModel", grow.replace("{", "{{").replace("}", "}}") + "\nmodel = PeftModel")
    if wrapped:
        how = how.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    load = how.format(
        base=base,
        revision=f", revision={config.model.revision!r}" if config.model.revision else "",
        folder=str(folder),
        base_config=str(folder / BASE_CONFIG_FOLDER),
        rope=config.model.rope.type,
    )
    (folder / "README.md").write_text(
        f"---\n{head}\n---\n\n# {folder.resolve().name}\n\n| | |\n|---|---|\n{rows}\n\n{LOADING}\n\n{load}\n\n"
        "`config.yaml` beside this file runs the same training again; `metrics.jsonl` holds every step.\n"
    )
