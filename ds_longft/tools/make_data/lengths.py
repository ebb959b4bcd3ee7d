"""How many tokens a row will have: counted by the model's tokenizer, or estimated from its characters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ds_longft.data.encode import without_trimmed_offsets
from ds_longft.data.pieces import encode_pieces
from ds_longft.data.rows import Turn
from ds_longft.data.template import ChatTemplate, Rendered
from ds_longft.data.template_source import load_template
from ds_longft.errors import ConfigError

# Measured on novels, manuals and essays with Llama-3, Qwen and DeepSeek tokenizers: 0.96-1.14 Chinese and 4.1-5.3
# English characters a token. Low, so that a row rather turns out shorter than estimated.
CHARS_PER_TOKEN = 4.1
HAN_PER_TOKEN = 1.05
TOKENS_PER_TURN = 6  # of the chat template
_HAN = re.compile("[\u3000-\u9fff\uac00-\ud7af\uff00-\uffef]")


class Lengths:
    """Counts tokens of texts and of whole rows, chat template included."""

    def __init__(self, tokenizer: Any = None, chars_per_token: float = CHARS_PER_TOKEN) -> None:
        """`tokenizer`: a fast Hugging Face tokenizer; without one, counts are estimates from characters."""
        self._tokenizer = tokenizer
        self._chars_per_token = chars_per_token

    @cached_property
    def _backend(self) -> Tokenizer:
        return without_trimmed_offsets(self._tokenizer.backend_tokenizer)

    @cached_property
    def _template(self) -> ChatTemplate:
        """Asked for by the first chat: plain text needs none, and the tokenizer of a base model has none."""
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "the tokenizer has no chat template (a base model?), and its tokens count in the lengths of chats: "
                "name a chat model of the family by --tokenizer (`tokenizer` in a recipe), or none to estimate lengths"
            )
        return load_template(self._tokenizer, None)

    @property
    def exact(self) -> bool:
        """Whether tokens are counted and not estimated."""
        return self._tokenizer is not None

    def text(self, text: str) -> int:
        """Tokens of a text."""
        if self._tokenizer is None:
            han = len(_HAN.findall(text))
            return math.ceil(han / HAN_PER_TOKEN + (len(text) - han) / self._chars_per_token)
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def starts(self, text: str) -> NDArray[np.int64]:
        """[tokens] the character at which each token of a text begins."""
        if self._tokenizer is None:
            han = np.zeros(len(text), dtype=bool)
            han[[match.start() for match in _HAN.finditer(text)]] = True
            tokens = np.cumsum(np.where(han, 1 / HAN_PER_TOKEN, 1 / self._chars_per_token))
            return np.searchsorted(tokens, np.arange(self.text(text))).clip(0, max(0, len(text) - 1))
        offsets = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        return np.fromiter((start for start, _ in offsets), dtype=np.int64, count=len(offsets))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a row of plain messages. Raises as `rows`."""
        return self.rows([[Turn("user" if m["role"] == "user" else "assistant", m["content"]) for m in messages]])[0]

    def plain(self, text: str) -> int:
        """Tokens of a row of plain text."""
        return self.rows([[Turn("text", text)]])[0]

    def rows(self, rows: Sequence[Sequence[Turn]], tools: Sequence[str] | None = None) -> list[int]:
        """Tokens of each row as it is trained on, with its tool schemas (JSON) where there are any.

        Raises:
            BadRow: the chat template refuses a row.
            ConfigError: a chat is among them, and the tokenizer has no usable chat template.
        """
        all_tools = tools or [""] * len(rows)
        if self._tokenizer is None:
            estimated = []
            for turns, schemas in zip(rows, all_tools, strict=True):
                said = [t.content + t.thinking + "".join(c.name + c.arguments for c in t.calls) for t in turns]
                estimated.append(sum(map(self.text, said)) + TOKENS_PER_TURN * len(said) + self.text(schemas))
            return estimated
        rendered = [
            Rendered(turns[0].content, ())
            if turns[0].role == "text"
            else self._template.render(turns, schemas, own_rule=True)
            for turns, schemas in zip(rows, all_tools, strict=True)
        ]
        encodings = self._backend.encode_batch([row.text for row in rendered], add_special_tokens=False)
        ends = [2 if turns[0].role == "text" else 0 for turns in rows]  # bos and eos, which templates write themselves
        return [
            len(encode_pieces(self._backend, row.text, encoding, row.borders).ids) + end
            for row, encoding, end in zip(rendered, encodings, ends, strict=True)
        ]
