"""The chat template: turns -> text, and which characters of the text are the answers.

A template that carries `{% generation %}` marks says itself where its answers lie. Most templates carry none. Then the
template is rendered a second time with a placeholder in the place of each thing that is said: the text around the
placeholders is the frame, and the answers are what fills it in the first text (`frame.py`). The text that is trained on
is always the template's own, to the last character, and a row that does not fit into its frame exactly (an answer
rewritten, repeated or left out) is refused instead of guessed. Works for every family whose template writes an answer
down as it is: ChatML (SmolLM2, Qwen), Llama-3, Mistral, Gemma, Phi-3, DeepSeek, GLM, gpt-oss, ...
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from typing import Any

from ds_longft.config.shipped import TEMPLATES
from ds_longft.data.frame import Closing, Filled, Opening, Span, closed, fill, mark, spans_of
from ds_longft.data.rows import BadRow, Call, Role, Turn
from ds_longft.data.thinking import THINK_END, apart, within

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = (Turn("user", "How many?"), Turn("assistant", "Just one."))
_PLAIN_CHATS = (
    PROBE,
    (Turn("system", " Be brief. "), *PROBE, Turn("user", " And then?\n"), Turn("assistant", " Two.\n")),
)
_THOUGHT = (PROBE[0], Turn("assistant", "Just one.", thinking="Let me count."))
_CALL = Turn("assistant", "", calls=(Call("look_up", '{"word": "sea"}', "call00001"),))
_CALLED = (PROBE[0], _CALL, Turn("tool", "salt water", name="look_up", call_id="call00001"), PROBE[1])
_TOOLS = (
    '[{"type": "function", "function": {"name": "look_up", "description": "A word\'s meaning.", "parameters": '
    '{"type": "object", "properties": {"word": {"type": "string", "description": "The word."}}, "required": '
    '["word"]}}}]'
)
MISSING = "an answer is missing from its text, or there twice"
THOUGHT_LEFT_OUT = "thinking that the chat template leaves out of an earlier answer"


@dataclass(frozen=True)
class Rendered:
    """The text of a row and the parts of it that are trained."""

    text: str
    spans: tuple[Span, ...]  # in order, weight > 0
    unused: tuple[str, ...] = ()  # what the template leaves out, where that is asked for

    @property
    def borders(self) -> list[int]:
        """Characters over which no token may reach, so that an answer begins and ends with a token of its own."""
        return [at for span in self.spans for at in (span.start, span.said_end, span.end)]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template known to show where its answers lie. Picklable; `template_source.load_template` makes it."""

    source: str  # Jinja
    variables: dict[str, str]  # bos_token, eos_token, ... as the template knows them
    turn_ends: tuple[str, ...]  # tokens that close an answer
    remarks: tuple[str, ...] = ()  # what a user should know before training with it
    in_parts: bool = False  # it reads contents as lists of parts only

    @property
    def marked(self) -> bool:
        """Whether the template carries its own `{% generation %}` marks."""
        return _GENERATION.search(self.source) is not None

    def render(self, turns: Sequence[Turn], tools: str = "", *, own_rule: bool = False) -> Rendered:
        """Text of a chat and the character spans of its answers, each with the token that closes it.

        Args:
            turns: the chat.
            tools: JSON of a list of tool schemas, or nothing.
            own_rule: the template may leave out thoughts of all answers but the last.

        Raises:
            BadRow: the template refuses the chat, leaves out something that is said, or an answer cannot be found.
        """
        turns = [self._laid_out(turn) for turn in turns]
        text, marks = self._render(turns, tools, marks=self.marked)
        self._check_nothing_is_left_out(turns, tools, text)
        answers = _answers(turns)
        if not self.marked:
            filled = self._filled(turns, tools, text)
            by_turn = spans_of(filled, turns, text, self._openings, self._closing, self.turn_ends)
            left_out = _thoughts_left_out(turns, filled)
        elif len(marks) == len(answers):
            by_turn = {i: self._marked_span(text, *span) for i, span in zip(answers, marks, strict=True)}
            left_out = []
            if any(turn.calls or turn.thinking for turn in turns):
                left_out = _thoughts_left_out(turns, self._filled(turns, tools, text))
            for turn in turns:
                if not _is_in(turn.content.strip(), text):
                    raise self._rewrites(turns, BadRow("the chat template rewrites what is said", turn.content[:60]))
        else:
            seen = f"{len(marks)} marks, {len(answers)} answers"
            raise BadRow("the chat template does not mark each answer once", seen)
        if left_out and not (own_rule and answers[-1] not in left_out):
            raise BadRow("the chat template rewrites an answer with thinking", self._keeps_thinking)
        lost = [i for i in answers if turns[i].trained and i not in by_turn]
        if lost:
            raise BadRow("the chat template rewrites what is said", MISSING)
        spans = tuple(replace(by_turn[i], weight=turns[i].weight) for i in answers if turns[i].trained)
        return Rendered(text, spans, (THOUGHT_LEFT_OUT,) if left_out else ())

    def _laid_out(self, turn: Turn) -> Turn:
        """A turn with its thought where this template reads it: in a field of its own, or within the content."""
        if turn.role != "assistant" or not (turn.thinking or THINK_END in turn.content):
            return turn
        return apart(turn) if self._reads_thinking else within(turn)

    def _render(
        self, turns: Sequence[Turn], tools: str = "", *, marks: bool = False, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        # here, not above: transformers takes longer to import than everything else a tokenising process needs
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[self._message(turn) for turn in turns]],
                tools=json.loads(tools) if tools else None,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # a program of somebody else's: it divides by zero, recurses, loops too long
            raise BadRow("the chat template refuses the row", f"{type(error).__name__}: {error}") from error
        return texts[0], spans[0] if marks else []

    def _message(self, turn: Turn) -> dict[str, Any]:
        """A turn as templates know messages."""
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.thinking:
            # two names for it, as newer transformers gives it: gpt-oss's template reads the second
            message["reasoning_content"] = message["thinking"] = turn.thinking
        if turn.calls:
            as_text, blank = self._way_of_calls
            message["content"] = turn.content or blank
            message["tool_calls"] = []
            for call in turn.calls:
                arguments = call.arguments if as_text else json.loads(call.arguments)
                function = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
                message["tool_calls"].append(function | ({"id": call.id} if call.id else {}))
        if self.in_parts and message["content"] is not None:
            message["content"] = [{"type": "text", "text": message["content"]}]
        more = {"name": turn.name, "tool_call_id": turn.call_id}
        return message | {key: value for key, value in more.items() if value}

    @cached_property
    def _way_of_calls(self) -> tuple[bool, str | None]:
        """(whether arguments go in as text, content of an answer that only calls): the first way that shows a call."""
        ways: list[tuple[bool, str | None]] = [(False, ""), (False, None), (True, ""), (True, None)]
        for way in ways:
            other = replace(self)
            other.__dict__["_way_of_calls"] = way
            try:
                text, _ = other._render(_CALLED)
            except BadRow:
                continue
            if text.count("look_up") and "sea" in text and "{'" not in text:
                return way
        return ways[0]

    @cached_property
    def _reads_thinking(self) -> bool:
        """Whether the template writes what stands in `reasoning_content`."""
        try:
            return _THOUGHT[1].thinking in self._render(_THOUGHT)[0]
        except BadRow:
            return False

    @cached_property
    def _writes_tools(self) -> bool:
        try:
            return "look_up" in self._render(PROBE[:1], _TOOLS)[0]
        except BadRow:
            return False

    def _check_nothing_is_left_out(self, turns: Sequence[Turn], tools: str, text: str) -> None:
        """Raise `BadRow` for tools, calls and turns that the template takes without writing them."""
        if tools and not self._writes_tools:
            raise BadRow("the chat template writes no tools", "set data.chat_template to one that does")
        for turn in turns:
            if turn.role != "assistant" and not _is_in(turn.content.strip(), text):
                seen = f"by {turn.role}: {turn.content.strip()[:40]!r}"
                raise BadRow("the chat template leaves out what is said", seen)
            for call in turn.calls:
                if call.name not in text:
                    raise BadRow("the chat template leaves out a tool call", call.name)

    def _filled(self, turns: Sequence[Turn], tools: str, text: str) -> Filled:
        """Where in `text`, the render of `turns`, things are said. Raises `BadRow`: it is not what was said."""
        plain = not tools and not any(turn.calls or turn.thinking or turn.role == "tool" for turn in turns)

        def frame(*roles: Role) -> str:
            return self._render([self._named(t, i) if t.role in roles else t for i, t in enumerate(turns)], tools)[0]

        whole = partial(frame, "system", "user", "assistant", "tool")
        if plain:  # the frame of other chats with the same roles fits nearly always, and costs nothing
            whole = partial(self._frame_of_roles, tuple(turn.role for turn in turns))
        ways = (whole, partial(frame, "assistant", "tool"))  # some templates look into what the user says
        seen = BadRow("the chat template rewrites what is said")
        for way in ways:
            try:
                return fill(way(), turns, text)
            except BadRow as bad:
                seen = bad
        raise self._rewrites(turns, seen)

    def _rewrites(self, turns: Sequence[Turn], seen: BadRow) -> BadRow:
        """What to say of a row whose text is not what was said: with thinking there is something to do about it."""
        if any(THINK_END in turns[i].content for i in _answers(turns)):
            return BadRow("the chat template rewrites an answer with thinking", self._keeps_thinking)
        return seen

    def _named(self, turn: Turn, i: int) -> Turn:
        """The turn with placeholders for what is said; what is empty stays empty, because templates test it."""
        calls = tuple(replace(call, name=mark(i, f"n{k}")) for k, call in enumerate(turn.calls))
        content = mark(i, "c") if turn.content.strip() or not (turn.calls or turn.thinking) else turn.content
        return replace(turn, content=content, thinking=mark(i, "t") if turn.thinking.strip() else "", calls=calls)

    @cached_property
    def _openings(self) -> dict[str, Opening]:
        """What stands between a turn of each role and the answer to it."""
        openings: dict[str, Opening] = {}
        for chat in (PROBE, _CALLED):
            with_marks = [self._named(turn, i) for i, turn in enumerate(chat)]
            try:
                prompt, _ = self._render(with_marks[:-1], prompt=True)
                bare, _ = self._render(with_marks[:-1])
                whole, _ = self._render(with_marks)
            except BadRow:
                continue
            before, answer = (mark(len(chat) - k, "c") for k in (2, 1))
            openings[chat[-2].role] = Opening.between(before, answer, prompt, bare, whole)
        return openings

    @cached_property
    def _closing(self) -> Closing:
        """What stands behind the last call of an answer."""
        named = [self._named(turn, i) for i, turn in enumerate(_CALLED)]
        try:
            return Closing.of("sea", self._render(named[:2])[0], self._render(named)[0], self.turn_ends)
        except BadRow:
            return Closing("")

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
                keeps = f"data.chat_template: {file.name} keeps it as given, and is otherwise the same"
                break
        else:
            keeps = "a data.chat_template with {% generation %} marks around answers as they are given would keep it"
        return f"{keeps}; data.thinking: last or none leaves it out"

    @cached_property
    def _frame_of_roles(self) -> Callable[[tuple[Role, ...]], str]:
        """Render of a chat with a placeholder for every content, remembered by the chat's roles."""
        return lru_cache(1024)(
            lambda roles: self._render([Turn(role, mark(i, "c")) for i, role in enumerate(roles)])[0]
        )

    def __getstate__(self) -> dict[str, Any]:
        """What is remembered stays behind when the template is sent to another process."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _marked_span(self, text: str, start: int, end: int) -> Span:
        """What a template marks, without the header that asks for the answer and blanks behind its stop."""
        for asking in {opening.asking for opening in self._openings.values()} - {""}:
            if text.startswith(asking, start):
                start += len(asking)
                break
        bare = text[start:end].rstrip()
        stop = next((token for token in self.turn_ends if bare.endswith(token)), None)
        if stop is None:
            return Span(start, end, closed(text, end, self.turn_ends))
        return Span(start, start + len(bare) - len(stop), start + len(bare))


def _is_in(said: str, text: str) -> bool:
    """Whether a text holds these words, as they are or as JSON writes them."""
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def _thoughts_left_out(turns: Sequence[Turn], filled: Filled) -> list[int]:
    return [i for i in _answers(turns) if turns[i].thinking.strip() and (i, "t") not in filled.at]


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn.role == "assistant"]
