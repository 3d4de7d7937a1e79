"""assistant_only_loss needs {% generation %} markers around what the assistant says: its content, its
calls and the token that ends its turn, and nothing else."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import re

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unsloth.chat_templates import CHAT_TEMPLATES

NAMES = ("llama-3.1", "llama-31", "llama-3.2", "llama-32", "llama-3.3", "llama-33")
CALL = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
CHAT = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": {"t": 25}},
    {"role": "assistant", "content": "Warm."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome"},
]


@pytest.fixture(params = NAMES)
def tokenizer(request):
    # One token for each character: the mask is that of the text. No bos, which would be one token.
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token = " "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object = backend, clean_up_tokenization_spaces = False
    )
    tokenizer.chat_template = CHAT_TEMPLATES[request.param][0].replace("{system_message}", "")
    return tokenizer


def masked_text(tokenizer, messages, **kwargs):
    done = tokenizer.apply_chat_template(
        messages, return_dict = True, return_assistant_tokens_mask = True, **kwargs
    )
    text = tokenizer.apply_chat_template(messages, tokenize = False, **kwargs)
    masks = "".join(map(str, done["assistant_masks"]))
    assert len(masks) == len(text)
    return [text[run.start() : run.end()] for run in re.finditer("1+", masks)]


def test_content_calls_and_the_closing_token_are_marked(tokenizer):
    assert masked_text(tokenizer, CHAT) == [
        '{"name": "weather", "parameters": {"city": "Bern"}}<|eot_id|>',
        "Warm.<|eot_id|>",
        "Welcome<|eot_id|>",
    ]


def test_a_builtin_call_is_marked_with_its_eom(tokenizer):
    call = {"function": {"name": "brave_search", "arguments": {"query": "x"}}}
    chat = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert masked_text(tokenizer, chat, builtin_tools = ["brave_search"]) == [
        '<|python_tag|>brave_search.call(query="x")<|eom_id|>'
    ]


def test_the_text_does_not_change(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize = False, add_generation_prompt = True)
    assert text.endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\nWarm.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nWelcome<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
