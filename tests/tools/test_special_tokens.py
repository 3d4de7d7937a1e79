"""Names and ids of Llama 3's tool tokens: on Meta's own vocabulary, and on those of other families, which must stay."""

import copy
import json
import pickle

import pytest

from unsloth_ext.tools.special_tokens import (
    SPECIAL_TOKENS,
    VOCABULARY_SIZE,
    is_llama3,
    restore_special_tokens,
)

EOM, TAG = "<|eom_id|>", "<|python_tag|>"
RESERVED = {EOM: "<|reserved_special_token_900|>", TAG: "<|reserved_special_token_901|>"}


@pytest.fixture(scope="module")
def filler(llama3_tokenizer):
    """The same added tokens, of the same ids, after 128,000 words without merges: what the real one's take seconds to read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({f"w{i}": i for i in range(128000)}, []))
    backend.add_tokens([token for _, token in sorted(llama3_tokenizer._tokenizer.get_added_tokens_decoder().items())])
    names = ("bos_token", "eos_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: getattr(llama3_tokenizer, name) for name in names}
    )


@pytest.fixture
def renamed(llama3_tokenizer, filler):
    """renamed({old: new}, add=[...], **attributes): a copy of the tokenizer with other names in its slots."""

    def make(names=(), add=(), real=False, **attributes):
        tokenizer = copy.deepcopy(llama3_tokenizer if real else filler)
        state = json.loads(tokenizer._tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = dict(names).get(token["content"], token["content"])
        tokenizer._tokenizer = type(tokenizer._tokenizer).from_str(json.dumps(state, ensure_ascii=False))
        if add:
            tokenizer.add_tokens(list(add), special_tokens=True)
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        return tokenizer

    return make


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_reserved_slots_get_their_names_back(renamed, llama3_tokenizer, tmp_path):
    tokenizer = renamed(RESERVED, real=True)
    assert len(ids(tokenizer, EOM)) > 1 and len(ids(tokenizer, TAG)) > 1
    report = restore_special_tokens(tokenizer)
    assert report.state == "restored" and report.renamed == {old: new for new, old in RESERVED.items()}
    assert len(tokenizer) == VOCABULARY_SIZE and tokenizer.get_vocab() == llama3_tokenizer.get_vocab()
    text = f"<|start_header_id|>assistant<|end_header_id|>\n\n{TAG}print('ü')\n{EOM}<|reserved_special_token_7|>"
    wanted = ids(llama3_tokenizer, text)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert ids(one, text) == wanted and len(one) == VOCABULARY_SIZE
        assert one.decode(wanted) == text and one(text).input_ids[0] == SPECIAL_TOKENS["<|begin_of_text|>"]
        assert one.decode([128008, 128010, 128009], skip_special_tokens=True) == ""
    assert restore_special_tokens(tokenizer).state == "present"


def test_only_the_missing_one_is_renamed(renamed):
    tokenizer = renamed({EOM: RESERVED[EOM]})
    assert restore_special_tokens(tokenizer).renamed == {RESERVED[EOM]: EOM}
    for one in (tokenizer, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert ids(one, EOM + TAG) == [128008, 128010] and len(one) == VOCABULARY_SIZE


def test_names_that_transformers_keeps_in_python_follow(renamed, tmp_path):
    tokenizer = renamed(RESERVED)
    tokenizer.add_special_tokens({"additional_special_tokens": [RESERVED[EOM], "<|reserved_special_token_7|>"]})
    restore_special_tokens(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert RESERVED[EOM] not in "".join(file.read_text(encoding="utf-8") for file in tmp_path.iterdir())
    assert EOM in tokenizer.all_special_tokens and RESERVED[EOM] not in tokenizer.all_special_tokens
    assert len(tokenizer) == VOCABULARY_SIZE


@pytest.mark.parametrize(
    "names, add, attributes, reason",
    [
        ({EOM: "<|mine|>"}, (), {}, "id 128008, where <|eom_id|> belongs, holds <|mine|>"),
        (RESERVED, (TAG,), {}, "<|python_tag|> is at id 128256; Llama 3 has it at 128010"),
        (RESERVED, (), {"pad_token": RESERVED[TAG]}, "in the slot of <|python_tag|>, is used as pad_token"),
        (RESERVED, (), {"eos_token": RESERVED[EOM]}, "in the slot of <|eom_id|>, is used as eos_token"),
    ],
    ids=["a token of the user's", "the name elsewhere", "pad", "eos"],
)
def test_refused_with_the_reason_and_nothing_changed(renamed, caplog, names, add, attributes, reason):
    tokenizer = renamed(names, add, **attributes)
    before = tokenizer.get_vocab()
    report = restore_special_tokens(tokenizer)
    assert report.state == "refused" and reason in report.reason and reason in caplog.text
    assert tokenizer.get_vocab() == before


def test_a_model_without_rows_for_them_is_refused(renamed):
    import torch

    class Model:
        def get_input_embeddings(self):
            return torch.nn.Embedding(128008, 1)

    tokenizer = renamed(RESERVED)
    report = restore_special_tokens(tokenizer, Model())
    assert report.state == "refused" and "128008 rows" in report.reason and EOM not in tokenizer.get_vocab()


def _bpe(specials, words=260):
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({f"w{i}": i for i in range(words)}, []))
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


OTHERS = {
    "Qwen": lambda: _bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]),
    "gpt-oss": lambda: _bpe(["<|startoftext|>", "<|return|>", "<|channel|>", "<|start|>", "<|end|>", "<|call|>"]),
    "Mistral": lambda: _bpe(["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"], words=0),
    "Llama 2": lambda: _bpe(["<unk>", "<s>", "</s>"], words=0),
    "GPT-2": lambda: _bpe(["<|endoftext|>"]),
    "Llama 3's names at other ids": lambda: _bpe(SPECIAL_TOKENS),
    "Llama 4": lambda: _bpe(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>"]
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_stay(family):
    tokenizer = OTHERS[family]()
    before = tokenizer._tokenizer.to_str()
    assert not is_llama3(tokenizer) and restore_special_tokens(tokenizer).state == "not llama 3"
    assert tokenizer._tokenizer.to_str() == before


def test_what_is_no_tokenizer_is_not_llama_3(renamed):
    class Processor:
        tokenizer = None

    assert not is_llama3(None) and not is_llama3(object()) and not is_llama3(Processor())
    Processor.tokenizer = renamed(RESERVED)
    assert is_llama3(Processor()) and restore_special_tokens(Processor()).state == "restored"
