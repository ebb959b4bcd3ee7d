import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_longft.data.formats import FORMATS, detect_format, to_row
from ds_longft.data.rows import BadRow
from ds_longft.errors import DataError


def turns(record, format=None):
    row = to_row(record, format or detect_format(record, "x"), source="x", origin="x:1")
    return [(t.role, t.content, t.weight) for t in row.turns]


QA = [("user", "q", 1.0), ("assistant", "a", 1.0)]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "length": 9}, QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": None}]}, QA),
        ({"instruction": "q", "input": "", "output": "a", "file": "f"}, QA),
        ({"instruction": "q", "input": "more", "output": "a"}, [("user", "q\n\nmore", 1.0), QA[1]]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["h", "i"]]},
            [("system", "s", 1.0), ("user", "h", 1.0), ("assistant", "i", 1.0), *QA],
        ),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"input": "q", "output": "a"}, QA),
        (
            {
                "prompt": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "r"},
                ],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            [("user", "q", 0.0), ("assistant", "b", 0.0), ("user", "r", 0.0), QA[1]],
        ),
        ({"text": "plain"}, [("text", "plain", 1.0)]),
        (
            {"system": "s", "messages": [{"role": r, "content": c} for r, c, _ in QA], "tools": None},
            [("system", "s", 1.0), *QA],
        ),
        (
            {
                "reference": "ref",
                "messages": [
                    {"role": r, "content": c} for r, c in (("system", "s"), ("user", "q"), ("assistant", "a"))
                ],
            },
            [("system", "s", 1.0), ("user", "ref\n\nq", 1.0), QA[1]],
        ),
        *(
            ({"reference": "ref", "dialogue": dialogue}, [("user", "ref\n\nq", 1.0), QA[1]])
            for dialogue in (
                "<start_chat><Human 1>: q<Assistant 1>: a<end_chat>",
                [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            )
        ),
        (
            {"length": 9, "messages": [message("user", "q"), message("assistant", "\u200bمی\u200cخواهم\ufeff")]},
            [QA[0], ("assistant", "می\u200cخواهم", 1.0)],
        ),
        ({"messages": [*({"role": r, "content": c} for r, c, _ in QA), {"role": "user", "content": "odd last"}]}, QA),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            QA,
        ),
    ],
)
def test_each_layout_becomes_turns(record, expected):
    assert turns(record) == expected


def test_turn_weights_language_and_row_weight_are_kept():
    record = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q", "weight": 0},
            {"from": "gpt", "value": "a", "weight": 0},
            {"from": "human", "value": "r"},
            {"from": "gpt", "value": "b", "weight": 0.5},
        ],
        "language": "zh",
        "weight": 2,
    }
    row = to_row(record, "sharegpt", source="x", origin="x:1")
    assert [turn.trained for turn in row.turns] == [False, False, False, False, True]
    assert row.turns[-1].weight == 0.5
    assert (row.language, row.weight) == ("zh", 2.0)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": None}, "messages is not a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": [message("user", "q")]}, "no answer"),
        ({"messages": [message("system", "s"), message("user", "q")]}, "no answer"),
        ({"messages": [message("user", "q"), message("assistant", " \n")]}, "empty answer"),
        ({"messages": [message("user", ""), message("assistant", "a")]}, "empty question"),
        ({"messages": [message("user", "q"), message("assistant", None)]}, "content is null or missing"),
        ({"messages": [message("user", 3), message("assistant", "a")]}, "content is not a string"),
        ({"messages": [message("user", "\ud800"), message("assistant", "a")]}, "content is not valid Unicode"),
        ({"messages": [message("assistant", "a"), message("user", "q")]}, "no answer"),
        (
            {"messages": [message("assistant", "a"), message("user", "q"), message("assistant", "b")]},
            "wrong role order",
        ),
        ({"messages": [message("user", "q"), message("user", "q"), message("assistant", "b")]}, "wrong role order"),
        ({"messages": [message("user", "q"), message("narrator", "a")]}, "unknown role"),
        (
            {"messages": [message("user", "q"), message("tool", "7"), message("assistant", "a")]},
            "wrong role order",
        ),
        ({"messages": [message("user", "q"), message("assistant", "a")], "tools": "[{"}, "tools are no JSON"),
        ({"messages": [message("user", "q"), message("assistant", "a")], "tools": [3]}, "a tool is not an object"),
        (
            {"messages": [message("user", "q"), message("assistant", "a", training="no")]},
            "training of a message is neither true nor false",
        ),
        *(
            (
                {"messages": [message("user", "q"), message("assistant", "a", weight=weight)]},
                "weight of a message is not 0 or a number from 1e-06 to 1e+06",
            )
            for weight in (1e39, 1e-50, 10**400, float("nan"))
        ),
        (
            {"messages": [message("user", "q"), message("assistant", "a", weight=-1)]},
            "weight of a message is not 0 or a number from 1e-06 to 1e+06",
        ),
        (
            {"messages": [message("user", "q"), message("assistant", "a", tool_calls=[1])]},
            "a tool call is not an object",
        ),
        (
            {
                "messages": [
                    message("user", "q"),
                    message("assistant", "", tool_calls=[{"name": "f", "arguments": "x"}]),
                ]
            },
            "arguments of a tool call are no JSON",
        ),
        (
            {"messages": [message("user", [{"type": "image"}]), message("assistant", "a")]},
            "content holds other parts than text",
        ),
        ({"instruction": "q", "output": None}, "output is null or missing"),
        ({"instruction": "q", "output": "a", "history": ["h"]}, "history is not a list of [question, answer]"),
        ({"text": ""}, "empty text"),
    ],
)
def test_bad_rows_say_why(record, reason):
    with pytest.raises(BadRow) as bad:
        turns(record)
    assert bad.value.reason == reason


def test_unknown_columns_are_named_with_what_was_expected():
    with pytest.raises(DataError, match=r"columns body, title.*messages: messages"):
        detect_format({"title": 1, "body": 2}, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "type", "text"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
KEYS = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "prompt",
    "completion",
    "text",
    "weight",
]


@given(record=st.dictionaries(st.sampled_from(KEYS), JSON), format=st.sampled_from(sorted(FORMATS)))
def test_no_record_whatever_crashes(record, format):
    try:
        row = to_row(record, format, source="x", origin="x:1")
    except BadRow:
        return
    assert row.is_text or row.turns[-1].role == "assistant"


ROWS = {
    "messages": {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "plain"},
    "longalign": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "length": 9},
    "grounded": {"document": "d", "question": "q", "answer": "a"},
}


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_with_images_is_refused_by_name(format):
    for column, content in (("images", ["1.png"]), ("image", {"bytes": b"x"}), ("videos", ["v"]), ("audio", "a.wav")):
        with pytest.raises(BadRow, match=f"{column} beside the text"):
            turns(ROWS[format] | {column: content}, format)
    for empty in (None, [], [None], "", {"bytes": None, "path": None}):
        assert turns(ROWS[format] | {"images": empty}, format)
