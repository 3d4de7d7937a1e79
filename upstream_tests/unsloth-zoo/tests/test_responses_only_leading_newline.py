"""An answer that starts with a newline: the marker's own newlines and that one become a single token.
The marker must be found all the same, and the answer trained on."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unsloth_zoo.dataset_utils import train_on_responses_only

SPECIALS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
CHATML = "<|im_start|>{}\n", "<|im_end|>"


@pytest.fixture(scope = "module")
def tokenizer():
    # Runs of newlines are one token, as in Llama 3's vocabulary; words are letters.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    merges = []
    for left, right in ((1, 1), (2, 1), (2, 2)):
        vocabulary[newline * (left + right)] = len(vocabulary)
        merges.append((newline * left, newline * right))
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space = False, use_regex = False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object = backend, eos_token = "<|eot_id|>")


def trained(
    tokenizer,
    style,
    answer,
    question = "hi",
):
    header, end = style
    mask = train_on_responses_only(
        None,
        instruction_part = header.format("user"),
        response_part = header.format("assistant"),
        tokenizer = tokenizer,
        return_function = True,
    )
    text = header.format("user") + question + end + header.format("assistant") + answer + end
    text += header.format("user") + "bye" + end
    ids = tokenizer(text, add_special_tokens = False).input_ids
    labels = mask({"input_ids": [ids]})["labels"][0]
    return tokenizer.decode([i for i in labels if i != -100], skip_special_tokens = False)


@pytest.mark.parametrize("answer", ["\nhello", "\n\nhello", "\n"])
def test_an_answer_that_starts_with_a_newline(tokenizer, answer):
    # The merged token holds the marker's newlines as well.
    assert trained(tokenizer, LLAMA, answer) == "\n\n" + answer + "<|eot_id|>"


@pytest.mark.parametrize("answer", ["hello", " hello", "a\n\nb", ""])
@pytest.mark.parametrize("question", ["hi", "\nhi"])
def test_other_answers_as_before(tokenizer, answer, question):
    assert trained(tokenizer, LLAMA, answer, question) == answer + "<|eot_id|>"


def test_a_newline_that_ends_a_word_of_the_marker_as_before(tokenizer):
    assert trained(tokenizer, CHATML, "hello").startswith("hello<|im_end|>")
