"""Llama 3 ends a turn with end_of_text (128001), eom (128008) or eot (128009). Generation must stop at
each of them, whatever the checkpoint says."""

import unsloth  # noqa: F401 (before transformers and unsloth_zoo)
from functools import lru_cache

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


def tiny(eos):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size = 128256,
        hidden_size = 8,
        intermediate_size = 8,
        num_hidden_layers = 1,
        num_attention_heads = 1,
        num_key_value_heads = 1,
        bos_token_id = 128000,
        eos_token_id = 128001,
        pad_token_id = 128004,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id = eos, bos_token_id = 128000)
    return model


def forced(model, token):
    """The model says `token` whatever it reads."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    bias = torch.zeros(128256)
    bias[token] = 10.0
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + bias)
    return model


@pytest.mark.parametrize("token", [128001, 128008, 128009])
def test_generate_stops_at_each_of_them(tmp_path, token):
    model, tokenizer = patch_tokenizer(tiny(128001), llama3())
    model.save_pretrained(tmp_path)
    for one in (model, LlamaForCausalLM.from_pretrained(tmp_path).eval()):
        out = forced(one, token).generate(
            torch.tensor([[128000]]), max_new_tokens = 5, max_length = None, pad_token_id = 128004
        )
        assert out.tolist() == [[128000, token]]


@pytest.mark.parametrize(
    "eos, wanted",
    [
        (128001, [128001, 128008, 128009]),
        (128009, [128009, 128001, 128008]),
        ([128001, 128009], [128001, 128009, 128008]),
        ([128009, 7, 128001], [128009, 7, 128001, 128008]),
        (None, [128001, 128008, 128009]),
        ([128001, 128008, 128009], [128001, 128008, 128009]),
    ],
)
def test_what_is_there_stays_and_stays_first(eos, wanted):
    model, tokenizer = tiny(eos), llama3()
    for _ in range(2):
        patch_tokenizer(model, tokenizer)
        assert model.generation_config.eos_token_id == wanted
    assert model.config.eos_token_id == 128001


def test_the_fields_that_vllm_merges_into_each_request():
    class Processor:
        generation_config_fields = {"eos_token_id": [128001, 128009], "temperature": 0.6}

    class Engine:
        llm_engine = type("LLMEngine", (), {"input_processor": Processor()})()

    model = tiny(128001)
    model.vllm_engine = Engine()
    patch_tokenizer(model, llama3())
    assert Processor.generation_config_fields == {
        "eos_token_id": [128001, 128009, 128008],
        "temperature": 0.6,
    }


def test_another_family_stays():
    model = tiny(2)
    patch_tokenizer(model, llama3({"<|start_header_id|>": "<|im_start|>"}))
    assert model.generation_config.eos_token_id == 2
