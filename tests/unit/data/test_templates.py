"""The shipped chat templates against the originals that TRL carries copies of: the same but for the thinking."""

import copy

import pytest

from ds_longft.config.shipped import find_template
from ds_longft.data.encode import Encoder
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.template_source import load_template, without_marks
from tests.peers import trl_folder
from tests.tokenizer import tiny_tokenizer

CASES = [
    ("qwen3", "qwen3_thinking", "<|im_end|>"),
    ("deepseek_r1_distill", "deepseek_r1_thinking", "<｜end▁of▁sentence｜>"),
    ("deepseekv3", "deepseek_r1_thinking", "<｜end▁of▁sentence｜>"),
]
PLAIN = [
    (Turn("user", "Q?"), Turn("assistant", "return the answer 世界 😀")),
    (Turn("user", " Q?\n"), Turn("assistant", "\n  one\n"), Turn("user", "And?"), Turn("assistant", "\ntwo \n")),
    (
        Turn("system", "Be brief.\n"),
        Turn("user", "Q?"),
        Turn("assistant", "1"),
        Turn("user", "R?"),
        Turn("assistant", "2"),
    ),
    (Turn("user", "say </think>"), Turn("assistant", "no", 0.0), Turn("user", "why?"), Turn("assistant", "so", 0.5)),
]
THOUGHT = (
    Turn("user", "Q?"),
    Turn("assistant", "<think>\nhm\n</think>\n\nYes."),
    Turn("user", "Sure?"),
    Turn("assistant", "<think>\nwell\n\nhm\n</think>\n\n</think> closes it."),
)


def original_of(family: str) -> str:
    """A model's own chat template."""
    return (trl_folder() / f"chat_templates/{family}.jinja").read_text(encoding="utf-8")


@pytest.fixture(params=CASES, ids=[case[0] for case in CASES])
def case(request):
    """(tokenizer with the original template, path of the shipped one, the token that ends an answer)."""
    original, shipped, end = request.param
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = original_of(original)
    return tokenizer, f"{shipped}.jinja", end


def encoded(tokenizer, path, *chats):
    encoder = Encoder(tokenizer.backend_tokenizer, load_template(tokenizer, path), tokenizer.eos_token_id, 9999, "drop")
    return encoder.encode([Row(turns, "x", "x:1") for turns in chats])


def test_chats_without_thinking_give_the_tokens_and_targets_of_the_original(case):
    tokenizer, shipped, _ = case
    for own, ours in zip(encoded(tokenizer, None, *PLAIN), encoded(tokenizer, shipped, *PLAIN), strict=True):
        assert own.input_ids.tolist() == ours.input_ids.tolist()
        assert own.span_start.tolist() == ours.span_start.tolist()
        assert own.span_end.tolist() == ours.span_end.tolist()
        assert own.span_weight.tolist() == ours.span_weight.tolist()


def test_thinking_is_kept_and_trained_in_every_answer(case):
    tokenizer, shipped, end = case
    (row,) = encoded(tokenizer, shipped, THOUGHT)
    spans = zip(row.span_start, row.span_end, strict=True)
    trained = [tokenizer.decode(row.input_ids[start:stop]) for start, stop in spans]
    assert trained == [turn.content + end for turn in THOUGHT if turn.role == "assistant"]


def test_the_original_refuses_thinking_and_names_the_shipped_template(case):
    tokenizer, shipped, _ = case
    (row,) = encoded(tokenizer, None, THOUGHT)
    assert isinstance(row, BadRow)
    assert row.reason == "the chat template rewrites an answer with thinking"
    assert f"data.chat_template: {shipped}" in row.detail


def test_a_template_that_differs_elsewhere_is_not_offered(case):
    tokenizer, *_ = case
    other = copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("message.content", "message.content.strip()") + "{{ '.' }}"
    (row,) = encoded(other, None, THOUGHT)
    assert isinstance(row, BadRow)
    assert ".jinja" not in row.detail
    assert "{% generation %}" in row.detail


@pytest.mark.parametrize("settings", [{}, {"enable_thinking": False}])
def test_prompts_are_those_of_the_original(case, settings):
    tokenizer, shipped, _ = case
    messages = [{"role": "user", "content": "Q?"}]
    settings = {"tokenize": False, "add_generation_prompt": True, **settings}
    own = tokenizer.apply_chat_template(messages, **settings)
    assert tokenizer.apply_chat_template(messages, chat_template=find_template(shipped).read_text(), **settings) == own


def test_the_same_text_without_marks(case):
    """As it is saved for a base model: few programs but transformers know the marks."""
    _, shipped, end = case
    source = find_template(shipped).read_text(encoding="utf-8")
    bare = without_marks(source)
    assert "generation %" not in bare
    messages = [{"role": turn.role, "content": turn.content} for turn in THOUGHT]
    tokenizer = tiny_tokenizer()
    marked, plain = (tokenizer.apply_chat_template(messages, chat_template=t, tokenize=False) for t in (source, bare))
    assert marked == plain
    assert plain.count(end) == 2 + (end == "<|im_end|>") * 2


def test_a_last_answer_with_thinking_reads_as_in_qwen3s_own():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = original_of("qwen3")
    messages = [{"role": turn.role, "content": turn.content} for turn in THOUGHT[:2]]
    ours = load_template(tokenizer, "qwen3_thinking.jinja").render(THOUGHT[:2]).text
    assert ours == tokenizer.apply_chat_template(messages, tokenize=False)
