"""What datasets hold, and the one form it becomes."""

import copy
import datetime
import json
import pickle

import pytest

from unsloth_ext.tools import MessageError, normalize, tool_schemas, without_filling
from unsloth_ext.tools.messages import problems

USER = {"role": "user", "content": "u"}


def arguments_of(given, tools=None):
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    return normalize([USER, message], tools=tools)[1]["tool_calls"][0]["function"]["arguments"]


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize("call", [
    CALL,
    {"function": {"name": "f", "arguments": '{"x": 1}'}},
    {"type": None, "function": {"name": "f", "arguments": {"x": 1, "y": None}}},
    {"name": "f", "arguments": {"x": 1}},
    {"name": "f", "parameters": {"x": 1}},
    {"type": "function", "name": "f", "arguments": '{"x": 1}'},
    {"function": "f", "arguments": {"x": 1}},
    '{"name": "f", "arguments": {"x": 1}}',
])  # fmt: skip
def test_a_call_in_all_its_forms(call):
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [None, call]},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "assistant", "content": "", "tool_calls": None, "function_call": call},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
    ):
        assert normalize([USER, message])[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("nothing", [None, [], "", " ", [None]])
def test_no_calls(nothing):
    assert normalize([{"role": "assistant", "content": "a", "tool_calls": nothing}]) == [
        {"role": "assistant", "content": "a"}
    ]


@pytest.mark.parametrize("given, expected", [
    (None, {}), ("", {}), ({}, {}), ("{}", {}),
    ({"city": "SF", "n": None}, {"city": "SF"}),
    ({"a": {"b": None, "c": [{"d": None, "e": 1}, None]}}, {"a": {"c": [{"e": 1}, None]}}),  # Arrow fills structs, not lists
    ('{"n": null}', {"n": None}),  # text, which Arrow does not reach into
    ({"t": (1, 2)}, {"t": [1, 2]}),
])  # fmt: skip
def test_arguments(given, expected):
    assert arguments_of(given) == expected


@pytest.mark.parametrize("schema, kept", [
    ({"type": ["string", "null"]}, True), ({"type": "null"}, True), ({"type": "string", "nullable": True}, True),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, True), ({"enum": ["a", None]}, True),
    ({"type": "string"}, False), ({}, False), (None, False),
])  # fmt: skip
def test_the_schema_tells_a_null_from_filling(schema, kept):
    for tool in (
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": schema}}}},
        {"name": "f", "parameters": {"properties": {"n": schema}}},
    ):
        assert arguments_of({"n": None, "m": None}, [tool]) == ({"n": None} if kept else {})
    nested = {"name": "f", "parameters": {"properties": {"o": {"properties": {"n": schema}}}}}
    assert arguments_of({"o": {"n": None}}, [nested]) == {"o": {"n": None} if kept else {}}
    listed = {"name": "f", "parameters": {"properties": {"l": {"items": {"properties": {"n": schema}}}}}}
    assert arguments_of({"l": [{"n": None}]}, [listed]) == {"l": [{"n": None} if kept else {}]}


def test_a_row_that_went_through_arrow():
    datasets = pytest.importorskip("datasets")
    conversation = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {"y": "é"}}}]},
        {"role": "tool", "name": "f", "content": "r", "tool_call_id": "1"},
        {"role": "user", "content": "v"},
    ]
    row = datasets.Dataset.from_list([{"messages": conversation}])[0]["messages"]
    assert "tool_calls" in row[0] and "y" in row[1]["tool_calls"][0]["function"]["arguments"]
    assert normalize(row) == normalize(conversation)


@pytest.mark.parametrize("role, content, expected", [
    ("user", [{"type": "text", "text": "a", "image": None}, {"text": "b"}, "c"], "abc"),
    ("assistant", [], ""), ("user", "", ""), ("assistant", None, ""),
    ("tool", "25 C", "25 C"), ("tool", '{"t": 25}', '{"t": 25}'), ("tool", {"t": "é", "n": None}, '{"t": "é", "n": null}'),
    ("tool", [1, 2], "[1, 2]"), ("tool", 25, "25"), ("tool", True, "true"), ("tool", [], "[]"), ("ipython", None, ""),
    ("tool", [{"type": "text", "text": "25 C"}], "25 C"), ("tool", [{"type": "event", "text": "x"}], '[{"type": "event", "text": "x"}]'),
])  # fmt: skip
def test_content(role, content, expected):
    assert normalize([{"role": role, "content": content}]) == [
        {"role": "tool" if role == "ipython" else role, "content": expected}
    ]


def test_sharegpt_and_other_names():
    conversation = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a"},
        {"role": "function", "name": "f", "content": "r"},
        {"role": "developer", "content": "d"},
    ]
    normal = normalize(conversation)
    assert [message["role"] for message in normal] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "developer",
    ]
    assert normal[2]["tool_calls"] == [CALL] and normal[5]["name"] == "f"


def test_what_is_kept_and_that_it_is_the_normal_form():
    conversation = [
        {
            "role": "assistant",
            "content": "c",
            "tool_calls": [{**CALL, "id": "1"}],
            "stop_reason": "end_of_message",
            "x": 1,
        },
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
    ]
    before = copy.deepcopy(conversation)
    normal = normalize(conversation)
    assert conversation == before and normal[0] is not conversation[0]
    assert normal[0].pop("stop_reason") == "end_of_message" and normal[0]["tool_calls"][0].pop("id") == "1"
    assert normal == [
        {"role": "assistant", "content": "c", "tool_calls": [CALL]},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
    ]
    assert normalize(normal) == normal


def test_text_is_left_out_only_where_the_caller_says_so():
    message = {
        "role": "assistant",
        "content": "x",
        "thinking": "hm",
        "source": "web",
        "weight": 1,
        "refusal": " ",
        "audio": None,
    }
    assert [str(problem)[:20] for problem in problems([message])] == ["message 0: thinking "]
    assert normalize([message], ignore=["thinking", "source"]) == [{"role": "assistant", "content": "x"}]
    assert problems([message], ignore=("thinking", "source")) == []
    assert len(problems([message], ignore=("thinking",))) == 1
    with pytest.raises(ValueError, match="ignore must be a list"):
        normalize([message], ignore="thinking")


CONVERSATION = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL, {"function": {"name": "g", "arguments": {"l": [1.5, 2.0]}}}],
    },
    {"role": "tool", "content": [{"type": "text", "text": "r"}]},
]


def test_a_row_of_pandas(tmp_path):
    """What pandas reads from a Parquet file holds NumPy's arrays wherever a list was."""
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    parquet = tmp_path / "rows.parquet"
    tools = [{"type": "function", "function": {"name": "g", "parameters": {"required": ["l"]}}}]
    pandas.DataFrame({"messages": [CONVERSATION], "tools": [tools]}).to_parquet(parquet)
    row = pandas.read_parquet(parquet).iloc[0]
    assert isinstance(row["messages"], numpy.ndarray) and isinstance(row["messages"][1]["tool_calls"], numpy.ndarray)
    normal = normalize(row["messages"], tools=row["tools"])
    assert normal == normalize(CONVERSATION) and json.loads(json.dumps(normal)) == normal
    assert type(normal[1]["tool_calls"][1]["function"]["arguments"]["l"]) is list
    assert without_filling(row["tools"]) == tool_schemas(row["tools"]) == tools
    json.dumps(tool_schemas(row["tools"]))


def test_numbers_of_numpy():
    numpy = pytest.importorskip("numpy")
    given = {"i": numpy.int64(3), "f": numpy.float32(0.5), "b": numpy.bool_(True), "a": numpy.arange(4).reshape(2, 2)}
    kept = arguments_of({**given, "s": numpy.str_("t")})
    assert kept == {"i": 3, "f": 0.5, "b": True, "a": [[0, 1], [2, 3]], "s": "t"}
    assert [type(value) for value in kept.values()] == [int, float, bool, list, str]
    with pytest.raises(MessageError, match="no such number"):
        arguments_of({"f": numpy.float64("nan")})
    with pytest.raises(MessageError, match="refusal"):
        normalize([{"role": "user", "content": "x", "refusal": numpy.array(["no"])}])


def deep(levels):
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize("message, field, remedy", [
    ("hello", "its type", "must be a dict"),
    ({"content": "x"}, "role", "one of system, developer, user, assistant, tool"),
    ({"role": "asistant", "content": "x"}, "role", "one of"),
    ({"role": ["user"], "content": "x"}, "role", "one of"),
    ({"role": "user"}, "content", "missing"),
    ({"role": "user", "content": None}, "content", "the user's text, which may be empty"),
    ({"role": "system", "content": None}, "content", "the system's text"),
    ({"from": "human", "value": None}, "content", "the user's text"),
    ({"role": "assistant", "content": "x", "reasoning_content": "because"}, "reasoning_content", "put it into content"),
    ({"role": "assistant", "content": None, "refusal": "no"}, "refusal", r"ignore=\['refusal'\]"),
    ({"role": "assistant", "content": "x", "thinking": "a", "lang": "en"}, "thinking", r"ignore=\['thinking', 'lang'\]"),
    ({"role": "assistant", "content": "x", "details": [{"n": 1, "text": ["deep"]}]}, "details", "no format has a place"),
    ({"from": "gpt", "value": "x", "content": "y"}, "content", "no format has a place"),
    ({"role": "assistant", "content": "x", "value": "y"}, "value", "no format has a place"),
    ({"from": ["gpt"], "value": "x"}, "role", "one of"),
    ({"role": "user", "content": 3}, "content", "must be a text"),
    ({"role": "user", "content": {"type": "text", "text": "x"}}, "content", "must be a text"),
    ({"role": "user", "content": [{"type": "image"}]}, r"content\[0\]", "vision"),
    ({"role": "tool", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}, r"content\[1\]", "vision"),
    ({"role": "user", "content": "\ud83d"}, "content", "surrogate"),
    ({"role": "tool", "content": b"x"}, "content", "bytes is not JSON"),
    ({"role": "tool", "content": {1: 2}}, "content", "keys .* must be strings"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls", "only the assistant"),
    ({"role": "assistant", "tool_calls": 3}, "tool_calls", "list of calls"),
    ({"role": "assistant", "tool_calls": "[{"}, "tool_calls", "not valid JSON"),
    ({"role": "assistant", "tool_calls": [CALL], "function_call": CALL}, "function_call", "keep one"),
    ({"role": "assistant", "tool_calls": [3]}, r"tool_calls\[0\]", "must be a dict"),
    ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, r"tool_calls\[0\].type", "type function"),
    ({"role": "assistant", "tool_calls": [CALL, {"function": {}}]}, r"tool_calls\[1\].name", "give the function's name"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}, "parameters": {}}]}, r"tool_calls\[0\].parameters", "keep one"),
    ({"role": "assistant", "tool_calls": [{"function": [1]}]}, r"tool_calls\[0\].function", "name and arguments"),
])  # fmt: skip
def test_refusals(message, field, remedy):
    with pytest.raises(MessageError, match=f"^message 1: {field} is .*{remedy}") as raised:
        normalize([USER, message])
    assert raised.value.index == 1 and isinstance(raised.value, ValueError)
    again = pickle.loads(pickle.dumps(raised.value))
    assert str(again) == str(raised.value) and again.index == 1
    assert [str(problem) for problem in problems([message, USER, message])] == [
        str(raised.value).replace("message 1", f"message {index}", 1) for index in (0, 2)
    ]


@pytest.mark.parametrize("given, remedy", [
    ("[1]", "an object"), ([1], "a dict"), (3, "a dict"), ("{", "not valid JSON"), ('"{}"', "an object"),
    ('{"a": NaN}', "NaN is not JSON"), ({"a": float("inf")}, "no such number"), ({1: 2}, "must be strings"),
    ({"a": datetime.date(2026, 1, 1)}, "a date is not JSON"), ({"a": {1, 2}}, "a set is not JSON"),
    ('{"a": "\\ud83d"}', "surrogate"), (deep(100), "nested deeper"), ("[" * 100_000, "not valid JSON"),
    ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
])  # fmt: skip
def test_refused_arguments(given, remedy):
    with pytest.raises(MessageError, match=rf"^message 1: tool_calls\[0\].arguments.* is .*{remedy}") as raised:
        arguments_of(given)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("conversation", ["text", {"role": "user"}, None, 3, []])
def test_refused_conversations(conversation):
    with pytest.raises(MessageError, match="the conversation: ") as raised:
        normalize(conversation)
    assert raised.value.index is None


def test_tools():
    def look(place: str) -> str:
        """
        Look at a place.

        Args:
            place: where
        """
        return place

    assert tool_schemas(None) is None and tool_schemas([]) is None
    assert tool_schemas([look])[0]["function"]["name"] == "look"
    assert normalize([USER], tools=[{"name": ["f"]}]) == [USER]
    for wrong in ("f", {"name": "f"}, [3], 5):
        with pytest.raises(MessageError, match="tools is"):
            tool_schemas(wrong)
    filled = [
        {"function": {"name": "f", "strict": None, "parameters": {"properties": {"a": {"type": "string"}, "b": None}}}}
    ]
    assert without_filling(filled) == [
        {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
    ]
