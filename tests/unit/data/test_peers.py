"""Token ids and targets beside TRL's and Axolotl's, for rows of every layout and every template.

Where they differ, `DIFFERENCES` says why in a line that docs/data.md holds too. Pairs: tests/distributed/test_dpo_trl.py.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from jinja2 import TemplateError
from trl.data_utils import _tokenize, common_prefix_length, maybe_convert_to_chatml

from ds_longft.data.encode import Encoder, without_trimmed_offsets
from ds_longft.data.formats import to_row
from ds_longft.data.template_source import load_template
from tests.peers import axolotl_chat_templates, trl_folder
from tests.unit.data.test_families import FAMILIES, TOOLS, tokenizer_of

ROWS = int(os.environ.get("DS_LONGFT_TEST_ROWS", "6"))  # 40 take two minutes
PIECES = [
    "the answer",
    "return",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "x",
    "世界",
    "你",
    "😀",
    "'s",
    ".",
    ":",
    "{",
    "1234",
    "user",
]
# What is different -> the line of docs/data.md that says why.
DIFFERENCES = {
    "border": "A token that reaches over the border of an answer (a line end merged with an indent) is two here",
    "behind": "TRL trains the line end that a template writes behind the stop, both Phi 3.5's end of text there",
    "before": "TRL trains what a template writes between prompt and answer: an empty thought, the header of a channel",
    "text": "Axolotl writes no calls of gpt-oss, Mistral, Gemma 4 and GLM",
}
LAYOUTS = ("messages", "sharegpt", "alpaca", "prompt_completion", "grounded", "longalign")
# Phi 3.5: TRL's marks an end of text behind the last answer as an answer of its own, which is refused here.
MARKED = [f for f in FAMILIES if (trl_folder() / f"chat_templates/{f}_training.jinja").is_file() and f != "phi3_5"]


def said(rng):
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
        if text.strip():
            return text


def chat(rng, pairs):
    return [{"role": role, "content": said(rng)} for _ in range(pairs) for role in ("user", "assistant")]


def called(rng):
    """A chat with a call and its result."""
    call = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    ask, answer = chat(rng, 1)
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": said(rng)}
    return [ask, {"role": "assistant", "content": "", "tool_calls": [call]}, result, answer]


def laid_out(layout, rng, k):
    """(a row of this layout, the chat it says)."""
    messages = chat(rng, 1 + k % 3)
    ask, answer = messages[0]["content"], messages[1]["content"]
    if layout == "messages":
        return {"messages": messages}, messages
    if layout == "longalign":
        return {"messages": messages, "length": 3}, messages
    if layout == "sharegpt":
        turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages]
        theirs = maybe_convert_to_chatml({"conversations": [dict(t) for t in turns]})["messages"]
        assert [m["content"] for m in theirs] == [m["content"] for m in messages]
        return {"conversations": turns}, messages
    if layout == "alpaca":
        more = said(rng)
        return {"instruction": ask, "input": more, "output": answer}, [
            {"role": "user", "content": f"{ask}\n\n{more}"}, messages[1]
        ]  # fmt: skip
    if layout == "prompt_completion":
        return {"prompt": ask, "completion": answer}, messages[:2]
    return {"document": (about := said(rng)), "question": ask, "answer": answer}, [
        {"role": "user", "content": f"{about.rstrip()}\n\n{ask}"}, messages[1]
    ]  # fmt: skip


def encoder_of(tokenizer, template):
    backend = without_trimmed_offsets(tokenizer.backend_tokenizer)
    return Encoder(backend, template, tokenizer.eos_token_id, 9999, "drop")


def ours(encoder, record, layout):
    (row,) = encoder.encode([to_row(record, layout, source="f", origin="f:1")])
    assert hasattr(row, "input_ids"), str(row)
    mask = [0] * len(row.input_ids)
    for start, end in zip(row.span_start.tolist(), row.span_end.tolist(), strict=True):
        mask[start:end] = [1] * (end - start)
    return row.input_ids.tolist(), mask


def by_marks(tokenizer, messages, template):
    """TRL, assistant_only_loss: what the marks of its own template enclose."""
    out = _tokenize(tokenizer, messages, chat_template=template.source, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


def by_completion(tokenizer, messages, template, tools=None):
    """TRL, completion_only_loss: all behind the prompt."""
    ids = _tokenize(tokenizer, messages, chat_template=template.source, tools=tools)["input_ids"]
    prompt = _tokenize(
        tokenizer, messages[:-1], chat_template=template.source, add_generation_prompt=True, tools=tools
    )["input_ids"]
    begin = common_prefix_length(prompt, ids)
    return ids, [0] * begin + [1] * (len(ids) - begin)


def axolotl(tokenizer, messages, template, tools=None):
    peer = axolotl_chat_templates()
    strategy = peer.ChatTemplateStrategy(
        peer.ChatTemplatePrompter(tokenizer, template.source), tokenizer, False, 9999,
        roles_to_train=["assistant"], train_on_eos="turn", eot_tokens=list(template.turn_ends),
    )  # fmt: skip
    out = strategy._tokenize_single_prompt({"messages": messages, "tools": tools} if tools else {"messages": messages})
    return out["input_ids"], [int(label != -100) for label in out["labels"]]


def difference(tokenizer, own, theirs):
    """The keys of `DIFFERENCES` that two rows show; none where they are equal."""
    (ids, mask), (their_ids, their_mask) = own, theirs
    if tokenizer.decode(ids) != tokenizer.decode(their_ids):
        return {"text"}
    if ids != their_ids:
        return {"border"}
    kinds, at = set(), 0
    while at < len(ids):
        if mask[at] == their_mask[at]:
            at += 1
            continue
        assert their_mask[at], "something is trained here that they leave out"
        end = at
        while end < len(ids) and their_mask[end] and not mask[end]:
            end += 1
        done = max((i + 1 for i in range(at) if mask[i]), default=0)
        behind = not tokenizer.decode(ids[done:end]).replace(tokenizer.eos_token, "").strip()
        kinds.add("behind" if behind else "before" if end < len(ids) and mask[end] else "?")
        at = end
    return kinds


def compared(family, records, way, tools=None, marked=False):
    """The differences that rows of (record, layout, messages) show."""
    tokenizer = tokenizer_of(family, FAMILIES[family][0])
    if marked:
        file = trl_folder() / f"chat_templates/{family}_training.jinja"
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    template = load_template(tokenizer, None)
    encoder = encoder_of(tokenizer, template)
    seen = set()
    for record, layout, messages in records:
        ids, mask = ours(encoder, record, layout)
        if way is by_completion:  # the last answer alone
            begin = max(i for i in range(len(mask)) if mask[i] and not mask[i - 1])
            mask = [0] * begin + mask[begin:]
        more = {"tools": json.loads(tools)} if tools else {}
        seen |= difference(tokenizer, (ids, mask), way(tokenizer, messages, template, **more))
    return seen


def plain():
    rng = random.Random(0)
    chats = [chat(rng, 1 + k % 3) for k in range(ROWS)]
    return [({"messages": messages}, "messages", messages) for messages in chats]


@pytest.mark.parametrize("family", MARKED)
def test_rows_beside_trls_marks(family):
    assert compared(family, plain(), by_marks, marked=True) <= {"before", "behind", "border"}


@pytest.mark.parametrize("family", FAMILIES)
def test_last_answers_beside_trls_completions(family):
    assert compared(family, plain(), by_completion) <= {"before", "behind", "border"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_beside_axolotl(family):
    assert compared(family, plain(), axolotl) <= ({"behind", "border"} if family == "phi3_5" else {"border"})


WITH_CALLS = [f for f in FAMILIES if isinstance(FAMILIES[f][1].get("call"), list)]


@pytest.mark.parametrize("way", [by_completion, axolotl])
@pytest.mark.parametrize("family", WITH_CALLS)
def test_calls_beside_both(family, way):
    rng = random.Random(1)
    records = [({"messages": m, "tools": TOOLS}, "messages", m) for m in (called(rng) for _ in range(ROWS))]
    if way is axolotl and family.startswith(("gptoss", "mistral")):  # it leaves out the call, and they refuse the rest
        with pytest.raises(TemplateError):
            compared(family, records, way, TOOLS)
        return
    expected = {"before", "behind", "border"} if way is by_completion else {"border"}
    if way is axolotl and family in ("gemma4_v5", "glm4moe"):
        expected = {"text"}
    assert compared(family, records, way, TOOLS) <= expected


@pytest.mark.parametrize("way", [by_completion, axolotl])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_every_layout(layout, way):
    rng = random.Random(2)
    records = [(record, layout, messages) for record, messages in (laid_out(layout, rng, k) for k in range(ROWS))]
    assert compared("qwen2_5", records, way) <= ({"behind", "border"} if way is by_completion else {"border"})


def test_plain_text_beside_trl():
    tokenizer = tokenizer_of("qwen2_5", [])
    encoder = encoder_of(tokenizer, None)
    rng = random.Random(3)
    for _ in range(ROWS):
        text = said(rng)
        ids, mask = ours(encoder, {"text": text}, "text")
        assert ids == _tokenize(tokenizer, text + tokenizer.eos_token)["input_ids"]  # as its add_eos does
        assert mask == [1] * len(ids)


def test_each_difference_is_explained():
    documented = " ".join(Path("docs/data.md").read_text(encoding="utf-8").split())
    assert [line for line in DIFFERENCES.values() if line not in documented] == []
