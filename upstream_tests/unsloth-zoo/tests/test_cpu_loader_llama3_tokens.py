"""The CPU loader must treat a Llama 3 tokenizer as the GPU loaders do: <|eom_id|> and <|python_tag|> by
name, and a stop at each end of turn."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
from functools import lru_cache

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FastCPUModel = pytest.importorskip("unsloth_zoo.cpu.loader").FastCPUModel


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


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = 128256,
        hidden_size = 64,
        intermediate_size = 64,
        num_hidden_layers = 1,
        num_attention_heads = 1,
        num_key_value_heads = 1,
        bos_token_id = 128000,
        eos_token_id = 128001,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)

    def save(tokenizer):
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def load(folder):
    return FastCPUModel.from_pretrained(
        folder, max_seq_length = 64, dtype = torch.float32, load_in_4bit = False
    )


def test_the_tool_tokens_have_their_names(checkpoint):
    _, tokenizer = load(checkpoint(llama3(OLD)))
    assert tokenizer("<|python_tag|><|eom_id|>", add_special_tokens = False).input_ids == [
        128010,
        128008,
    ]
    assert len(tokenizer) == 128256


def test_the_stop_ids_are_there_and_are_saved(checkpoint, tmp_path):
    model, _ = load(checkpoint(llama3()))
    assert model.generation_config.eos_token_id == [128001, 128008, 128009]
    model.save_pretrained(tmp_path / "again")
    llama3().save_pretrained(tmp_path / "again")
    model, _ = load(str(tmp_path / "again"))
    assert model.generation_config.eos_token_id == [128001, 128008, 128009]


def test_an_adapter_sees_the_stop_ids(checkpoint):
    model, _ = load(checkpoint(llama3()))
    model = FastCPUModel.get_peft_model(model, r = 4)
    assert model.generation_config.eos_token_id == [128001, 128008, 128009]


def test_another_family_stays(checkpoint):
    folder = checkpoint(llama3({**OLD, "<|start_header_id|>": "<|im_start|>"}))
    model, tokenizer = load(folder)
    assert model.generation_config.eos_token_id == 128001
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
