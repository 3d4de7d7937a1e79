"""The segments of the reference: what they are, what is trained, what is refused. Text written here by hand."""

import pytest

from unsloth_ext.tools import PROFILES, MessageError, render, segments

SEARCH = {"name": "brave_search", "arguments": {"query": 'a "b"\nc\\'}}
USER = {"role": "user", "content": "u"}


def answer(*calls, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def last_turn(message, profile, **options):
    text = render([USER, message], profile=profile, **options)
    return text.rpartition("<|start_header_id|>assistant<|end_header_id|>\n\n")[2]


@pytest.mark.parametrize("profile, call, expected", [
    ("hf", SEARCH, r'so<|python_tag|>brave_search.call(query="a \"b\"\nc\\")<|eom_id|>'),
    ("meta-3.1", SEARCH, r'so<|python_tag|>brave_search.call(query="a \"b\"\nc\\")<|eom_id|>'),
    ("pythonic-3.2", SEARCH, r'so<|python_tag|>brave_search.call(query="a \"b\"\nc\\")<|eom_id|>'),
    ("hf", {"name": "code_interpreter", "arguments": {"code": 'print("é")\n'}}, 'so<|python_tag|>print("é")\n<|eom_id|>'),
    ("hf", {"name": "f", "arguments": {}}, 'so{"name": "f", "parameters": {}}<|eom_id|>'),
    ("meta-3.1", {"name": "f"}, 'so<|python_tag|>{"type": "function", "name": "f", "parameters": {}}<|eom_id|>'),
    ("pythonic-3.2", {"name": "f"}, "so[f()]<|eot_id|>"),
    ("chatformat", {"name": "f", "arguments": {"a": "é"}}, 'so{"type": "function", "name": "f", "parameters": {"a": "\\u00e9"}}<|eot_id|>'),
])  # fmt: skip
def test_calls(profile, call, expected):
    builtin = ["brave_search", "code_interpreter"]
    assert last_turn(answer(call, content="so"), profile, builtin_tools=builtin) == expected


def test_pythonic_values_are_python():
    import ast

    arguments = {
        "s": 'é "q" \\ \n\x00\x7f\u2028😀',
        "i": -3,
        "f": 1e-9,
        "t": True,
        "l": [1, [], {"k y": False, "e": {}}],
    }
    text = last_turn(answer({"name": "a.f", "arguments": arguments}, {"name": "g"}), "pythonic-3.2")
    first, second = ast.parse(text.removesuffix("<|eot_id|>"), mode="eval").body.elts
    assert {keyword.arg: ast.literal_eval(keyword.value) for keyword in first.keywords} == arguments
    assert ast.unparse(first.func) == "a.f" and ast.unparse(second) == "g()"


@pytest.mark.parametrize("profile, message, options, field", [
    ("hf", answer({"name": "f"}, {"name": "g"}), {}, "tool_calls"),
    ("meta-3.1", answer({"name": "f"}, {"name": "g"}), {}, "tool_calls"),
    ("chatformat", answer({"name": "f"}, {"name": "g"}), {}, "tool_calls"),
    ("pythonic-3.2", answer({"name": "f"}, SEARCH), {"builtin_tools": ["brave_search"]}, "tool_calls"),
    ("pythonic-3.2", answer({"name": "f-g"}), {}, "a name in the call"),
    ("pythonic-3.2", answer({"name": "f", "arguments": {"a b": 1}}), {}, "a name in the call"),
    ("pythonic-3.2", answer({"name": "f(x)]; g"}), {}, "a name in the call"),
    ("hf", answer({"name": "code_interpreter", "arguments": {"code": 1}}), {"builtin_tools": ["code_interpreter"]}, "arguments of"),
    ("hf", answer({"name": "code_interpreter"}), {"builtin_tools": ["code_interpreter"]}, "arguments of"),
    ("hf", answer({"name": "wolfram_alpha", "arguments": {'q="x")': "1"}}), {"builtin_tools": ["wolfram_alpha"]}, "an argument's name"),
])  # fmt: skip
def test_refusals(profile, message, options, field):
    with pytest.raises(MessageError, match=f"^message 1: {field}") as raised:
        render([USER, message], profile=profile, **options)
    assert raised.value.index == 1


def test_only_what_the_assistant_says_is_trained():
    conversation = [
        {"role": "system", "content": "s"},
        USER,
        answer({"name": "f"}, content="so"),
        {"role": "tool", "content": "r"},
    ]
    conversation += [{"role": "assistant", "content": "done"}]
    for profile in PROFILES:
        parts = segments(conversation, profile=profile, tools=[{"name": "f"}], add_generation_prompt=True)
        trained = "".join(part.text for part in parts if part.trained)
        assert trained.startswith("so") and trained.endswith("done<|eot_id|>") and trained.count("_id|>") == 2
        assert {part.kind for part in parts} == {"control", "content"}
        assert all((part.kind == "control") == part.text.startswith("<|") for part in parts)
        assert "".join(part.text for part in parts) == render(
            conversation, profile=profile, tools=[{"name": "f"}], add_generation_prompt=True
        )


def test_the_tools_stand_where_they_are_asked_to():
    tools = [{"type": "function", "function": {"name": "look", "description": "d"}}]
    for profile in ("hf", "meta-3.1", "pythonic-3.2"):
        system, user = (
            render([USER], profile=profile, tools=tools, tools_in_user_message=in_user).split("<|start_header_id|>user")
            for in_user in (False, True)
        )
        assert '"look"' in system[0] and '"look"' in user[1] and '"look"' not in user[0] + system[1]
        default = render([USER], profile=profile, tools=tools)
        assert default == "<|start_header_id|>user".join(system if profile == "pythonic-3.2" else user)
    said = render([USER], profile="meta-3.1", tools=tools, preamble="Before {tools} after.")
    assert 'Before {\n    "type": "function"' in said and "} after.<|eot_id|>" in said


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="profile must be one of hf, meta-3.1, chatformat, pythonic-3.2, got 'llama'"):
        render([USER], profile="llama")
    with pytest.raises(ValueError, match="builtin_tools must be a list of names, got 'brave_search'"):
        render([USER], builtin_tools="brave_search")
    with pytest.raises(ValueError, match="preamble: hf has the words of its base template"):
        render([USER], preamble="x")
    with pytest.raises(ValueError, match="not a Llama 3.1 template"):
        render([USER], base_template="{{ messages }}")
    message = "message 0: the first message's role is 'assistant'.*start with one, or pass tools_in_user_message=False"
    with pytest.raises(MessageError, match=message):
        render([{"role": "assistant", "content": "a"}, USER], tools=[{"name": "f"}])


def test_chatformat_refuses_a_builtin_call_without_its_argument():
    call = {"type": "function", "function": {"name": "brave_search", "arguments": {}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(MessageError, match="writes one text, query"):
        segments(turns, profile="chatformat", builtin_tools=["brave_search"])
