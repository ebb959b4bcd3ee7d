"""`ds-longft models`: which model types train right, and what is to be known of one checkpoint before it is trained."""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_longft.config.proof import proof_problem, proofs, why_not_proved

GPUS = {"Hopper": (9, 0), "Ampere": (8, 0)}


def models(model: str | None = None, *, revision: str | None = None) -> None:
    """List the model types that were compared with transformers' own step, or say what is known of one.

    Of a type: proved or not, and why. Of a checkpoint: proved or not, into how many parts a sample can be split,
    windows, attention kernels that fit, and what LoRA would reach. Only its config is read.

    Args:
        model: folder or hub id of a checkpoint, or a `model_type` of transformers.
        revision: of a hub id.
    """
    if model is None:
        print(page())
        return
    of_type = model in proofs()["types"] and not Path(model).exists()
    lines = about_type(model) if of_type else about(model, revision)
    print("\n".join(f"{name:<16}{text}" for name, text in lines))


PAGE = """\
# Models

Made by `python -m tests.distributed.write_models`, which walks all causal model types of transformers and
all multimodal ones that hold one: a small model of each, all its kinds of layers, windows shorter than its
documents. transformers computes each document alone; here two documents in one pack are split over two
ranks. Loss and every gradient are compared in float64, of all weights and of LoRA adapters.

Written {written} with {versions}. {count} of {all} types are proved; the largest
difference is {worst:.0e}, relative.

A type that is not proved is refused, unless the run config has `model.unproved: true`; what is refused for a
reason stays refused.

## Proved

{plain}

## Proved, as the text model of a multimodal checkpoint

Loss and gradients are those of the whole model given text; towers are neither loaded nor trained, and are in
what is saved and exported. The text model may be another one that is proved.

{wrappers}
"""


def page() -> str:
    """The text of docs/models.md."""
    found = proofs()
    types: dict[str, dict[str, Any]] = found["types"]
    proved = {name: entry for name, entry in types.items() if "proved" in entry}
    text = PAGE.format(
        written=found["written"],
        versions=", ".join(f"{name} {version}" for name, version in found["versions"].items()),
        count=len(proved),
        all=len(types),
        worst=max((entry["proved"] for entry in proved.values()), default=0.0),
        plain=", ".join(f"`{name}`" for name, entry in proved.items() if "text" not in entry),
        wrappers=", ".join(f"`{name} ({entry['text']})`" for name, entry in proved.items() if "text" in entry),
    )
    for title, why in (
        ("Not proved", {n: str(why_not_proved(n)).removeprefix(f"{n} ") for n in types if n not in proved}),
        ("Proved, but not beside transformers' own step as it is", _said(proved, "against")),
        ("Proved, but for LoRA on all linear layers", _said(proved, "lora")),
    ):
        rows = [f"| {name} | {reason.replace('|', ' ')} |\n" for name, reason in why.items()]
        text += f"\n## {title}\n\n| type | why |\n|---|---|\n{''.join(rows)}" if rows else ""
    return text


def _said(types: dict[str, dict[str, Any]], key: str) -> dict[str, str]:
    return {name: entry[key] for name, entry in types.items() if key in entry}


def about_type(model_type: str) -> Iterator[tuple[str, str]]:
    """What the walk found of a model type, line by line."""
    found = proofs()
    entry = found["types"][model_type]
    held = f", as the text model of type {entry['text']}" if "text" in entry else ""
    yield "type", model_type
    yield "proved", why_not_proved(model_type) or f"{_when(found)}, to {entry['proved']:.0e}{held}"
    yield from ((name, entry[key]) for name, key in (("compared with", "against"), ("LoRA", "lora")) if key in entry)


def _when(found: dict[str, Any]) -> str:
    return f"{found['written']}, transformers {found['versions']['transformers']}"


def about(model: str, revision: str | None) -> Iterator[tuple[str, str]]:
    """What is to be known of one checkpoint, line by line; what keeps it from being trained, where something does."""
    print("ds-longft models: importing torch and transformers ...", file=sys.stderr, flush=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    import torch

    from ds_longft.config.run_config import LoraConfig, ModelConfig
    from ds_longft.errors import ModelError
    from ds_longft.model.facts import ModelFacts
    from ds_longft.model.load import load_config
    from ds_longft.model.lora import add_lora
    from ds_longft.model.lora_targets import adapted_in_words
    from ds_longft.model.wrapped import is_wrapped, make, text_class

    hf_config = load_config(ModelConfig(path=model, revision=revision), 1, attn_implementation="eager")
    text_type, found = hf_config.get_text_config().model_type, proofs()
    yield "type", hf_config.model_type + (f", text model {text_type}" if is_wrapped(hf_config) else "")
    problem = proof_problem(hf_config.model_type, text_type)
    yield "proved", problem or _when(found)
    facts = ModelFacts.from_config(hf_config)
    experts = f", {facts.experts} experts per layer" if facts.experts else ""
    yield "size", f"{facts.weights / 1e9:.2f}B weights, {facts.layers} layers{experts}"
    wide = " or ".join(map(str, sorted({d for _, d in facts.attentions})))
    keys = " or ".join(map(str, sorted({kind.kv_heads for kind in facts.kinds})))
    yield "heads", f"{facts.q_heads} of queries, {keys} of keys and values, {wide} wide"
    yield "sp", f"1 to {facts.most_ranks}"
    windows = Counter(facts.windows)
    yield "window", ", ".join(f"{n} layers {'see all' if w is None else f'{w:,} tokens'}" for w, n in windows.items())
    yield "positions", f"{facts.max_positions:,} tokens" if facts.max_positions else "any length"
    for gpu, capability in GPUS.items():
        yield "kernels", f"{gpu}: {'; '.join(_kernels(facts, capability))}"
    for with_experts in (False, True) if facts.experts else (False,):
        lora = LoraConfig(experts=with_experts)
        with torch.device("meta"):
            bare = make(text_class(hf_config), copy.deepcopy(hf_config), attn_implementation="eager")
            try:
                adapted = add_lora(bare, lora, seed=0)
            except ModelError as error:
                yield "LoRA", str(error)
                return
        weights = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        trained = f"{weights / 1e6:,.2f}M weights of rank {lora.r}"
        if not with_experts:
            layers = [name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name]
            reached = Counter(name.rpartition(".")[2] for name in layers)
            yield "LoRA reaches", ", ".join(f"{count} {name}" for name, count in reached.items()) + f": {trained}"
        if facts.experts:
            yield "lora.experts", f"{str(with_experts).lower()}: {adapted_in_words(adapted)}: {trained}"


def _kernels(facts: Any, capability: tuple[int, int]) -> Iterator[str]:
    """For each kind of layer, the kernels that can do it in bf16, installed here or not."""
    import torch

    from ds_longft.sequence.kernels import KERNELS, AttentionSpec
    from ds_longft.sequence.kernels.base import Job

    for window, d in dict.fromkeys(facts.attentions):
        spec = AttentionSpec(d**-0.5, window, facts.softcap)
        job = Job("cuda", torch.bfloat16, d, spec, capability)
        fits = [kernel.name for kernel in KERNELS if kernel.refuses(job, here=False) is None]
        yield f"{'full attention' if window is None else 'sliding window'}: {', '.join(fits)}"
