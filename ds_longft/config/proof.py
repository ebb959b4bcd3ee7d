"""Which model types train right: `proved.json`, written by the walk over all of them (tests/distributed/walk.py).

Read before torch is imported, so that a model which nobody has compared is refused in the first second.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

FILE = "proved.json"


@cache
def proofs() -> dict[str, Any]:
    """`written` and `versions`, and `types`: name -> {"proved": largest relative error, "text": type of its text model}
    where loss and every gradient are transformers' own, else {"refused", "wrong" or "unknown": why}; "lora": what LoRA
    cannot; "against": what stood for transformers' own step.
    """
    content: dict[str, Any] = json.loads((files("ds_longft.config") / FILE).read_text(encoding="utf-8"))
    return content


def why_not_proved(model_type: str) -> str | None:
    """Why one of transformers' types is not proved, and what would help; None of all others."""
    entry = proofs()["types"].get(model_type, {})
    if "refused" in entry:
        return str(entry["refused"])
    if "proved" in entry or not entry:
        return None
    if "wrong" in entry:
        return f"{model_type} does not run here ({entry['wrong']}): nobody has looked into it"
    return (
        f"{model_type} was not compared, no small model of it was made here ({entry['unknown']}): with model.unproved: "
        "true `ds-longft verify` compares yours"
    )


def proof_problem(model_type: str, text_type: str) -> str | None:
    """Why a model is not among those that are proved; None where it is.

    `text_type`: of the text model in a multimodal one, else the same. A wrapper may hold another text model than it was
    proved with, if that is proved alone.
    """
    types = proofs()["types"]
    entry = types.get(model_type, {})
    if "proved" in entry and (text_type in (model_type, entry.get("text")) or "proved" in types.get(text_type, {})):
        return None
    if "refused" in entry:
        return f"model.path: {why_not_proved(model_type)}. `ds-longft models` lists what can be trained"
    held = f" with a text model of type {text_type}" if text_type != model_type and "proved" in entry else ""
    return (
        f"model.path: nobody has compared the step of {model_type or 'a model without model_type'}{held} with "
        "transformers' own (`ds-longft models` lists what was): set model.unproved to true to train it all the same, "
        "and run `ds-longft verify` first"
    )
