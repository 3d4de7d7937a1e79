"""A conversation that went through Arrow has `tool_calls` in every message, None or [] where there
was no call. The Llama 3.1 / 3.2 / 3.3 templates must render such a turn as a plain one."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import datasets
import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from unsloth.chat_templates import CHAT_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Bern"}},
}
PLAIN = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
]
CALL = [
    {"role": "user", "content": "Weather in Bern?"},
    {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


@pytest.fixture(params = NAMES)
def render(request):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token = "[UNK]")),
        bos_token = "<|begin_of_text|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATES[request.param][0]
    return lambda messages, **kwargs: tokenizer.apply_chat_template(
        messages, tokenize = False, **kwargs
    )


def filled(messages, empty):
    return [{"tool_calls": empty, **message} for message in messages]


@pytest.mark.parametrize("empty", [None, []], ids = ["None", "empty list"])
def test_empty_tool_calls_render_as_a_plain_turn(render, empty):
    assert render(filled(PLAIN, empty)) == render(PLAIN)
    assert render(filled(CALL, empty)) == render(CALL)


def test_a_row_of_an_arrow_table(render):
    rows = datasets.Dataset.from_list([{"messages": PLAIN}, {"messages": CALL}])
    assert "tool_calls" in rows[0]["messages"][1]
    assert render(rows[0]["messages"]) == render(PLAIN)
    assert render(rows[1]["messages"]) == render(CALL)


def test_a_real_call_is_unchanged(render):
    head, _, tail = render(CALL).partition("<|start_header_id|>ipython<|end_header_id|>\n\n")
    assert head.endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "get_weather", "parameters": {"city": "Bern"}}<|eot_id|>'
    )
    assert tail.endswith(
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt is sunny.<|eot_id|>"
    )


def test_two_calls_are_still_refused(render):
    with pytest.raises(TemplateError, match = "single tool-calls"):
        render([CALL[0], {"role": "assistant", "content": None, "tool_calls": [WEATHER, WEATHER]}])
