"""The chat template: turns -> text, and which characters of the text are the answers.

A template that carries `{% generation %}` marks says itself where its answers lie. Most templates carry none. Then the
template is rendered a second time with a placeholder in the place of each content: the text around the placeholders is
the frame, and the answers are what fills it in the first text. The text that is trained on is always the template's
own, to the last character, and a row that does not fit into its frame exactly (an answer rewritten, repeated or left
out) is refused instead of guessed. Works for every family whose template writes an answer
down as it is: ChatML (SmolLM2, Qwen), Llama-3, Mistral, Gemma, Phi-3, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from ds_longft.data.rows import BadRow, Role, Turn
from ds_longft.errors import ConfigError
from ds_longft.shipped import TEMPLATES, find_template

# Tokens that close a turn in the known families; the tokenizer's eos token counts too.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>", "</s>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_PROBE = (Turn("user", "How many?"), Turn("assistant", "Just one."))
_PLAIN_CHATS = (
    _PROBE,
    (Turn("system", " Be brief. "), *_PROBE, Turn("user", " And then?\n"), Turn("assistant", " Two.\n")),
)
THINK_END = "</think>"
# Written where a template asks for the date of the day (Llama 3.2, GPT-OSS), so that the same rows give the same tokens
# on every day. It is the date that Llama's own templates fall back to.
TODAY = datetime(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])([^'"\\]*)\1\s*\)""")


@dataclass(frozen=True)
class Rendered:
    """The text of a row and the parts of it that are trained."""

    text: str
    spans: tuple[tuple[int, int, float], ...]  # (first character, one past the last, weight), in order, weight > 0


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that is known to show where its answers lie. Picklable; make it with `load_template`."""

    source: str  # Jinja
    variables: dict[str, str]  # bos_token, eos_token, ... as the template knows them
    turn_ends: tuple[str, ...]  # tokens that close an answer
    remarks: tuple[str, ...] = ()  # what a user should know before training with it

    @property
    def marked(self) -> bool:
        """Whether the template carries its own `{% generation %}` marks."""
        return _GENERATION.search(self.source) is not None

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """Text of a chat and the character spans of its answers, each with the token that closes it.

        Raises `BadRow` when the template refuses the chat or an answer cannot be found in the text.
        """
        if self.marked:
            text, spans = self._render(turns, marks=True)
        else:
            text, _ = self._render(turns)
            spans = self._by_frame(turns, text)
        answers = [turn for turn in turns if turn.role == "assistant"]
        if len(spans) != len(answers):
            seen = f"{len(spans)} marks, {len(answers)} answers"
            raise BadRow("the chat template does not mark each answer once", seen)
        trained = [(*span, turn.weight) for span, turn in zip(spans, answers, strict=True) if turn.trained]
        return Rendered(text, tuple((start, self._with_turn_end(text, start, end), w) for start, end, w in trained))

    def _render(self, turns: Sequence[Turn], *, marks: bool = False) -> tuple[str, list[tuple[int, int]]]:
        # here, not above: transformers takes longer to import than everything else a tokenising process needs
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                **self.variables,
            )
        except Exception as error:  # a program of somebody else's: it divides by zero, recurses, loops too long
            raise BadRow("the chat template refuses the row", f"{type(error).__name__}: {error}") from error
        return texts[0], spans[0] if marks else []

    def _by_frame(self, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
        """Where the answers lie in `text`, the template's render of `turns`."""
        try:  # the frame of other chats with the same roles fits nearly always, and costs nothing
            return _fill(self._frame_of_roles(tuple(turn.role for turn in turns)), turns, text)
        except BadRow:
            names = [replace(t, content=_name(i)) if t.role == "assistant" else t for i, t in enumerate(turns)]
            try:
                return _fill(self._render(names)[0], turns, text)
            except BadRow as bad:
                if any(THINK_END in turns[i].content for i in _answers(turns)):
                    raise BadRow("the chat template rewrites an answer with thinking", self._keeps_thinking) from bad
                raise

    @cached_property
    def _keeps_thinking(self) -> str:
        """What to do about answers with thinking: a shipped template, if it writes all other chats as this one does."""
        for file in sorted(TEMPLATES.glob("*.jinja")):
            shipped = replace(self, source=file.read_text(encoding="utf-8"))
            try:
                same = all(shipped._render(chat) == self._render(chat) for chat in _PLAIN_CHATS)
            except BadRow:
                same = False
            if same:
                return f"data.chat_template: {file.name} keeps it as given, and is otherwise the same"
        return "a data.chat_template with {% generation %} marks around answers as they are given would keep it"

    @cached_property
    def _frame_of_roles(self) -> Callable[[tuple[Role, ...]], str]:
        """Render of a chat with a placeholder for every content, remembered by the chat's roles."""
        return lru_cache(1024)(lambda roles: self._render([Turn(role, _name(i)) for i, role in enumerate(roles)])[0])

    def __getstate__(self) -> dict[str, Any]:
        """What is remembered stays behind when the template is sent to another process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _with_turn_end(self, text: str, start: int, end: int) -> int:
        """`end`, moved behind the token that closes the answer, so that the model learns to stop."""
        if text[start:end].rstrip().endswith(self.turn_ends):
            return end
        closing = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.turn_ends)) + ")").match(text, end)
        return closing.end() if closing else end


def _name(turn: int) -> str:
    """Placeholder for the content of a turn, in characters of private use."""
    return f"\ue000{turn}\ue001"


def _fill(frame: str, turns: Sequence[Turn], text: str) -> list[tuple[int, int]]:
    """Read `text` along the frame; returns the spans of the answers. A character that does not fit is a `BadRow`."""
    literals = re.split("\ue000([0-9]+)\ue001", frame)  # literal, turn, literal, turn, ..., literal
    filled = [int(turn) for turn in literals[1::2]]
    spans = []
    at = len(literals[0])
    fits = text.startswith(literals[0])
    for number, following in zip(filled, literals[2::2], strict=True):
        content = turns[number].content
        ways = (content, content.strip(), content.lstrip(), content.rstrip())  # many templates trim
        ends = (at + len(way) for way in ways if text.startswith(way, at) and text.startswith(following, at + len(way)))
        end = next(ends, None) if fits else None
        if end is None:
            raise BadRow("the chat template rewrites what is said", f"seen {text[at : at + 60]!r}")
        if turns[number].role == "assistant":
            spans.append((at, end))
        at = end + len(following)
    if at != len(text) or [n for n in filled if turns[n].role == "assistant"] != _answers(turns):
        raise BadRow("the chat template rewrites what is said", "an answer is missing from its text, or there twice")
    return spans


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn.role == "assistant"]


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
    template = ChatTemplate(source, variables, tuple(sorted(ends, key=lambda token: (-len(token), token))))
    try:
        probe = template.render(_PROBE)
    except BadRow as bad:
        raise _unusable(name, str(bad)) from bad
    start, end, _ = probe.spans[0]
    if _PROBE[1].content not in probe.text[start:end] or _PROBE[0].content in probe.text[start:end]:
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
