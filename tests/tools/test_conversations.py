"""The 44 conversations that were tried on Unsloth's Llama 3.1 template: what each must give, as text or as a named error.

33 of them rendered before. What is not in CHANGED must render as it did, to the byte, and the oracle for the rest is the installed
template too, on the conversation as it should have been written.
"""

import json
import re
from pathlib import Path

import pytest

from unsloth_ext.tools import MessageError, chat_template, render
from unsloth_ext.tools.messages import normalize

CONVERSATIONS = json.loads((Path(__file__).parent / "data" / "conversations.json").read_text(encoding="utf-8"))
BY_NUMBER = {conversation["name"][:2]: conversation for conversation in CONVERSATIONS}
CALL = '{"name": "get_weather", "parameters": {"city": "SF"}}'
HI = [{"role": "user", "content": "Weather in SF?"}, {"role": "assistant", "content": "Hi"}]
USER_HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def today(llama3_tokenizer, llama31_template):
    """today(number, messages=None, **template arguments): the render of the installed template."""

    def rendered(number, messages=None, without=(), **arguments):
        arguments = {**BY_NUMBER[number]["template_kwargs"], **arguments}
        for name in without:
            del arguments[name]
        messages = BY_NUMBER[number]["messages"] if messages is None else messages
        return llama3_tokenizer.apply_chat_template(
            messages, chat_template=llama31_template, tokenize=False, **arguments
        )

    return rendered


def after(text, old, new):
    """`text` with its last `old` replaced."""
    head, found, tail = text.rpartition(old)
    assert found, (old, text)
    return head + new + tail


# number -> a function from `today` to the text, or a part of the error's message
CHANGED = {
    "06": lambda today: today("06").replace("Tools: \n\n", ""),
    "08": lambda today: today("07"),
    "09": "message 1: tool_calls is .* holds one call",
    "10": lambda today: after(today("07"), CALL, "Let me check." + CALL),
    "11": lambda today: today("11", HI),
    "12": lambda today: today("12", HI),
    "13": lambda today: today("13", HI),
    "14": lambda today: after(today("14"), '"25 C"', "25 C"),
    "15": lambda today: today("16"),
    "18": lambda today: after(today("18"), '[{"type": "text", "text": "25 C"}]', "25 C"),
    "19": lambda today: after(today("19"), '"25 C"', "25 C"),
    "22": lambda today: today("22", _with_query("22", "3")),
    "23": lambda today: after(today("23"), '"say "hi""', r'"say \"hi\""'),
    "24": lambda today: after(today("24").replace("Tools: \n\n", ""), 'code_interpreter.call(code="print(1)")', "print(1)"),
    "27": lambda today: after(today("27", HI), "Hi", ""),
    "28": lambda today: today("28", USER_HI),
    "29": lambda today: today("29", USER_HI),
    "30": "message 0: the first message's role is 'assistant'; the tools stand in the first user message",
    "31": lambda today: today("31", tools=None),
    "32": lambda today: today("32", without=["builtin_tools"]),
    "33": "at least one message",
    "34": lambda today: today("07"),
    "37": lambda today: today("37").replace('"a"<|eot_id|>', "a<|eot_id|>").replace('"b"<|eot_id|>', "b<|eot_id|>"),
    "39": lambda today: today("39", _with_arguments("39", {})),
    "40": lambda today: today("40", without=["builtin_tools"]),
    "43": lambda today: after(today("43"), '"a"b"', r'"a\"b"'),
}  # fmt: skip


def _with_arguments(number, arguments):
    messages = json.loads(json.dumps(BY_NUMBER[number]["messages"]))
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    return messages


def _with_query(number, query):
    return _with_arguments(number, {"query": query})


def test_the_list_is_whole(today):
    assert len(CONVERSATIONS) == 44
    rendered = 0
    for number in BY_NUMBER:
        try:
            today(number)
            rendered += 1
        except Exception:
            assert number in CHANGED
    assert rendered == 33


def _expected(today, number):
    expected = CHANGED.get(number, lambda today: today(number))
    return expected if isinstance(expected, str) else expected(today)


@pytest.mark.parametrize("number", BY_NUMBER)
def test_the_default_profile(today, llama3_tokenizer, llama31_template, number):
    conversation = BY_NUMBER[number]
    messages, arguments = conversation["messages"], conversation["template_kwargs"]
    expected = _expected(today, number)
    if isinstance(CHANGED.get(number), str):
        with pytest.raises(MessageError, match=expected) as raised:
            render(messages, **arguments)
        found = re.match(r"message (\d+)", expected)
        assert raised.value.index == (int(found[1]) if found else None)
        template = chat_template("hf", llama31_template)
        with pytest.raises(Exception, match=r"single tool-calls|no first user message|empty conversation"):
            llama3_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
        return
    assert render(messages, **arguments) == expected
    for generation in (True, False):
        template = chat_template("hf", llama31_template, generation=generation)
        assert ("generation %}" in template) is generation
        # What a trainer does that knows nothing of normalize.
        assert (
            llama3_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
            == expected
        )


@pytest.mark.parametrize("profile, call, end", [
    ("meta-3.1", '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "SF"}}', "<|eom_id|>"),
    ("chatformat", '{"type": "function", "name": "get_weather", "parameters": {"city": "SF"}}', "<|eot_id|>"),
    ("pythonic-3.2", '[get_weather(city="SF")]', "<|eot_id|>"),
])  # fmt: skip
def test_the_other_profiles(llama3_tokenizer, llama31_template, profile, call, end):
    template = chat_template(profile, llama31_template)
    for number, conversation in BY_NUMBER.items():
        messages, arguments = conversation["messages"], conversation["template_kwargs"]
        try:
            text = render(messages, profile=profile, **arguments)
        except MessageError:
            assert number in {"09", "22", "23", "33", "43"}, number
            with pytest.raises(Exception):  # noqa: B017 - Jinja's TemplateError, or transformers' ValueError
                llama3_tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
            continue
        messages = normalize(messages, tools=arguments.get("tools"))
        assert text == llama3_tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **arguments
        )
        if number in {"07", "08", "10", "14", "26", "34", "40"}:
            assert call + end in text, number
        assert "26 July 2024" not in text
    parallel = BY_NUMBER["09"]
    if profile == "pythonic-3.2":
        text = render(parallel["messages"], profile=profile, **parallel["template_kwargs"])
        assert text.endswith('[get_weather(city="SF"), get_weather(city="LA")]<|eot_id|>')
