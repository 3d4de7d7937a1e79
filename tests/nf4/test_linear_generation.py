"""`generate` without a card: where it steps aside, and how its steps fit into transformers' loop. Recording is test_linear_gpu.py's."""

import types

import pytest
import torch
from nf4_llama import small_llama

from unsloth_ext.nf4 import generate
from unsloth_ext.nf4.generation import CapturedStep, _decoding_by, _flatten, _replaced, is_plain_search
from unsloth_ext.nf4.patch import _captured_generate, _new_tokens


@pytest.fixture(scope="module")
def model():
    return small_llama("cpu", hidden=64)


def prompt():
    ids = torch.randint(1, 512, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "do_sample": False}


def test_on_a_cpu_it_is_generate(model):
    arguments = prompt() | {"max_new_tokens": 8}
    assert torch.equal(generate(model, **arguments), model.generate(**arguments))
    assert "get_compiled_call" not in vars(model)


def test_a_step_that_cannot_be_recorded_is_eager(model):
    """The loop of transformers calls the step for every token but the first; without a card recording fails once, saying so."""
    arguments = prompt() | {"max_new_tokens": 8, "cache_implementation": "static"}
    right = model.generate(**arguments, disable_compile=True)
    with _decoding_by(CapturedStep(model)) as step:
        if torch.cuda.is_available():
            step.failure = "on a CPU"
            ours = model.generate(**arguments)
        else:
            with pytest.warns(RuntimeWarning, match="decoding steps of LlamaForCausalLM are not captured") as said:
                ours = model.generate(**arguments)
            assert sum("not captured" in str(w.message) for w in said) == 1
    assert torch.equal(ours, right) and step.seen is not None
    assert not {"get_compiled_call", "_valid_auto_compile_criteria"} & set(vars(model))


def test_a_growing_cache_is_never_recorded(model):
    with _decoding_by(CapturedStep(model)) as step:
        arguments = prompt() | {"max_new_tokens": 6}
        ours = model.generate(**arguments)
    assert step.seen is None and step.failure == "" and torch.equal(ours, model.generate(**arguments))


def test_flattened_and_put_together_again():
    cache = types.SimpleNamespace()
    value = {
        "ids": torch.ones(2),
        "masks": {"full": torch.zeros(3), "none": None},
        "cache": cache,
        "flags": [True, (2, torch.ones(1))],
    }
    tensors, structure = _flatten(value)
    assert [tuple(t.shape) for t in tensors] == [(2,), (3,), (1,)]
    again = _replaced(value, iter([t + 1 for t in tensors]))
    assert again["ids"][0] == 2 and again["masks"]["full"][0] == 1 and again["flags"][1][1][0] == 2
    assert again["cache"] is cache and again["masks"]["none"] is None and again["flags"][0] is True
    assert _flatten(again)[1] == structure
    for other in (value | {"cache": types.SimpleNamespace()}, value | {"flags": [False, (2, torch.ones(1))]}):
        assert _flatten(other)[1] != structure


def test_what_a_plain_search_is(model):
    assert is_plain_search(model, {}) and is_plain_search(model, {"do_sample": True, "num_beams": 1})
    for arguments in (
        {"num_beams": 2},
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 3},
        {"output_hidden_states": True},
        {"output_attentions": True},
    ):
        assert not is_plain_search(model, arguments)


def test_how_many_tokens_are_asked_for(model):
    ids = torch.ones(1, 5)
    for arguments, count in (
        ({"max_new_tokens": 7}, 7),
        ({"max_length": 30, "input_ids": ids}, 25),
        ({"max_new_tokens": 3, "max_length": 30}, 3),
        ({}, 0),
        ({"generation_config": types.SimpleNamespace(max_new_tokens=12)}, 12),
    ):
        assert _new_tokens(model, (), arguments) == count
    assert _new_tokens(model, (ids,), {"max_length": 30}) == 25


def test_the_scope_around_unsloths_generate(model, monkeypatch):
    graphs = types.ModuleType("unsloth.models._decode_graphs")
    inside = []

    class rl_generation:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    graphs.rl_generation, graphs.enabled = rl_generation, lambda: False
    for name in ("unsloth", "unsloth.models"):
        monkeypatch.setitem(__import__("sys").modules, name, types.ModuleType(name))
    monkeypatch.setitem(__import__("sys").modules, graphs.__name__, graphs)
    call = _captured_generate(lambda self, *args, **kwargs: (bool(inside), self, args, kwargs))
    assert call(model, 1, max_new_tokens=64) == (True, model, (1,), {"max_new_tokens": 64}) and not inside
    for arguments in (
        {"max_new_tokens": 63},
        {"max_new_tokens": 64, "num_beams": 2},
        {"max_new_tokens": 64, "past_key_values": 1},
    ):
        assert call(model, **arguments) == (False, model, (), arguments)
    noticed = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # a replay would not call it
    assert call(model, max_new_tokens=64)[0] is False
    noticed.remove()
    as_trainers_do = model.get_input_embeddings().register_forward_hook(lambda *_: None)
    assert call(model, max_new_tokens=64)[0] is True
    as_trainers_do.remove()
    graphs.enabled = lambda: True  # an RL trainer's own scope, or the user's wish
    assert call(model, max_new_tokens=64)[0] is False
