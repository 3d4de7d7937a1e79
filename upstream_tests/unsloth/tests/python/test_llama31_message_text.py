"""The text of a message must reach the model: beside a call, from a tool, in typed parts; None is none."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from unsloth.chat_templates import CHAT_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")
CALL = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
JSON_CALL = '{"name": "weather", "parameters": {"city": "Bern"}}'


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


def chat(result, content = ""):
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": result},
    ]


def turns(text):
    return [turn.rpartition("<|end_header_id|>\n\n")[2] for turn in text.split("<|eot_id|>")]


@pytest.mark.parametrize("result", ["25 C", '{"t": 25}', 'said "hi"', "[1, 2]", ""])
def test_the_text_of_a_tool_is_not_quoted_again(render, result):
    assert turns(render(chat(result)))[-2] == result


@pytest.mark.parametrize("result, text", [({"t": 25}, '{"t": 25}'), ([1, 2], "[1, 2]")])
def test_an_object_of_a_tool_renders_as_before(render, result, text):
    assert turns(render(chat(result)))[-2] == text


def test_content_beside_a_call_is_kept(render):
    assert turns(render(chat("ok", "Let me look. ")))[-3] == "Let me look. " + JSON_CALL


@pytest.mark.parametrize("content", ["", None])
def test_a_call_without_content_renders_as_before(render, content):
    assert turns(render(chat("ok", content)))[-3] == JSON_CALL


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_typed_parts_are_their_text(render, role):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert render([{"role": role, "content": parts}]) == render(
        [{"role": role, "content": "Hello there"}]
    )


def test_an_image_is_refused(render):
    with pytest.raises(Exception, match = "list of text parts"):
        render([{"role": "user", "content": [{"type": "image"}]}])


def test_content_of_none_is_empty(render):
    one, other = ([{"role": "user", "content": c}] for c in (None, ""))
    assert render(one) == render(other)


def test_a_plain_chat_renders_as_before(render):
    text = render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
        ]
    )
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    )
