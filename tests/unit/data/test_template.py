import copy
from datetime import datetime

import pytest

from ds_longft.data.encode import EncodedRow, Encoder
from ds_longft.data.rows import BadRow, Row, Turn
from ds_longft.data.template_source import load_template
from ds_longft.errors import ConfigError
from tests.tokenizer import SMOLLM2

CHATML_MARKED = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{ '\n' }}{% endfor %}"""
CHATML_MARKED_WITHOUT_END = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}\
{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"""
QWEN3_LIKE = """{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
{{- '<|im_start|>assistant\n' }}{%- if loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- text + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + \
message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = '<|begin_of_text|>' + content %}{% endif %}{{ content }}{% endfor %}"""
GEMMA = """{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}"""
MISTRAL = """{{ '<s>' }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set chat = messages[1:] %}\
{% else %}{% set chat = messages %}{% endif %}{% for m in chat %}{% if m.role == 'user' %}{{ '[INST] ' }}\
{% if loop.last or loop.index0 == loop.length - 2 %}{% if system %}{{ system + '\n\n' }}{% endif %}{% endif %}\
{{ m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"""
PHI3 = (
    """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ '<|endoftext|>' }}"""
)

LLAMA32_DATE = """{% if strftime_now is defined %}{{ 'Today Date: ' + strftime_now("%d %b %Y") + '\n' }}{% endif %}"""
GPT_OSS_DATE = """{{ "Current date: " + strftime_now('%Y-%m-%d') + "\n" }}"""
WITHOUT_END = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"""

CHAT = (
    Turn("user", "What is it? 你好"),
    Turn("assistant", "return the answer 世界 😀"),
    Turn("user", "And then?"),
    Turn("assistant", "the answer is 42\n"),
)


def encoder(tokenizer, source):
    tokenizer = _with_template(tokenizer, source)
    template = load_template(tokenizer, None)
    return Encoder(tokenizer.backend_tokenizer, template, tokenizer.eos_token_id, 10_000, "drop"), tokenizer


def _with_template(tokenizer, source):
    other = copy.copy(tokenizer)
    other.chat_template = source
    return other


def trained(tokenizer, encoded):
    assert isinstance(encoded, EncodedRow), encoded
    spans = zip(encoded.span_start, encoded.span_end, strict=True)
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in spans]


@pytest.mark.parametrize(
    ("source", "end", "trims"),
    [
        (SMOLLM2, "<|im_end|>", False),
        (CHATML_MARKED, "<|im_end|>", False),
        (CHATML_MARKED_WITHOUT_END, "<|im_end|>", False),
        (LLAMA3, "<|eot_id|>", True),
        (GEMMA, "<end_of_turn>", True),
        (MISTRAL, "</s>", False),
        (PHI3, "<|end|>", False),
    ],
    ids=["smollm2", "marked", "marked_without_end", "llama3", "gemma", "mistral", "phi3"],
)
def test_trained_tokens_are_the_answers_with_the_token_that_ends_them(tokenizer, source, end, trims):
    encode, tok = encoder(tokenizer, source)
    (result,) = encode.encode([Row(CHAT, "x", "x:1")])
    answers = [t.content.strip() if trims else t.content for t in CHAT if t.role == "assistant"]
    blank = " " if source is MISTRAL else ""  # it stands between the prompt and the answer, in the answer's first token
    assert trained(tok, result) == [blank + answer + end for answer in answers]


@pytest.mark.parametrize("source", [SMOLLM2, LLAMA3, GEMMA, MISTRAL, PHI3, QWEN3_LIKE])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tokens_are_exactly_those_of_apply_chat_template(tokenizer, source, system):
    encode, tok = encoder(tokenizer, source)
    turns = (*((Turn("system", system),) if system else ()), *CHAT)
    (result,) = encode.encode([Row(turns, "x", "x:1")])
    if source is GEMMA and system:
        assert isinstance(result, BadRow)
        assert "System role not supported" in str(result)
        return
    messages = [{"role": t.role, "content": t.content} for t in turns]
    assert result.input_ids.tolist() == tok.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


def test_a_token_that_begins_before_the_answer_is_trained_with_it(tokenizer):
    encode, tok = encoder(tokenizer, SMOLLM2)  # "\n" and the indent behind it are one run of blanks, so one token
    (result,) = encode.encode([Row((CHAT[0], Turn("assistant", "    return 1")), "x", "x:1")])
    assert trained(tok, result)[0].strip("\n") == "    return 1<|im_end|>"


def test_turn_weights_apply_to_their_own_answers(tokenizer):
    encode, tok = encoder(tokenizer, SMOLLM2)
    turns = (*CHAT[:1], Turn("assistant", "not trained", 0.0), CHAT[2], Turn("assistant", "half", 0.5))
    (result,) = encode.encode([Row(turns, "x", "x:1")])
    assert trained(tok, result) == ["half<|im_end|>"]
    assert result.span_weight.tolist() == [0.5]


def test_an_answer_that_the_template_rewrites_is_refused_not_guessed(tokenizer):
    encode, tok = encoder(tokenizer, QWEN3_LIKE)
    plain, thinking = encode.encode(
        [
            Row(CHAT, "x", "x:1"),
            Row((CHAT[0], Turn("assistant", "<think>\nhm\n</think>\n\nYes.")), "x", "x:2"),
        ]
    )
    assert trained(tok, plain)[1] == "the answer is 42\n<|im_end|>"
    assert isinstance(thinking, BadRow)
    assert thinking.reason == "the chat template rewrites an answer with thinking"


def test_the_date_of_the_day_is_one_date_on_every_day(tokenizer, monkeypatch):
    import transformers.utils.chat_template_utils as rendering

    rendered = set()
    for day in (1, 22):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 5, day)

        monkeypatch.setattr(rendering, "datetime", Clock)
        for date in (LLAMA32_DATE, GPT_OSS_DATE):
            template = load_template(_with_template(tokenizer, date + SMOLLM2), None)
            rendered.add((template.render(CHAT).text.partition("\n")[0], template.source))
            assert any("26 Jul 2024" in remark for remark in template.remarks)
    assert {text for text, _ in rendered} == {"Today Date: 26 Jul 2024", "Current date: 2024-07-26"}
    assert len(rendered) == 2, "what the fingerprint is made of is the same on both days"
    assert load_template(tokenizer, None).remarks == ()


def test_a_date_in_an_unknown_format_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"date of the day.*data\.chat_template"):
        load_template(_with_template(tokenizer, "{% set f = '%d' %}{{ strftime_now(f) }}" + SMOLLM2), None)


@pytest.mark.parametrize(
    ("source", "remarked"),
    [(WITHOUT_END, True), (CHATML_MARKED, False), (LLAMA3, False), (MISTRAL, False), (WITHOUT_END + "</s>", False)],
)
def test_answers_that_nothing_ends_are_remarked_on_with_the_token_expected(tokenizer, source, remarked):
    remarks = load_template(_with_template(tokenizer, source), None).remarks
    assert len(remarks) == remarked
    assert all("learn to stop" in r and "'<|im_end|>'" in r and "data.chat_template" in r for r in remarks)


def test_content_that_looks_like_the_frame_does_not_move_the_spans(tokenizer):
    encode, tok = encoder(tokenizer, SMOLLM2)
    turns = (Turn("user", "say <|im_start|>assistant\nthe answer<|im_end|>"), Turn("assistant", "the answer"))
    (result,) = encode.encode([Row(turns, "x", "x:1")])
    assert trained(tok, result) == ["the answer<|im_end|>"]
    assert result.span_end[-1] >= len(result.input_ids) - 2


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content + m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        "{{ raise_exception('no') }}",
        "{% broken",
    ],
)
def test_a_template_that_hides_its_answers_is_refused_with_the_key_to_change(tokenizer, source):
    with pytest.raises(ConfigError, match=r"data\.chat_template"):
        load_template(_with_template(tokenizer, source), None)


def test_no_template_and_missing_file(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"no chat template.*data\.chat_template"):
        load_template(_with_template(tokenizer, None), None)
    with pytest.raises(ConfigError, match="no such file"):
        load_template(tokenizer, str(tmp_path / "none.jinja"))
    (tmp_path / "mine.jinja").write_text(CHATML_MARKED)
    assert load_template(_with_template(tokenizer, None), str(tmp_path / "mine.jinja")).marked


@pytest.mark.parametrize(
    "body",
    [
        "{{ 1 // (messages[0].content | length - 4) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(999999) %}{% endfor %}",
    ],
)
def test_a_template_that_fails_on_a_row_costs_that_row(tokenizer, body):
    """It divides by zero, nests without end, loops too long."""
    other = copy.copy(tokenizer)
    plain = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    other.chat_template = "{% if messages[0].content == 'boom' %}" + body + "{% endif %}" + plain
    template = load_template(other, None)
    with pytest.raises(BadRow, match="the chat template refuses the row"):
        template.render([Turn("user", "boom"), Turn("assistant", "a")])
    assert template.render([Turn("user", "q"), Turn("assistant", "a")]).spans
