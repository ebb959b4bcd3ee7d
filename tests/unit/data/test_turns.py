"""Messages of every trainer and chat service become the same turns; what a flag says is done."""

import json

import pytest

from ds_longft.data.formats import detect_format, to_row
from ds_longft.data.rows import BadRow, Call, Turn


def row_of(record):
    return to_row(record, detect_format(record, "x"), source="x", origin="x:1")


def said(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, CALL = said("user", "Weather in Ulm?"), Call("w", '{"c": "Ulm"}')
RESULT, ANSWER = said("tool", "7"), said("assistant", "7 degrees.")
TURNS = [
    Turn("user", "Weather in Ulm?"),
    Turn("assistant", "", calls=(CALL,)),
    Turn("tool", "7"),
    Turn("assistant", "7 degrees."),
]
OBJECT = {"name": "w", "arguments": {"c": "Ulm"}}
TEXT = {"name": "w", "arguments": '{"c": "Ulm"}'}


@pytest.mark.parametrize(
    ("column", "messages"),
    [
        (
            "messages",
            [ASK, said("assistant", None, tool_calls=[{"type": "function", "function": OBJECT}]), RESULT, ANSWER],
        ),
        ("messages", [ASK, said("assistant", "", tool_calls=[{"type": "function", "function": TEXT}]), RESULT, ANSWER]),
        ("messages", [ASK, said("assistant", "", tool_calls=json.dumps([OBJECT])), RESULT, ANSWER]),
        ("messages", [ASK, said("assistant", None, function_call=TEXT), said("function", "7"), ANSWER]),
        ("messages", [ASK, said("tool_call", json.dumps(OBJECT)), said("tool_response", "7"), ANSWER]),
        (
            "conversations",
            [
                {"from": "human", "value": "Weather in Ulm?"},
                {"from": "function_call", "value": json.dumps(OBJECT)},
                {"from": "observation", "value": "7"},
                {"from": "gpt", "value": "7 degrees."},
            ],
        ),
        (
            "messages",
            [
                said("user", [{"type": "text", "text": "Weather in Ulm?"}]),
                said("assistant", [{"type": "tool_use", "name": "w", "input": {"c": "Ulm"}}]),
                said("user", [{"type": "tool_result", "content": [{"type": "text", "text": "7"}]}]),
                said("assistant", [{"type": "text", "text": "7 degrees."}]),
            ],
        ),
    ],
    ids=["openai", "arguments_as_text", "calls_as_text", "legacy", "swift", "sharegpt", "anthropic"],
)
def test_calls_of_tools_in_every_spelling(column, messages):
    tools = [{"name": "w", "parameters": {}}]
    for given in (tools, json.dumps(tools), [json.dumps(tools[0])], [{"type": "function", "function": tools[0]}]):
        row = row_of({column: messages, "tools": given})
        assert list(row.turns) == TURNS
        assert json.loads(row.tools) == [{"type": "function", "function": tools[0]}]
        assert row.unused == ()


def test_a_call_behind_words_is_one_answer_and_names_and_ids_are_kept():
    row = row_of(
        {
            "messages": [
                ASK,
                said("assistant", "I look.", tool_calls=[{"id": "call00001", "function": OBJECT}]),
                said("tool", {"degrees": 7}, name="w", tool_call_id="call00001"),
                ANSWER,
            ]
        }
    )
    assert row.turns[1] == Turn("assistant", "I look.", calls=(Call("w", '{"c": "Ulm"}', "call00001"),))
    assert row.turns[2] == Turn("tool", '{"degrees": 7}', name="w", call_id="call00001")
    talk = [
        ("human", "Q"),
        ("gpt", "I look."),
        ("function_call", json.dumps(OBJECT)),
        ("observation", "7"),
        ("gpt", "A"),
    ]
    row = row_of({"conversations": [{"from": who, "value": what} for who, what in talk]})
    assert [turn.role for turn in row.turns] == ["user", "assistant", "tool", "assistant"]
    assert row.turns[1] == Turn("assistant", "I look.", calls=(CALL,))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_beside_the_content(key):
    row = row_of({"messages": [ASK, said("assistant", "7.", **{key: "hm"})]})
    assert row.turns[1] == Turn("assistant", "7.", thinking="hm")
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "7."}]
    assert row_of({"messages": [ASK, said("assistant", parts)]}).turns == row.turns


@pytest.mark.parametrize(
    ("no", "yes"),
    [
        *(({flag: False}, {flag: True}) for flag in ("train", "training", "trainable", "loss")),
        ({"loss_mask": 0}, {"loss_mask": 1}),
        ({"masked": True}, {"masked": False}),
        ({"weight": 0}, {"weight": 1}),
        ({"loss_scale": 0.0}, {"loss_scale": 1.0}),
        ({"train": False}, {"train": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("keys", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_flags_of_turns_mean_what_they_say(no, yes, keys):
    column, role, content = keys
    messages = [
        {role: "user", content: "q"},
        {role: "assistant", content: "wrong draft", **no},
        {role: "user", content: "r"},
        {role: "assistant", content: "right", **yes},
    ]
    assert [turn.trained for turn in row_of({column: messages}).turns] == [False, False, False, True]
    with_both = [said("user", "q"), said("assistant", "a", train=True, weight=0.5)]
    assert row_of({"messages": with_both}).turns[1].weight == 0.5


def test_conversations_of_role_and_content():
    record = {"conversations": [said("user", "Hi"), said("assistant", "Hello.")]}
    assert [(turn.role, turn.content) for turn in row_of(record).turns] == [("user", "Hi"), ("assistant", "Hello.")]


def test_rows_of_several_kinds_in_one_file_once_every_row_has_every_column():
    """As they come out of parquet: columns of the other kinds are null."""
    empty = dict.fromkeys(["messages", "text", "prompt", "completion", "tools", "system"])
    chat = {**empty, "messages": [said("user", "Hi", weight=None), said("assistant", "Hello.", tool_calls=[])]}
    rows = [chat, {**empty, "text": "Words."}, {**empty, "prompt": "2+2?", "completion": "4"}]
    for first in rows:
        layout = detect_format(first, "x")
        made = [to_row(record, layout, source="x", origin="x:1") for record in rows]
        assert [[turn.content for turn in row.turns] for row in made] == [["Hi", "Hello."], ["Words."], ["2+2?", "4"]]


def test_what_stands_behind_the_last_answer_is_named():
    row = row_of({"messages": [said("user", "q"), said("assistant", "a"), said("user", "r")]})
    assert (len(row.turns), row.unused) == (2, ("messages behind the last answer",))


def test_unknown_parts_and_roles_are_refused():
    with pytest.raises(BadRow, match="image_url"):
        row_of({"messages": [said("user", [{"type": "image_url", "image_url": {}}]), ANSWER]})
