"""Chat templates of the model families people train: thinking, tools, calls and their results.

Most are TRL's copies, Llama 4 is Axolotl's; the others lie in `templates/`.

The text is transformers' own to the character, and what is trained is what the model writes itself: nothing of a tool's
result, nothing of a question, each answer up to its stop.
"""

import copy
import json
from functools import lru_cache
from pathlib import Path

import pytest

from ds_longft.data.rows import BadRow, Call, Turn
from ds_longft.data.template import THOUGHT_LEFT_OUT
from ds_longft.data.template_source import load_template
from ds_longft.data.thinking import apart, within
from tests.peers import axolotl_folder, trl_folder
from tests.tokenizer import tiny_tokenizer

TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "Where."}}, "required": ["city"]}}}]
)  # fmt: skip
ULM, BONN = Call("weather", '{"city": "Ulm"}', "call00001"), Call("weather", '{"city": "Bonn", "days": 3}', "call00002")
ASK = Turn("user", "Weather in Ulm?")


def answer(content, **more):
    return Turn("assistant", content, **more)


def result(content, call=ULM):
    return Turn("tool", content, name="weather", call_id=call.id)


CHATS = {
    "plain": ((Turn("user", "Hi"), answer("Hello."), Turn("user", "More?"), answer("Bye.")), ""),
    "thought": ((Turn("user", "Hi"), answer("Hello.", thinking="hm hm")), ""),
    "within": ((Turn("user", "Hi"), answer("<think>\nhm hm\n</think>\n\nHello.")), ""),
    "call": ((ASK, answer("", calls=(ULM,)), result("7 degrees"), answer("It is 7.")), TOOLS),
    "thought and call": (
        (ASK, answer("", calls=(ULM,), thinking="I look."), result("7 degrees"), answer("It is 7.", thinking="So."))
        , TOOLS,
    ),
    "words and call": ((ASK, answer("I look.", calls=(ULM,)), result("7 degrees"), answer("It is 7.")), TOOLS),
    "two calls": ((ASK, answer("", calls=(ULM, BONN)), result("7 degrees"), result("9", BONN), answer("Cold.")), TOOLS),
    "ends with a call": ((Turn("user", "Hi"), answer("Yes?"), ASK, answer("", calls=(ULM,))), TOOLS),
}  # fmt: skip
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call><|im_end|>'
QWEN_TWO = QWEN_CALL.removesuffix("<|im_end|>") + (
    '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 3}}\n</tool_call><|im_end|>'
)
XML_CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n</tool_call><|im_end|>"
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
HARMONY_CALL = ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Ulm"}<|call|>'
GLM_CALL = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n</tool_call>"
GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Ulm<|"|>}<tool_call|><|tool_response>'
THOUGHT = "<think>\nhm hm\n</think>\n\nHello."
TEKKEN_CALL = '{"name": "weather", "arguments": {"city": "Ulm"}, "id": "call00001"}'
TEKKEN_CALL_2 = '{"name": "weather", "arguments": {"city": "Bonn", "days": 3}, "id": "call00002"}'
LLAMA4_CALL = '{"name": "weather", "parameters": {"city": "Ulm"}}<|eot|>'
# Family -> (special tokens, chat -> what is trained; a str is the reason why the row is refused).
FAMILIES = {
    "qwen2_5": (
        [],
        {
            "plain": ["Hello.<|im_end|>", "Bye.<|im_end|>"],
            "thought": ["<think>\nhm hm\n</think>\n\nHello.<|im_end|>"],
            "call": [QWEN_CALL, "It is 7.<|im_end|>"],
            "words and call": ["I look.\n" + QWEN_CALL, "It is 7.<|im_end|>"],
            "two calls": [QWEN_TWO, "Cold.<|im_end|>"],
            "ends with a call": ["Yes?<|im_end|>", QWEN_CALL],
        },
    ),
    "qwen3": (
        [],
        {
            "plain": ["Hello.<|im_end|>", "Bye.<|im_end|>"],
            "thought": ["<think>\nhm hm\n</think>\n\nHello.<|im_end|>"],
            "within": ["<think>\nhm hm\n</think>\n\nHello.<|im_end|>"],
            "call": [QWEN_CALL, "It is 7.<|im_end|>"],
            "thought and call": [
                "<think>\nI look.\n</think>\n\n" + QWEN_CALL, "<think>\nSo.\n</think>\n\nIt is 7.<|im_end|>"
            ],
            "two calls": [QWEN_TWO, "Cold.<|im_end|>"],
        },
    ),
    "qwen3_5_think": (  # asks for an answer with <think>, so that the model does not write it
        [],
        {
            "plain": ["Hello.<|im_end|>", "Bye.<|im_end|>"],
            "thought": ["hm hm\n</think>\n\nHello.<|im_end|>"],
            "call": [XML_CALL, "It is 7.<|im_end|>"],
            "thought and call": ["I look.\n</think>\n\n" + XML_CALL, "So.\n</think>\n\nIt is 7.<|im_end|>"],
        },
    ),
    "llama3_1": (
        ["<|eom_id|>"],
        {
            "plain": ["Hello.<|eot_id|>", "Bye.<|eot_id|>"],
            "call": ['{"name": "weather", "parameters": {"city": "Ulm"}}<|eot_id|>', "It is 7.<|eot_id|>"],
            "words and call": "the chat template leaves out words beside a tool call",
            "two calls": "the chat template refuses the row",
        },
    ),
    "gemma3": (
        [],
        {
            "plain": ["Hello.<end_of_turn>", "Bye.<end_of_turn>"],
            "call": "the chat template refuses the row",
        },
    ),
    "gemma4_v5": (
        ["<turn|>"],
        {
            "plain": ["Hello.<turn|>", "Bye.<turn|>"],
            "thought": ["<|channel>thought\nhm hm\n<channel|>Hello.<turn|>"],
            "call": [GEMMA_CALL, "It is 7.<turn|>"],
            "words and call": "the chat template writes other turns inside an answer",
        },
    ),
    "gptoss": (
        ["<|return|>", "<|call|>", "<|start|>"],
        {
            "plain": ["Hello.<|end|>", "Bye.<|return|>"],
            "thought": [HARMONY.format("hm hm", "Hello.")],
            "within": [HARMONY.format("hm hm", "Hello.")],
            "call": [HARMONY_CALL, "It is 7.<|return|>"],
            "thought and call": "the chat template rewrites an answer with thinking",
            "two calls": "the chat template leaves out a tool call",
        },
    ),
    "deepseekv3": (
        ["<｜end▁of▁sentence｜>"],
        {
            "plain": ["Hello.<｜end▁of▁sentence｜>", "Bye.<｜end▁of▁sentence｜>"],
            "thought": "the chat template rewrites an answer with thinking",
            "call": "the chat template writes no tools",
        },
    ),
    "glm4moe": (
        ["<|observation|>"],
        {
            "plain": ["Hello.<|user|>", "Bye."],
            "thought": ["\n<think>hm hm</think>\nHello."],
            "call": [GLM_CALL + "<|observation|>", "It is 7."],
            "thought and call": [
                "\n<think>I look.</think>\n" + GLM_CALL + "<|observation|>", "\n<think>So.</think>\nIt is 7."
            ],
        },
    ),
    "phi3_5": ([], {"plain": ["Hello.<|end|>", "Bye.<|end|>"], "call": "the chat template writes no tools"}),
    "mistral_nemo": (
        ["</s>"],
        {
            "plain": ["Hello.</s>", "Bye.</s>"],
            "thought": [THOUGHT + "</s>"],
            "call": [f"[TOOL_CALLS][{TEKKEN_CALL}]</s>", "It is 7.</s>"],
            "two calls": [f"[TOOL_CALLS][{TEKKEN_CALL}, {TEKKEN_CALL_2}]</s>", "Cold.</s>"],
            "words and call": "the chat template leaves out words beside a tool call",
        },
    ),
    "mistral_small_3_2": (
        ["</s>"],
        {
            "plain": ["Hello.</s>", "Bye.</s>"],
            "call": ['[TOOL_CALLS]weather[CALL_ID]call00001[ARGS]{"city": "Ulm"}</s>', "It is 7.</s>"],
            "ends with a call": ["Yes?</s>", '[TOOL_CALLS]weather[CALL_ID]call00001[ARGS]{"city": "Ulm"}</s>'],
            "words and call": "the chat template leaves out words beside a tool call",
        },
    ),
    "smollm3": (
        [],
        {
            "plain": ["Hello.<|im_end|>", "Bye.<|im_end|>"],
            "within": [THOUGHT + "<|im_end|>"],
            "call": "the chat template writes no tools",  # it reads them from a variable of its own
        },
    ),
    "smollm3_marked": (
        [], {"plain": ["Hello.<|im_end|>", "Bye.<|im_end|>"], "thought": [THOUGHT + "<|im_end|>"]}
    ),
    "granite3_3": (
        ["<|end_of_text|>"],
        {
            "plain": ["Hello.<|end_of_text|>", "Bye.<|end_of_text|>"],
            "thought": [THOUGHT + "<|end_of_text|>"],
            "call": "the chat template leaves out a tool call",
        },
    ),
    "granite4": (
        ["<|end_of_text|>"],
        {
            "plain": ["Hello.<|end_of_text|>", "Bye.<|end_of_text|>"],
            "thought": [THOUGHT + "<|end_of_text|>"],
            "call": [QWEN_CALL.replace("<|im_end|>", "<|end_of_text|>"), "It is 7.<|end_of_text|>"],
            "words and call": ["I look.\n" + QWEN_CALL.replace("im_end", "end_of_text"), "It is 7.<|end_of_text|>"],
            "two calls": [QWEN_TWO.replace("<|im_end|>", "<|end_of_text|>"), "Cold.<|end_of_text|>"],
        },
    ),
    "llama4": (
        ["<|eot|>", "<|header_start|>", "<|header_end|>"],
        {
            "plain": ["Hello.<|eot|>", "Bye.<|eot|>"],
            "thought": [THOUGHT + "<|eot|>"],
            "call": ["<|python_start|><|python_end|>" + LLAMA4_CALL, "It is 7.<|eot|>"],
            "words and call": ["<|python_start|>I look.<|python_end|>" + LLAMA4_CALL, "It is 7.<|eot|>"],
        },
    ),
}  # fmt: skip


_made_once = lru_cache(tiny_tokenizer)


def source_of(family):
    own = Path(__file__).parent / "templates" / f"{family.removesuffix('_marked')}.jinja"
    if family == "llama4":
        return (axolotl_folder() / "utils/chat_templates/templates/llama4.jinja").read_text(encoding="utf-8")
    if not own.is_file():
        return (trl_folder() / f"chat_templates/{family}.jinja").read_text(encoding="utf-8")
    source = own.read_text(encoding="utf-8")
    if family == "smollm3_marked":  # HuggingFaceTB's original marks answers so, with the header
        begin = source.index("{%- if reasoning_mode", source.index("for message in messages"))
        end = source.index("{%- elif", begin)
        source = f"{source[:begin]}{{% generation %}}{source[begin:end]}{{% endgeneration %}}{source[end:]}"
    return source


def tokenizer_of(family, special):
    tokenizer = copy.deepcopy(_made_once())
    tokenizer.add_tokens(special, special_tokens=True)
    if special and family.startswith(("deepseek", "gemma4", "mistral", "granite", "llama4")):
        tokenizer.add_special_tokens({"eos_token": special[0]})
    tokenizer.chat_template = source_of(family)
    return tokenizer


def trained(rendered):
    return [rendered.text[span.start : span.end] for span in rendered.spans]


@pytest.mark.parametrize(("family", "chat"), [(f, c) for f in FAMILIES for c in FAMILIES[f][1]])
def test_what_is_trained_of_each_family(family, chat):
    special, expected = FAMILIES[family]
    template = load_template(tokenizer_of(family, special), None)
    if isinstance(expected[chat], str):
        with pytest.raises(BadRow) as bad:
            template.render(*CHATS[chat])
        assert bad.value.reason == expected[chat]
        return
    rendered = template.render(*CHATS[chat])
    assert trained(rendered) == expected[chat]
    assert rendered.unused == ()


@pytest.mark.parametrize(("family", "chat"), [(f, c) for f in FAMILIES for c in CHATS])
def test_the_text_is_that_of_apply_chat_template(family, chat):
    tokenizer = tokenizer_of(family, FAMILIES[family][0])
    template = load_template(tokenizer, None)
    turns, tools = CHATS[chat]
    try:
        text = template.render(turns, tools).text
    except BadRow:
        return
    messages = []
    for turn in map(apart if template._reads_thinking else within, turns):
        message = {"role": turn.role, "content": turn.content}
        if turn.thinking:
            message["reasoning_content"] = message["thinking"] = turn.thinking
        if turn.calls:
            message["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": json.loads(c.arguments)}}
                for c in turn.calls
            ]
        if turn.role == "tool":
            message |= {"name": turn.name, "tool_call_id": turn.call_id}
        messages.append(message)
    schemas = json.loads(tools) if tools else None
    source = template.source  # with the date of the day written out
    assert text == tokenizer.apply_chat_template(messages, tools=schemas, tokenize=False, chat_template=source)


@pytest.mark.parametrize("family", ["qwen3", "gptoss", "glm4moe", "qwen3_5_think", "gemma4_v5"])
def test_thoughts_of_earlier_answers_by_the_templates_own_rule(family):
    template = load_template(tokenizer_of(family, FAMILIES[family][0]), None)
    chat = (Turn("user", "Hi"), answer("Hello.", thinking="hm hm"), Turn("user", "so"), answer("Bye.", thinking="oh"))
    with pytest.raises(BadRow, match=r"data\.thinking: last"):
        template.render(chat)
    rendered = template.render(chat, own_rule=True)
    assert rendered.unused == (THOUGHT_LEFT_OUT,)
    assert "oh" in trained(rendered)[1]
    assert "hm hm" not in rendered.text
