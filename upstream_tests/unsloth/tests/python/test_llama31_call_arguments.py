"""A call's arguments come as a dict, as a JSON string (OpenAI's API), or not at all; some datasets have
calls without the `function` level. All of them have to render as one JSON object."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from unsloth.chat_templates import CHAT_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")
ARGUMENTS = {"city": "Zürich", "days": 3}


@pytest.fixture(params = NAMES)
def render(request):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token = "[UNK]")),
        bos_token = "<|begin_of_text|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATES[request.param][0].replace("{system_message}", "")
    return lambda messages, **kwargs: tokenizer.apply_chat_template(
        messages, tokenize = False, **kwargs
    )


def call(function, **around):
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{**function, **around}]},
    ]


def last_turn(text):
    return text.rpartition("<|end_header_id|>\n\n")[2]


def test_a_dict_renders_as_before(render):
    text = last_turn(render(call({"function": {"name": "weather", "arguments": ARGUMENTS}})))
    assert text == '{"name": "weather", "parameters": {"city": "Zürich", "days": 3}}<|eot_id|>'


def test_a_json_string_renders_as_the_object(render):
    as_dict = render(call({"function": {"name": "weather", "arguments": ARGUMENTS}}))
    as_text = json.dumps(ARGUMENTS, ensure_ascii = False)
    assert render(call({"function": {"name": "weather", "arguments": as_text}})) == as_dict


@pytest.mark.parametrize("missing", [{}, {"arguments": None}], ids = ["missing", "None"])
def test_no_arguments_are_an_empty_object(render, missing):
    text = last_turn(render(call({"function": {"name": "now", **missing}})))
    assert text == '{"name": "now", "parameters": {}}<|eot_id|>'


def test_a_call_without_the_function_level(render):
    function = {"name": "weather", "arguments": ARGUMENTS}
    assert render(call(function)) == render(call({"function": function}))


def test_a_quote_in_a_name_is_escaped(render):
    text = last_turn(render(call({"function": {"name": 'a"b', "arguments": {}}})))
    assert json.loads(text.removesuffix("<|eot_id|>")) == {"name": 'a"b', "parameters": {}}


def test_none_is_no_argument(render):
    """Rows of an Arrow table (datasets) have every key of every other row's call."""
    merged = {"unit": None, **ARGUMENTS, "where": {"lat": 1.5, "lon": None}, "tags": ["a", None]}
    function = {"name": "weather", "arguments": merged}
    text = last_turn(render(call({"function": function})))
    assert text == (
        '{"name": "weather", "parameters": {"city": "Zürich", "days": 3, "where": {"lat": 1.5}, '
        '"tags": ["a", null]}}<|eot_id|>'
    )


def test_a_null_in_a_json_string_is_meant(render):
    text = last_turn(render(call({"function": {"name": "f", "arguments": '{"a": null}'}})))
    assert text == '{"name": "f", "parameters": {"a": null}}<|eot_id|>'


@pytest.mark.parametrize("arguments", ["not json", "[1]", '"x"', " ", [1], 3])
def test_what_is_no_object_is_an_error(render, arguments):
    with pytest.raises(Exception, match = "must be an object, or the JSON of one"):
        render(call({"function": {"name": "f", "arguments": arguments}}))
