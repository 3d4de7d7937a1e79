"""`tools` and `builtin_tools` that are empty or None, and a `date_string` of None, mean that there is
none. With tools, a conversation has to start with the user."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from unsloth.chat_templates import CHAT_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "does f",
        "parameters": {"type": "object", "properties": {}},
    },
}
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


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


@pytest.mark.parametrize("name", ["tools", "builtin_tools"])
@pytest.mark.parametrize("empty", [None, []], ids = ["None", "empty list"])
def test_none_and_an_empty_list_are_no_tools(render, name, empty):
    assert render(CHAT, **{name: empty}) == render(CHAT)


def test_code_interpreter_alone_lists_no_tools(render):
    text = render(CHAT, builtin_tools = ["code_interpreter"])
    assert "Environment: ipython\nCutting Knowledge Date" in text and "Tools:" not in text


def test_other_builtin_tools_are_listed_as_before(render):
    text = render(CHAT, builtin_tools = ["brave_search", "code_interpreter", "wolfram_alpha"])
    assert (
        "Environment: ipython\nTools: brave_search, wolfram_alpha\n\nCutting Knowledge Date" in text
    )


def test_a_date_of_none_is_the_default_date(render):
    assert render(CHAT, date_string = None) == render(CHAT)
    assert "Today Date: 1 May 2025\n" in render(CHAT, date_string = "1 May 2025")


def test_tools_before_an_assistant_message_are_refused(render):
    with pytest.raises(Exception, match = "first user message"):
        render([CHAT[1], CHAT[0]], tools = [TOOL])


def test_tools_before_a_user_message_render_as_before(render):
    text = render(CHAT, tools = [TOOL])
    head, _, rest = text.partition(
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following"
    )
    assert "Environment: ipython\n" in head
    assert rest.endswith(
        "}\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
    )
