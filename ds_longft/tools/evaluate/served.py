"""An OpenAI-compatible server of the model: the same prompts, token by token, answered by the engine that serves it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from ds_longft.errors import ConfigError

TIMEOUT_S = 3600.0
"""Of one request: a prompt of a million tokens takes minutes to read."""


class Server:
    """`vllm serve FOLDER`, or any other that takes a prompt's token ids at /completions."""

    def __init__(self, address: str) -> None:
        """Raises ConfigError: nobody answers there, or no model is served."""
        self.address = address.rstrip("/")
        served = self._call("/models", None).get("data") or []
        if not served:
            raise ConfigError(f"--server {address}: it serves no model")
        self.model = served[0]["id"]

    def replies(
        self, prompts: Sequence[Sequence[int]], most: int, also_stop: Sequence[int] = (), least: int = 0
    ) -> list[str]:
        """Greedy answers, in order. Where an answer ends is the server's to know: it reads the same folder."""
        asked: dict[str, Any] = {
            "model": self.model, "prompt": [list(prompt) for prompt in prompts], "max_tokens": most, "temperature": 0,
        }  # fmt: skip
        if also_stop:
            asked["stop_token_ids"] = list(also_stop)
        if least:
            asked["min_tokens"] = least
        choices = self._call("/completions", asked)["choices"]
        if len(choices) != len(prompts):
            raise ConfigError(f"--server {self.address}: {len(choices)} answers to {len(prompts)} prompts")
        return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def _call(self, path: str, asked: dict[str, Any] | None) -> dict[str, Any]:
        body = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise ConfigError(f"--server {self.address}{path}: {error.code}, {said}") from error
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--server {self.address}{path}: {error}; expected an OpenAI-compatible address, e.g. "
                "http://localhost:8000/v1"
            ) from error
