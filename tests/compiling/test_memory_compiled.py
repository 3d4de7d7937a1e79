"""The levels around compiled layers: the same bits as the same graphs without a budget, no graph of their own, and replays that
do not run the graph again."""

import pytest
import torch
from memory_models import assert_equal, hold, model_of, tokens_of, trained

from unsloth_ext.compiling import recompute
from unsloth_ext.compiling.memory_controller import memory_budget
from unsloth_ext.compiling.recompute import LEVELS


@pytest.fixture
def compiled_layers(monkeypatch):
    """The class's forward compiled, as Unsloth does it: a function around the compiled one that names the original."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(recompute, "SMALL", 1024)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    original = LlamaDecoderLayer.forward
    compiled = torch.compile(original, backend=graphs, fullgraph=True, dynamic=True)
    calls = {"compiled": 0}

    def forward(self, *args, **kwargs):
        calls["compiled"] += 1
        return compiled(self, *args, **kwargs)

    forward._unsloth_block_original = original
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    calls["graphs"] = graphs
    yield calls
    torch._dynamo.reset()


@pytest.mark.extended
def test_layers_compiled_one_by_one(compiled_layers):
    model, tokens = model_of(layers=2), tokens_of()
    expected = trained(model, tokens, use_cache=False)
    budget = memory_budget(model, "64GiB")
    assert_equal(trained(model, tokens, use_cache=False), expected)  # the probe has been at every level
    kept = {cost.name: cost.kept for cost in budget.costs.levels}
    assert kept["layer"] < kept["gate_up"] < kept["up"] < kept["norms"] < kept["keep"], said(budget)
    made = compiled_layers["graphs"].frame_count
    for level in LEVELS:
        hold(budget, level)
        compiled_layers["compiled"] = 0
        assert_equal(trained(model, tokens, use_cache=False), expected)
        assert compiled_layers["compiled"] == 2, level  # no graph ran again
    assert (
        compiled_layers["graphs"].frame_count <= made + 2
    )  # the first layer's input needs no gradient, in the probe it does
    assert any(script.outline for script in budget.scripts.values()), said(budget)
    assert budget.searches == len(budget.patterns)  # once for a kind of layer, not for each layer


def said(budget):
    return {script.why for script in budget.scripts.values()}


@pytest.mark.extended
def test_what_the_uncompiled_forward_does_not_save_is_replayed(compiled_layers, monkeypatch):
    """Its tensors have other bits than the graph's: the graph runs again, and only the MLP is found, from a norm that it saved."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, tokens = model_of(layers=2), tokens_of()
    compiled = LlamaDecoderLayer.forward
    original = compiled._unsloth_block_original
    compiled._unsloth_block_original = lambda self, x, *args, **kwargs: original(self, x * 1.01, *args, **kwargs)
    expected = trained(model, tokens, use_cache=False)
    budget = memory_budget(model, "64GiB")
    trained(model, tokens, use_cache=False)  # the probe
    for level in LEVELS:
        hold(budget, level)
        compiled_layers["compiled"] = 0
        assert_equal(trained(model, tokens, use_cache=False), expected)
        assert compiled_layers["compiled"] == (4 if LEVELS[level].layer else 2), level
    assert not any(script.outline for script in budget.scripts.values())
    assert any(script.products for script in budget.scripts.values()), said(budget)
    assert any("the uncompiled forward does not save" in why for why in said(budget))


@pytest.mark.extended
def test_what_was_found_in_one_layer_is_not_taken_for_granted_in_another(compiled_layers, monkeypatch):
    """The last layer's uncompiled forward makes other bits than its graph: it is searched for itself, and its graph runs again."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model, tokens = model_of(layers=3), tokens_of()
    compiled, last = LlamaDecoderLayer.forward, model.base_model.model.model.layers[2]
    original = compiled._unsloth_block_original
    compiled._unsloth_block_original = lambda self, x, *args, **kwargs: original(
        self, x * 1.01 if self is last else x, *args, **kwargs
    )
    expected = trained(model, tokens, use_cache=False)
    budget = memory_budget(model, "64GiB")
    trained(model, tokens, use_cache=False)  # the probe
    hold(budget, "layer")
    for _ in range(2):
        compiled_layers["compiled"] = 0
        assert_equal(trained(model, tokens, use_cache=False), expected)
        assert compiled_layers["compiled"] == 4, said(budget)  # three layers, the last one's graph twice
    assert {key[0] for key, script in budget.scripts.items() if script.outline} == {0, 1}


def test_a_tensor_that_was_saved_the_other_way_round_is_found():
    """A graph may save rows and columns exchanged; what the uncompiled run made is then compared, and put back, as it lies in memory."""
    from unsloth_ext.compiling.retrace import match, placed

    made = torch.randn(2, 4, 8)
    square = torch.randn(8, 8)
    for tensor, saved, wanted in (
        (made, made.clone(), False),
        (made, made.view(8, 8).t(), True),
        (made.transpose(0, 1), made.view(8, 8), True),
        (made, made.transpose(0, 1).contiguous(), None),
        (square, square.t(), True),  # of the same shape
        (square, square.t().contiguous(), None),
        (square, square.t().contiguous().t(), False),  # equal, in another layout
        (made[:, :2], made[:, :2].reshape(4, 8), None),  # not all next to each other
        (made, made.double(), None),
    ):
        flat = match(tensor, saved)
        assert flat is wanted
        if flat is not None:
            storage = placed(tensor, saved.shape, saved.stride(), saved.untyped_storage().nbytes(), flat)
            restored = torch.empty(0).set_(storage, 0, saved.shape, saved.stride())
            assert torch.equal(restored, saved) and storage.nbytes() == saved.untyped_storage().nbytes()
