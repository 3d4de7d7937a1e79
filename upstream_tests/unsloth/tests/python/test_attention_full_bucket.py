"""A length that fills cuDNN's bucket is not padded, unless a graph has it as a symbol: values, gradients, the lengths SDPA sees."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import pytest  # noqa: E402
import torch  # noqa: E402
from unsloth.utils import attention_dispatch as dispatch  # noqa: E402


def heads(length):
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8))
    return [
        torch.randn(shape, dtype = torch.float64).transpose(1, 2).requires_grad_() for shape in shapes
    ]


@pytest.fixture
def seen(monkeypatch):
    lengths, real = [], dispatch.scaled_dot_product_attention

    def counted(*args, **kwargs):
        lengths.append(args[0].shape[-2])
        return real(*args, **kwargs)

    monkeypatch.setattr(dispatch, "scaled_dot_product_attention", counted)
    return lengths


@pytest.mark.parametrize("length, called", [(256, 256), (200, 256), (128, 128), (1, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_eager(seen, length, called, masked):
    inputs, options = heads(length), {"is_causal": True}
    if masked:
        mask = torch.rand(2, 1, length, length) < 0.5
        options = {"attn_mask": mask | torch.eye(length, dtype = torch.bool)}
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs, enable_gqa = True, **options)
    found = dispatch._cudnn_length_bucketed_sdpa(*inputs, enable_gqa = True, **options)
    assert seen == [called]
    upstream = torch.randn_like(wanted)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, upstream)),
        (wanted, *torch.autograd.grad(wanted, inputs, upstream)),
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def paddings(dynamic, *lengths):
    graphs = []

    def backend(graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append(sum("pad" in target for target in targets))
        return graph.forward

    def attention(Q, K, V):
        return dispatch._cudnn_length_bucketed_sdpa(Q, K, V, is_causal = True, enable_gqa = True)

    torch._dynamo.reset()
    compiled = torch.compile(attention, backend = backend, fullgraph = True, dynamic = dynamic)
    for length in lengths:
        inputs = heads(length)
        torch.testing.assert_close(compiled(*inputs), attention(*inputs))
    return graphs


def test_a_graph_of_one_length():
    assert paddings(False, 256, 200) == [0, 3]


def test_one_graph_for_all_lengths():
    assert paddings(True, 130, 256, 512, 77) == [3]
