"""A Llama 3 vocabulary that holds reserved tokens in the slots of <|eom_id|> and <|python_tag|> must
get the names back in place: same length, same ids. Nothing else may change."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
import pickle
from functools import lru_cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unsloth_zoo.tokenizer_utils import patch_tokenizer


@lru_cache
def vocabulary():
    """Llama 3's layout: 128,000 text tokens (fillers but for the bytes), then 256 special ones."""
    byte_tokens = pre_tokenizers.ByteLevel.alphabet()
    words = sorted(byte_tokens) + [f"filler{i}" for i in range(128000 - len(byte_tokens))]
    names = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    }
    specials = [names.get(i, f"<|reserved_special_token_{100 + i}|>") for i in range(256)]
    return {word: i for i, word in enumerate(words)}, specials


def llama3(rename = {}, **special):
    words, specials = vocabulary()
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space = False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(rename.get(name, name), special = True, normalized = False) for name in specials]
    )
    special = {"eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object = backend, bos_token = "<|begin_of_text|>", **special
    )


OLD = {
    "<|eom_id|>": "<|reserved_special_token_3|>",
    "<|python_tag|>": "<|reserved_special_token_5|>",
}


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens = False).input_ids


def test_the_slots_are_renamed():
    tokenizer = llama3(OLD)
    assert len(ids(tokenizer, "<|eom_id|>")) > 1
    patch_tokenizer(None, tokenizer)
    assert ids(tokenizer, "<|python_tag|>x<|eom_id|>") == [128010, *ids(tokenizer, "x"), 128008]
    assert len(tokenizer) == 128256
    assert tokenizer.convert_ids_to_tokens([128008, 128010]) == ["<|eom_id|>", "<|python_tag|>"]


def test_the_names_survive_saving_and_pickling(tmp_path):
    tokenizer = llama3(OLD)
    patch_tokenizer(None, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert ids(again, "<|eom_id|><|python_tag|>") == [128008, 128010]
        assert len(again) == 128256


def test_a_vocabulary_that_has_the_names_stays():
    tokenizer = llama3()
    before = tokenizer._tokenizer.to_str()
    patch_tokenizer(None, tokenizer)
    assert tokenizer._tokenizer.to_str() == before


@pytest.mark.parametrize(
    "rename, special",
    [
        ({"<|eom_id|>": "<|my_own|>"}, {}),
        (OLD, {"pad_token": "<|reserved_special_token_3|>"}),
        ({**OLD, "<|begin_of_text|>": "<|bos|>"}, {}),
    ],
    ids = ["a token of the user's", "a reserved token in use", "another family"],
)
def test_what_is_in_use_or_another_family_stays(rename, special):
    tokenizer = llama3(rename, **special)
    before = tokenizer.get_vocab()
    patch_tokenizer(None, tokenizer)
    assert tokenizer.get_vocab() == before
