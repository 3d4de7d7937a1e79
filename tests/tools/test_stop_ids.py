"""Stop ids: which are added where, and that a model which must emit one stops there, also after it was saved and loaded."""

import inspect
from types import SimpleNamespace

import pytest

from unsloth_ext.tools.special_tokens import VOCABULARY_SIZE
from unsloth_ext.tools.stop_ids import (
    stop_ids,
    widen_generation_config,
    widen_sampling_params,
    widen_vllm_engine,
    widened,
)

STOPS = (128001, 128008, 128009)


class Other:
    """A tokenizer of another family."""

    _tokenizer = SimpleNamespace(token_to_id={"<|begin_of_text|>": 1}.get)


def tiny_llama(eos, token):
    """A model that says `token` after everything, and its weights: one hidden direction, one row that answers to it."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=128001,
        pad_token_id=128004,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            layer.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1.0
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=128004)
    return model


@pytest.mark.parametrize("token", STOPS)
def test_a_model_that_emits_a_stop_ends_there_also_after_saving(llama3_tokenizer, tmp_path, token):
    import torch
    from transformers import LlamaForCausalLM

    model, prompt = tiny_llama(7, token), torch.tensor([[128000, 42]])
    assert model.generate(prompt, max_new_tokens=4).tolist() == [[128000, 42, token, token, token, token]]
    assert widen_generation_config(model, llama3_tokenizer) == list(STOPS)
    model.save_pretrained(tmp_path)
    for one in (model, LlamaForCausalLM.from_pretrained(tmp_path).eval()):
        assert one.generation_config.eos_token_id == [7, *STOPS]
        assert one.generate(prompt, max_new_tokens=4).tolist() == [[128000, 42, token]]
        # What is given to generate holds.
        assert one.generate(prompt, max_new_tokens=3, eos_token_id=7).shape == (1, 5)
    assert widen_generation_config(model, llama3_tokenizer) == [] and model.config.eos_token_id == 128001


def test_an_adapter_shares_the_config_of_its_base(llama3_tokenizer):
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(128001, 128008)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert widen_generation_config(model, llama3_tokenizer) == [128008, 128009]
    assert base.generation_config.eos_token_id == list(STOPS)
    assert model.generate(input_ids=torch.tensor([[128000]]), max_new_tokens=4).tolist() == [[128000, 128008]]


@pytest.mark.parametrize(
    "current, wanted",
    [
        (None, list(STOPS)),
        (128001, list(STOPS)),
        (128009, [128009, 128001, 128008]),
        ([128001, 128009], [128001, 128009, 128008]),
        ((128040, 128009), [128040, 128009, 128001, 128008]),
    ],
)
def test_what_is_there_comes_first(current, wanted):
    assert widened(current, STOPS) == wanted and widened(wanted, STOPS) is wanted


@pytest.mark.parametrize("current", [True, [True], ["<|eot_id|>"], "128001", 1.5, [None]])
def test_what_cannot_be_read_stays(current):
    assert widened(current, STOPS) is current


def test_only_names_that_are_there_and_only_llama_3(llama3_tokenizer):
    assert stop_ids(llama3_tokenizer) == STOPS and stop_ids(Other()) == () and stop_ids(None) == ()
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2), vllm_engine=object())
    assert widen_generation_config(model, Other()) == widen_vllm_engine(model, Other()) == []
    assert model.generation_config.eos_token_id == 2
    assert widen_generation_config(None, llama3_tokenizer) == widen_vllm_engine(None, llama3_tokenizer) == []


class ReadOnly:
    eos_token_id = property(lambda self: 128001)


def test_a_config_that_cannot_be_set_is_said(llama3_tokenizer, caplog):
    assert widen_generation_config(SimpleNamespace(generation_config=ReadOnly()), llama3_tokenizer) == []
    assert "give it to generate()" in caplog.text


@pytest.mark.parametrize("path", [("llm_engine", "input_processor"), ("processor",)])
def test_the_fields_of_each_vllm_layout(llama3_tokenizer, path):
    fields = {"eos_token_id": 128009}
    engine = SimpleNamespace(generation_config_fields=fields)
    for name in reversed(path):
        engine = SimpleNamespace(**{name: engine})
    model = SimpleNamespace(vllm_engine=engine)
    assert widen_vllm_engine(model, llama3_tokenizer) == [128001, 128008]
    assert fields == {"eos_token_id": [128009, 128001, 128008]} and widen_vllm_engine(model, llama3_tokenizer) == []


def test_a_vllm_without_the_fields_is_said(llama3_tokenizer, caplog):
    assert widen_vllm_engine(SimpleNamespace(vllm_engine=object()), llama3_tokenizer) == []
    assert "stop_token_ids=[128001, 128008, 128009]" in caplog.text


def test_sampling_params(llama3_tokenizer):
    params = SimpleNamespace(stop_token_ids=[5], ignore_eos=False, _all_stop_token_ids={5, 128001})
    assert widen_sampling_params(params, llama3_tokenizer) is params
    assert params.stop_token_ids == [5, *STOPS] and params._all_stop_token_ids == {5, *STOPS}
    assert widen_sampling_params({"temperature": 0.5}, llama3_tokenizer)["stop_token_ids"] == list(STOPS)
    for untouched in ({"ignore_eos": True}, {"stop_token_ids": list(STOPS)}, {"stop_token_ids": list(range(126))}):
        assert widen_sampling_params(dict(untouched), llama3_tokenizer) == untouched
    assert widen_sampling_params({}, Other()) == {}


def test_with_a_real_vllm(llama3_tokenizer):
    """The layout was read in vLLM's main of the 0.17 series (v1/engine/input_processor.py); this sees to it that it is still there."""
    vllm = pytest.importorskip("vllm")
    from vllm.v1.engine.input_processor import InputProcessor

    processor = InputProcessor.__new__(InputProcessor)
    processor.generation_config_fields = {"eos_token_id": 128009}
    assert "self.generation_config_fields = " in inspect.getsource(InputProcessor.__init__)
    assert "self.input_processor = " in inspect.getsource(vllm.LLMEngine.__init__)
    engine = SimpleNamespace(llm_engine=SimpleNamespace(input_processor=processor))
    assert widen_vllm_engine(SimpleNamespace(vllm_engine=engine), llama3_tokenizer) == [128001, 128008]
    params = vllm.SamplingParams()
    params.update_from_generation_config(processor.generation_config_fields, 128009)
    assert {128001, 128008} <= params.all_stop_token_ids
    given = widen_sampling_params(vllm.SamplingParams(stop_token_ids=[5]), llama3_tokenizer)
    assert given.stop_token_ids == [5, *STOPS] and {5, *STOPS} <= given.all_stop_token_ids
