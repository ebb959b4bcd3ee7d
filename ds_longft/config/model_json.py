"""The model's config.json, before torch is imported: what of it keeps a run from training this model here.

What can only be known from the loaded model (its class, its live RoPE frequencies) is checked again in `model`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ds_longft.config.model_keys import ModelConfig
from ds_longft.config.proof import proof_problem
from ds_longft.config.quantized import format_name, full_training_problem, stored_in
from ds_longft.config.run_config import RunConfig
from ds_longft.config.state_families import OTHER_LAYERS, STATE_FAMILIES, STATE_HEADS, STATE_LAYERS
from ds_longft.config.window import reached_tokens, window_problem
from ds_longft.errors import ConfigError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

SPLITTABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# State-space and linear-attention families whose config.json lists no layer types, and that are not spread over ranks.
RECURRENT_MODELS = re.compile(r"(falcon_)?mamba2?|zamba2?|rwkv.*|xlstm|recurrent_gemma")
ENCODERS = re.compile(
    r"(xlm-|cam)?(roberta|bert)(-.*)?|(al|distil|mobile|modern|squeeze)bert|deberta(-v2)?|electra|mpnet|vit.*|clip.*|siglip.*"
)
LENGTH_AWARE_ROPE = {"dynamic", "longrope"}  # they choose their frequencies by the length, so no window ends them


def read_model_config(config: RunConfig) -> dict[str, Any] | None:
    """config.json of a local model folder, or of a hub id as the hub's cache has it; None where it has none. Raises
    ConfigError: not JSON.
    """
    inside = Path(config.model.path).expanduser() / "config.json"
    path = inside if config.model.path and inside.is_file() else _in_cache(config.model)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} holds a {type(content).__name__}, expected an object {{...}}")
    return content


def _in_cache(model: ModelConfig) -> Path | None:
    """Where the hub's cache has config.json of a hub id."""
    if not HUB_ID.fullmatch(model.path) or Path(model.path).expanduser().exists():
        return None
    from huggingface_hub import try_to_load_from_cache  # half a second, and a folder needs none of it

    found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def text_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """The language part of a config that also has others."""
    text = model_config.get("text_config")
    return text if isinstance(text, dict) else model_config


def model_problems(config: RunConfig, model_config: dict[str, Any]) -> list[str]:
    """Why a model cannot be trained as the run config asks, however many ranks there are."""
    kind = str(model_config.get("model_type", ""))
    unfit, proof = _unfit(kind, model_config), None
    if unfit is None and not config.model.unproved:
        proof = proof_problem(kind, str(text_config(model_config).get("model_type", kind)))
    stored = stored_in(model_config)
    name, quantized = format_name(stored, config.model.quantize)
    quantized = quantized or full_training_problem(name, lora=config.lora is not None, stored=bool(stored))
    return [problem for problem in (unfit, proof, quantized) if problem]


def _unfit(kind: str, model_config: dict[str, Any]) -> str | None:
    """Why a model cannot be split along the sequence, by name."""
    prefix = f"model.path: {kind or 'this model'}"
    layers = text_config(model_config)
    types = layers.get("layer_types") or layers.get("layers_block_type") or layers.get("block_types") or []
    known = SPLITTABLE_LAYERS | (STATE_LAYERS | OTHER_LAYERS if layers.get("model_type") in STATE_FAMILIES else set())
    other = sorted(set(map(str, types)) - known)
    if other:
        return (
            f"{prefix} has layers of type {', '.join(other)}, which carry state along the sequence or mask it "
            f"differently and cannot be split over GPUs exactly; possible are full, sliding and chunked attention"
        )
    if RECURRENT_MODELS.fullmatch(kind):
        return f"{prefix} has recurrent layers, which cannot be split over GPUs exactly; give an attention-only model"
    if model_config.get("is_encoder_decoder") or ENCODERS.fullmatch(kind):
        return f"{prefix} is an encoder; only causal (decoder-only) language models can be trained"
    return None


def head_problems(text: dict[str, Any], sp: int, world: int) -> list[str]:
    """More ranks share a sample than there are heads to deal."""
    of_states = [(text.get(key), "heads in layers with a state") for key in STATE_HEADS]
    counts = [(text.get("num_attention_heads", text.get("n_head")), "query heads"), *of_states]
    heads, what = min(((n, what) for n, what in counts if isinstance(n, int)), default=(sp, ""), key=lambda of: of[0])
    if sp <= heads:
        return []
    largest = max(d for d in divisors(world) if d <= heads)
    works = f"is {largest}" if largest == heads else f"with {world} ranks is {largest}, with {heads} ranks {heads}"
    return [f"sp is {sp}, but the model has {heads} {what} to share among GPUs: the largest sp that works {works}"]


def divisors(number: int) -> list[int]:
    """What divides a number, the smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def length_problems(config: RunConfig, text: dict[str, Any]) -> list[str]:
    """The longest row against the positions the model knows, and RoPE keys that would go unused."""
    rope, seen = config.model.rope, f"but model.rope.type is {config.model.rope.type}"
    problems = []
    if rope.theta is not None and rope.type != "abf":
        problems.append(f"model.rope.theta is {rope.theta:g}, {seen}: theta is for abf only")
    if rope.attention_factor is not None and rope.type != "yarn":
        wide = rope.attention_factor
        problems.append(f"model.rope.attention_factor is {wide:g}, {seen}: attention_factor is for yarn only")
    if rope.factor is not None and rope.type == "none":
        problems.append(f"model.rope.factor is {rope.factor:g}, {seen}: give a type, or no factor")
    window = text.get("max_position_embeddings", text.get("n_positions"))
    if not isinstance(window, int) or problems:
        return problems
    # The keys changed their names over the years, and may be nested by layer type.
    of_model: list[dict[str, Any]] = []
    for parameters in (text.get("rope_parameters"), text.get("rope_scaling")):
        if isinstance(parameters, dict):
            of_model += [v for v in parameters.values() if isinstance(v, dict)] or [parameters]
    endless = any(str(part.get("rope_type", part.get("type"))) in LENGTH_AWARE_ROPE for part in of_model)
    reached = reached_tokens(window, of_model)
    problem = window_problem(rope, reached, config.data.max_length_tokens, endless=endless)
    return [problem] if problem else []
