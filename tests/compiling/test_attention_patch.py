"""Unsloth's causal attention for cuDNN, which pads no length that is a multiple of its bucket: calls, values, gradients, graphs."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SCRIPT = """
import compile_fake_card as card
import json, torch, unsloth_ext
from unsloth.utils import attention_dispatch as dispatch

found = {"state": {s.id: s.state for s in unsloth_ext.status()}["compiling.unpadded_attention"]}
graphs, runs = [], []


def backend(graph, inputs):
    padded = " ".join(str(n.target) for n in graph.graph.nodes if n.op == "call_function").count("pad")
    graphs.append(padded)

    def run(*args):
        runs.append(padded)
        return graph.forward(*args)

    return run


def layer(Q, K, V):
    config = dispatch.AttentionConfig(backend=dispatch.SDPA, n_kv_heads=2, n_groups=2)
    total = Q.shape[2]
    context = dispatch.AttentionContext(
        bsz=Q.shape[0], q_len=total, kv_seq_len=total, requires_grad=True, seq_info=None, attention_mask=None,
        causal_mask=None, n_heads=4, head_dim=16, training=True,
    )
    return dispatch.run_attention(config=config, context=context, Q=Q, K=K, V=V)


def heads(length, dtype=torch.bfloat16):
    return [torch.randn(2, length, n, 16, dtype=dtype).transpose(1, 2) for n in (4, 2, 2)]


def traced(lengths, dynamic):
    torch._dynamo.reset()
    graphs.clear()
    runs.clear()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in lengths:
        with card.tensors():
            inputs = heads(length)
        with card.MODE:
            assert compiled(*inputs).shape == (2, length, 4, 16)
    return list(graphs)


several = (130, 256, 512, 128, *OTHERS)
found["dynamic"], found["fixed"] = traced(several, True), traced((256, 200), False)
found["full"], found["full first"] = traced((256, 512, 4096, 128), True), traced((256, 512, 200, 384, 130, 128, *OTHERS), True)
found["runs"] = runs[:6]
found["first fixed, then not"] = traced((256, 256, 200, 512, 77), None)

original, patched = dispatch._cudnn_length_bucketed_sdpa.__wrapped__, dispatch._cudnn_length_bucketed_sdpa
real, called, apart = dispatch.scaled_dot_product_attention, [], {}


def counted(*args, **kwargs):
    called.append(args[0].shape[-2])
    return real(*args, **kwargs)


dispatch.scaled_dot_product_attention = counted
for name, length, options in (
    ("multiple", 256, dict(is_causal=True, scale=0.4)),
    ("other", 200, dict(is_causal=True)),
    ("masked multiple", 128, dict(attn_mask=0)),
    ("masked", 100, dict(attn_mask=0)),
):
    q, k, v = (t.requires_grad_() for t in heads(length, torch.float64))
    if "attn_mask" in options:
        options["attn_mask"] = (torch.rand(2, 1, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)
    upstream, results = torch.randn_like(q), []
    called.clear()
    for function in (patched, original):
        out = function(q, k, v, enable_gqa=True, **options)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    apart[name] = [max((a - b).abs().max().item() for a, b in zip(*results)), list(called)]
found["apart"] = apart
dispatch.scaled_dot_product_attention = real
unsloth_ext.disable("compiling.unpadded_attention")
assert dispatch._cudnn_length_bucketed_sdpa is original
found["off"] = traced((256,), False)
print("FOUND" + json.dumps(found))
"""


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes", "triton")), reason="make setup"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="traces for a card that is not there")
def test_only_lengths_that_need_it_are_padded(python):
    script = SCRIPT.replace("OTHERS", repr(random.sample(range(2, 700), 4)))
    process = python(script, path=(Path(__file__).parent, Path(__file__).parents[2]), UNSLOTH_ALLOW_CPU="1")
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    assert found["state"] == "applied"
    assert found["dynamic"] == [
        3
    ]  # one graph for all lengths, which pads query, key and value: the first length needs it
    assert found["full"] == [0] and found["full first"] == [0, 3] and found["runs"] == [0, 0, 3, 0, 3, 0]
    assert found["fixed"] == [0, 3] and found["first fixed, then not"] == [0, 3, 0] and found["off"] == [3]
    assert max(worst for worst, _ in found["apart"].values()) < 1e-12
    # The lengths that SDPA was called with: by the patched function, then by Unsloth's.
    assert {name: lengths for name, (_, lengths) in found["apart"].items()} == {
        "multiple": [256, 384], "other": [256, 256], "masked multiple": [128, 256], "masked": [128, 128],
    }  # fmt: skip
