"""In how many bits a base is trained on, from its config and the run's: without torch."""

from __future__ import annotations

from typing import Any

CAN_BE_READ = "bitsandbytes (nf4, int8), fp8 in blocks (DeepSeek-V3, Qwen3-FP8), mxfp4 (gpt-oss)"


def stored_in(model_config: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of how its weights are quantised; {} where they are not."""
    text: dict[str, Any] = next(
        (model_config[k] for k in ("text_config", "llm_config") if isinstance(model_config.get(k), dict)), {}
    )
    return model_config.get("quantization_config") or text.get("quantization_config") or {}


def format_name(stored: dict[str, Any], asked: str) -> tuple[str, str]:
    """The format of the base's weights in memory ("" is dense), and what is wrong with it.

    `asked`: model.quantize.
    """
    if not stored:
        return asked if asked not in ("auto", "none") else "", ""
    method, name = str(stored.get("quant_method", "")), ""
    if method == "bitsandbytes":
        nf4 = stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4"
        name = "nf4" if nf4 else "int8" if stored.get("load_in_8bit") else ""
    elif method == "fp8" and list(stored.get("weight_block_size") or ()) == [128, 128]:
        name = "fp8"
    elif method == "mxfp4":
        name = "mxfp4"
    if not name:
        keys = ("bits", "weight_block_size", "bnb_4bit_quant_type", "format")
        more = ", ".join(f"{key}: {stored[key]}" for key in keys if key in stored) or "no further word"
        return "", (
            f"model.path: the checkpoint is quantised by {method or 'an unknown method'} ({more}), which cannot be "
            f"trained here; what can: {CAN_BE_READ}. Give the unquantised checkpoint of the same model, with "
            "model.quantize: nf4 (or int8, fp8) if it has to be small"
        )
    if asked not in ("auto", "none", name):
        return "", (
            f"model.quantize is {asked}, but the checkpoint is quantised already, as {name}: leave the key out to "
            f"train on it as it is, or give the unquantised checkpoint. `none` makes it dense"
        )
    return ("" if asked == "none" else name), ""


def full_training_problem(name: str, *, lora: bool, stored: bool) -> str:
    """All weights cannot be trained where they are quantised."""
    if not name or lora:
        return ""
    out = "set model.quantize: none, which makes it dense" if stored else "leave model.quantize out"
    return (
        f"lora is null, but the base is quantised ({name}): its weights have no gradient. Set lora to train adapters "
        f"on it, or {out}"
    )
