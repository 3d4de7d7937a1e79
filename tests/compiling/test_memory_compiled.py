"""The levels in compiled layers: the same bits as the same graphs without a budget, and two graphs for all levels."""

import pytest
import torch
from memory_models import assert_equal, hold, model_of, tokens_of, trained

from unsloth_ext.compiling import recompute
from unsloth_ext.compiling.memory_controller import memory_budget


@pytest.mark.extended
def test_layers_compiled_one_by_one(monkeypatch):
    """As Unsloth compiles them: the class's forward is a compiled function, the budget stands around it."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(recompute, "SMALL", 1024)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(LlamaDecoderLayer.forward, backend=graphs, fullgraph=True, dynamic=True)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: compiled(self, *args, **kwargs))
    model, tokens = model_of(layers=2), tokens_of()
    expected = trained(model, tokens, use_cache=False)
    budget = memory_budget(model, "64GiB")
    assert_equal(trained(model, tokens, use_cache=False), expected)  # the probe has been at every level
    kept = {cost.name: cost.kept for cost in budget.costs.levels}
    assert kept["layer"] < kept["gate_up"] < kept["keep"]
    made = graphs.frame_count
    for level in ("gate_up+offload", "layer", "offload"):
        hold(budget, level)
        assert_equal(trained(model, tokens, use_cache=False), expected)
    assert graphs.frame_count <= made + 2  # the first layer's input needs no gradient, in the probe it does
