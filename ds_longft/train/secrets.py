"""Nothing a run writes may hold a token: trackers get chosen keys, and known secrets are blotted out of what is
left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ds_longft.config.run_config import RunConfig

SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|API_?KEY|KEY|SECRET|PASS(WORD|WD|PHRASE)?|PW|PAT|JWT|CREDENTIALS?)(_|$)|(PASSWORD|PASSWD)$",
    re.IGNORECASE,
)
URL_LOGIN = re.compile(r"(?<=://)[^\s'\"<>]*(?=@[\w.-]+(?::\d+)?(?:[/?#\s'\"<>]|$))")  # passwords hold / and @ too
BLOT = "[redacted]"
SECRET_LENGTH = 8  # shorter values are words that a message may hold by chance

# What a tracker may see. Paths of this machine stay out of it, but for the names of model and data.
TRACKED = {"sp", "seed", "lora", "optim", "train", "log"}
TRACKED_DATA = {"max_length_tokens", "pack_tokens", "packing", "overlong", "weighting", "eval_fraction"}
TRACKED_MODEL = {"path", "revision", "dtype", "kernel", "rope"}


def redact(text: str, env: Mapping[str, str] = os.environ) -> str:
    """The text without logins in URLs and without the value of any environment variable named like a secret."""
    # Files of secrets end in a line break, and what is printed of them need not.
    values = {v.strip() for k, v in env.items() if SECRET_NAME.search(k) and len(v.strip()) >= SECRET_LENGTH}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, BLOT)
    return URL_LOGIN.sub(BLOT, text)


def tracked_config(config: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker is told of a run: keys on the list, and `facts` (numbers of the layout)."""
    picked = config.model_dump(mode="json", include=TRACKED)
    picked["data"] = config.data.model_dump(mode="json", include=TRACKED_DATA)
    picked["data"]["train"] = [source.path for source in config.data.train]
    picked["model"] = config.model.model_dump(mode="json", include=TRACKED_MODEL)
    return {**{key: _redacted(value) for key, value in picked.items()}, **facts}


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redacted(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value
