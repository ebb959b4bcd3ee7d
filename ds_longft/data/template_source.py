"""Which chat template a run uses, tried on a small chat before any data is read, and what is odd about it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from typing import Any

from ds_longft.config.shipped import find_template
from ds_longft.data.rows import BadRow
from ds_longft.data.template import PROBE, ChatTemplate
from ds_longft.errors import ConfigError

# Tokens that close a turn in the known families; the tokenizer's eos token counts too.
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|call|>",
    "<|return|>",     "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<|endoftext|>", "</s>",
)  # fmt: skip
GLM_ENDS = ("<|user|>", "<|observation|>")  # GLM ends an answer with the token that begins the next turn
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
# Written where a template asks for the date of the day (Llama 3.2, GPT-OSS), so that the same rows give the same tokens
# on every day. It is the date that Llama's own templates fall back to.
TODAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])([^'"\\]*)\1\s*\)""")


def load_template(tokenizer: Any, path: str | None) -> ChatTemplate:
    """The chat template at `path`, or the tokenizer's own, tried on a small chat before any data is read.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        path: Jinja file or the name of a shipped one, or None for the tokenizer's template.

    Raises:
        ConfigError: no template, or one whose answers cannot be told from the rest.
    """
    if path is not None:
        file = find_template(path)
        if not file.is_file():
            raise ConfigError(f"data.chat_template: no such file: {path!r}")
        source, name = file.read_text(encoding="utf-8"), f"the chat template {path}"
    elif tokenizer.chat_template:
        source, name = tokenizer.get_chat_template(), "the tokenizer's chat template"
    else:
        raise ConfigError(
            "the tokenizer has no chat template (a base model?): set data.chat_template to a Jinja file with "
            "{% generation %} marks, or train on plain text (format: text)"
        )
    source, remarks = _with_fixed_date(source, name)
    special = tokenizer.special_tokens_map
    variables = {key: str(value) for key, value in special.items() if isinstance(value, str)}
    known = set(tokenizer.get_added_vocab())
    ends = {token for token in TURN_ENDS if token in known} | {variables.get("eos_token", "")} - {""}
    ends |= set(GLM_ENDS) if known.issuperset(GLM_ENDS) else set()
    template = ChatTemplate(source, variables, tuple(sorted(ends, key=lambda token: (-len(token), token))))
    try:
        probe = template.render(PROBE)
    except BadRow as bad:
        template = replace(template, in_parts=True)
        try:
            probe = template.render(PROBE)
        except BadRow:
            raise _unusable(name, str(bad)) from bad
    start, end = probe.spans[0].start, probe.spans[0].end
    if PROBE[1].content not in probe.text[start:end] or PROBE[0].content in probe.text[start:end]:
        raise _unusable(name, f"its {{% generation %}} marks enclose {probe.text[start:end]!r} instead of the answer")
    if not probe.text[start:end].rstrip().endswith((*ends, *known)):
        remarks += (
            f"{name} ends no answer with a token that says so: the model will not learn to stop. Expected "
            f"{variables.get('eos_token', 'the eos token')!r} (the tokenizer's eos_token) behind the answer, seen "
            f"{probe.text[start:][:60]!r}. Set data.chat_template to a Jinja file that writes it, inside "
            "{% generation %} ... {% endgeneration %}",
        )
    return replace(template, remarks=remarks)


def without_marks(source: str) -> str:
    """The same template without `{% generation %}` marks, which few programs but transformers know."""
    return _MARK.sub(lambda mark: f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}", source)


def _with_fixed_date(source: str, name: str) -> tuple[str, tuple[str, ...]]:
    """A template with `TODAY` for the date of the day, and the remark about it. Raises ConfigError."""
    fixed = _TODAY.sub(lambda call: repr(TODAY.strftime(call[2])), source)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ConfigError(
            f"{name} writes the date of the day by strftime_now(...), in a format that is not written out there: the "
            "same rows would give other tokens tomorrow. Set data.chat_template to a Jinja file with a fixed date"
        )
    if fixed == source:
        return source, ()
    return fixed, (f"{name} writes the date of the day: all rows get {TODAY:%d %b %Y}, whenever they are tokenized",)


def _unusable(name: str, seen: str) -> ConfigError:
    return ConfigError(
        f"{name} does not show which part of its text is the answer: {seen}. Set data.chat_template to a Jinja file "
        "that puts {% generation %} ... {% endgeneration %} around each answer and the token that ends it"
    )
