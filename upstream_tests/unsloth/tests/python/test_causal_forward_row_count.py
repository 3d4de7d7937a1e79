"""The causal LM forwards take no branch on the number of rows: one dynamic graph serves 600 and 1600 of them."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, MistralConfig  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402
from unsloth.models import llama, mistral  # noqa: E402

KINDS = {
    "llama": (
        LlamaConfig(hidden_size = 8, vocab_size = 16, num_attention_heads = 2, num_key_value_heads = 2),
        llama.CausalLM_fast_forward(None),
    ),
    "mistral": (
        MistralConfig(
            hidden_size = 8,
            vocab_size = 16,
            num_attention_heads = 2,
            num_key_value_heads = 2,
            sliding_window = None,
        ),
        mistral.MistralForCausalLM_fast_forward,
    ),
}


class Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(16, 8)

    def forward(self, input_ids, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state = self.embed_tokens(input_ids))


def make(kind):
    config, forward = KINDS[kind]

    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config
            self.config.dtype = torch.float32
            self.model, self.lm_head = Backbone(), torch.nn.Linear(8, 16, bias = False)

    Causal.forward = forward
    return Causal()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph(kind):
    torch._dynamo.reset()
    model, graphs = make(kind), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph = True, dynamic = True, backend = backend)
    for length in (300, 800, 500, 900):
        ids = torch.randint(0, 16, (2, length))
        out = compiled(input_ids = ids, return_dict = True)
        assert torch.equal(out.logits, model.lm_head(model.model.embed_tokens(ids)))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [300, 800])
def test_eager_is_as_before(kind, length):
    model, ids = make(kind), torch.randint(0, 16, (2, length))
    out = model(input_ids = ids, return_dict = True)
    assert torch.equal(out.logits, model.lm_head(model.model.embed_tokens(ids)))
