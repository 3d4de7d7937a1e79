"""On a card: cuDNN's attention without padding for full rows, against exact numbers, against padding in the graph, and in Unsloth."""

import gc
import json
from importlib.util import find_spec

import pytest
import torch
from packings import worst
from test_attention_dense import result, search_path
from torch.nn.attention import SDPBackend, sdpa_kernel

from unsloth_ext.compiling.attention_dense import causal_attention, causal_attention_backward

pytestmark = pytest.mark.gpu

BUCKET = 128
# Kernels round the probabilities to the inputs' dtype: relative to the largest value.
BOUNDS = {torch.bfloat16: 4e-2, torch.float16: 8e-3}


@pytest.fixture(autouse=True, scope="module")
def cudnn_runs():
    probe = torch.zeros(1, 1, 128, 64, device="cuda", dtype=torch.float16)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(probe, probe, probe, is_causal=True)
    except RuntimeError as error:
        pytest.skip(f"this card or torch has no cuDNN attention: {str(error)[:80]}")


def on_card(length, dtype=torch.bfloat16, heads=32, kv_heads=8, width=128, batch=2, rows_first=True):
    def one(n):
        shape = (batch, length, n, width) if rows_first else (batch, n, length, width)
        made = torch.randn(shape, device="cuda", dtype=dtype)
        return made.transpose(1, 2) if rows_first else made

    return *(one(n).requires_grad_() for n in (heads, kv_heads, kv_heads)), one(heads)


def exact(query, key, value, upstream, scale=None):
    """The output and the gradients in fp32, one row of the batch and one key head at a time: the scores are held in full."""
    groups, rows = query.shape[1] // key.shape[1], []
    for b in range(query.shape[0]):
        heads = []
        for h in range(key.shape[1]):
            of = slice(h * groups, (h + 1) * groups)
            parts = query[b, of], key[b, h : h + 1], value[b, h : h + 1]
            q, k, v = (t.detach().float().requires_grad_() for t in parts)
            with sdpa_kernel(SDPBackend.MATH):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q[None], k.expand_as(q)[None], v.expand_as(q)[None], is_causal=True, scale=scale
                )[0]
            heads.append([out.detach(), *torch.autograd.grad(out, (q, k, v), upstream[b, of].float())])
        rows.append([torch.cat(parts) for parts in zip(*heads, strict=True)])
    return [torch.stack(parts).double() for parts in zip(*rows, strict=True)]


def ours(query, key, value, scale=None, bucket=BUCKET):
    return causal_attention(query, key, value, scale, bucket)[0]


def native(query, key, value):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def padded(query, key, value):
    """Padding by at least one row around SDPA."""
    length = query.shape[2]
    more = BUCKET - length % BUCKET
    wide = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (query, key, value))
    return native(*wide)[:, :, :length]


def same_layouts(found, inputs):
    return [t.stride() for t in found] == [torch.empty_like(t).stride() for t in (inputs[0], *inputs[:3])]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("length", [4096, 4000, 128, 1])
@pytest.mark.parametrize("rows_first", [True, False])
def test_values_gradients_and_layouts(length, dtype, rows_first):
    inputs = on_card(length, dtype, rows_first=rows_first)
    found, wanted = result(ours, *inputs), exact(*inputs)
    assert worst(found, wanted) < BOUNDS[dtype]
    assert same_layouts(found, inputs)
    assert all(t.dtype == dtype and bool(t.isfinite().all()) for t in found)
    other = result(padded, *inputs)
    assert worst(found, [t.double() for t in other]) < BOUNDS[dtype]


@pytest.mark.parametrize("length", [1024, 900])
def test_other_shapes(length):
    for heads, kv_heads, width, batch, scale in ((8, 8, 64, 1, None), (6, 1, 96, 3, 0.2), (12, 4, 40, 2, None)):
        inputs = on_card(length, torch.bfloat16, heads, kv_heads, width, batch)
        found = result(ours, *inputs, scale)
        assert worst(found, exact(*inputs, scale)) < BOUNDS[torch.bfloat16], (heads, kv_heads, width)
        assert same_layouts(found, inputs)


def test_a_multiple_is_what_sdpa_computes():
    inputs = on_card(2048)
    assert torch.equal(ours(*inputs[:3]), native(*inputs[:3]))


@pytest.mark.parametrize("length", [256, 200])
def test_layouts_that_a_model_seldom_has(length):
    fused = torch.randn(2, length, 12, 64, device="cuda", dtype=torch.bfloat16)
    parts = [t.transpose(1, 2).requires_grad_() for t in fused.split((8, 2, 2), 2)]
    upstream = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(2, 8, length, 64)
    found = result(ours, *parts, upstream)
    assert worst(found, exact(*parts, upstream)) < BOUNDS[torch.bfloat16]
    assert same_layouts(found, parts)


@pytest.mark.parametrize("length", [256, 200])
def test_the_operators(length):
    """Schema, fake kernels (shape, layout, dtype, device) and the gradient's registration."""
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for rows_first in (True, False):
        *inputs, upstream = on_card(length, heads=8, kv_heads=2, width=64, rows_first=rows_first)
        torch.library.opcheck(causal_attention, (*inputs, None, BUCKET), test_utils=checks)
        inputs = [t.detach() for t in inputs]
        kept = causal_attention(*inputs, None, BUCKET)
        torch.library.opcheck(causal_attention_backward, (upstream, *inputs, *kept, None, BUCKET), test_utils=checks)


def test_one_graph_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(query, key, value, weight):
        out = ours(query * 2, key, value).transpose(1, 2)
        return out.reshape(*out.shape[:2], -1) @ weight

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(512, 64, device="cuda", dtype=torch.bfloat16)
    for length in (300, 256, 1024, 77, 128, 900):
        *inputs, _ = on_card(length, heads=8, kv_heads=2, width=64)
        upstream = torch.randn(2, length, 64, device="cuda", dtype=torch.bfloat16)
        found = result(lambda *t: compiled(*t, weight), *inputs, upstream)
        wanted = result(lambda *t: layer(*t, weight), *inputs, upstream)
        assert worst(found, [t.double() for t in wanted]) < BOUNDS[torch.bfloat16]
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [1024, 900])
def test_in_a_cuda_graph(length):
    inputs = on_card(length, heads=8, kv_heads=2, width=64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # plans are built before anything is recorded
        for _ in range(2):
            result(ours, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = result(ours, *inputs)
    for _ in range(3):
        with torch.no_grad():
            for tensor, other in zip(inputs, on_card(length, heads=8, kv_heads=2, width=64), strict=True):
                tensor.copy_(other)
        graph.replay()
        assert worst(found, exact(*inputs)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("length", [4096, 4000])
def test_memory(length):
    """What a layer holds between forward and backward, and its peak, against padding in the graph."""

    def measured(function):
        *inputs, upstream = on_card(length)
        weight = torch.randn(4096, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = function(*inputs).transpose(1, 2).reshape(2, length, -1)
        product = out @ weight  # keeps `out` for the weight's gradient, as an adapter of the output projection does
        del out
        held = torch.cuda.memory_allocated() - before
        torch.autograd.grad(product, (*inputs, weight), torch.randn_like(product))
        return held, torch.cuda.max_memory_allocated() - before

    measured(ours), measured(padded)  # cuDNN's and cuBLAS's workspaces
    (held, peak), (held_padded, peak_padded) = measured(ours), measured(padded)
    output = 2 * length * 32 * 128 * 2
    assert held < held_padded - output  # a second copy of the output, and of query, key and value
    # One layer alone: padding again in the backward shows in the peak, what is held shows in all layers.
    assert peak < peak_padded * (1.3 if length % BUCKET else 1)


SCRIPT = """
import json, torch
import compile_on_card as card
import unsloth_ext
from unsloth.utils import attention_dispatch as dispatch

torch.backends.cuda.enable_flash_sdp(False)  # torch's order of preference differs from release to release
torch.backends.cuda.enable_mem_efficient_sdp(False)
dispatch.HAS_FLASH_ATTENTION = dispatch.HAS_XFORMERS = False
card.checkpoint()
torch.manual_seed(3)
made = [{"input_ids": ids, "labels": ids} for ids in (torch.randint(4, 2048, (2, n)).cuda() for n in (256, 300, 512, 130))]
model = card.load("unsloth", False)
probe = torch.zeros(2, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
found = {
    "state": {s.id: s.state for s in unsloth_ext.status()}["compiling.unpadded_attention"],
    "cuDNN": dispatch._cudnn_length_bucket_applies(probe, probe, probe, is_causal=True),
}


def run():
    return card.step(model, made)


def operators():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(e.count for e in profile.key_averages() if e.key == "unsloth_ext::causal_attention")


eager = run()
found["operators, eager"] = operators()
compiled = card.compile_model(model, "step")
step = run()
found["operators, compiled"] = operators()
found["compiled"] = card.differences(step, eager)
report = compiled.report()
found["graphs"], found["breaks"] = report.graphs, report.breaks
compiled.restore()
unsloth_ext.disable("compiling.unpadded_attention")
found["Unsloth's own"] = card.differences(eager, run())
found["operators, off"] = operators()
print("FOUND" + json.dumps(found))
"""


@pytest.mark.skipif(any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes")), reason="make setup")
def test_in_unsloth(python):
    process = python(SCRIPT, path=search_path(), UNSLOTH_EXT_UNPADDED_ATTENTION="1")
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    assert found["state"] == "applied" and found["cuDNN"], found
    layers = 2
    # Of the four lengths two are multiples; Unsloth's own compiled layers know the length only in their first graph.
    assert 2 * layers <= found["operators, eager"] <= 4 * layers, found
    assert found["operators, compiled"] == 4 * layers and found["operators, off"] == 0, found
    assert found["graphs"] <= 2 and found["breaks"] == 0, found
    for loss, gradients in (found["compiled"], found["Unsloth's own"]):
        assert loss < 0.05 and gradients < 0.05, found
