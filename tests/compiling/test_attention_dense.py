"""Causal attention that pads a length only where it is no multiple of the bucket: values, gradients, layouts, one graph for all
lengths, and Unsloth with it. The CPU runs the same operator around formulas in plain torch."""

import json
import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packings import worst
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from unsloth_ext.compiling.attention_dense import causal_attention, causal_attention_backward

# Against the largest value, over 400 draws: 2e-15, 7e-7, 6e-3 and 7e-4 at most.
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def random_heads(length, dtype=torch.float64, heads=4, kv_heads=2, width=8, batch=2, rows_first=True):
    """query, key, value and a gradient of the output; [B, H, L, D], as a model's projections leave them or contiguous."""

    def one(n):
        if rows_first:
            return torch.randn(batch, length, n, width, dtype=torch.float64).to(dtype).transpose(1, 2)
        return torch.randn(batch, n, length, width, dtype=torch.float64).to(dtype)

    return *(one(n).requires_grad_() for n in (heads, kv_heads, kv_heads)), one(heads)


def exact(query, key, value, upstream, scale=None):
    """The output and the gradients in fp64, by torch's own attention."""
    tensors = [t.detach().double().requires_grad_() for t in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    wide = tensors[0], *(t.repeat_interleave(groups, 1) for t in tensors[1:])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True, scale=scale)
    return out, *torch.autograd.grad(out, tensors, upstream.double())


def result(function, query, key, value, upstream, *args):
    out = function(query, key, value, *args)
    return out, *torch.autograd.grad(out, (query, key, value), upstream)


def search_path():
    """For a process of its own: what is here, and what this process has been told."""
    told = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [*filter(None, told), Path(__file__).parent, Path(__file__).parents[2]]


def ours(query, key, value, scale=None, bucket=8):
    return causal_attention(query, key, value, scale, bucket)[0]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("multiple", [True, False])
def test_values_gradients_and_layouts(dtype, multiple):
    for _ in range(5):
        bucket = random.randint(2, 9)
        length = bucket * random.randint(1, 5) - (0 if multiple else random.randint(1, bucket - 1))
        kv_heads = random.randint(1, 3)
        heads, width, batch = kv_heads * random.randint(1, 3), random.choice((4, 8, 24)), random.randint(1, 3)
        inputs = random_heads(length, dtype, heads, kv_heads, width, batch, rows_first=random.random() < 0.7)
        scale = random.choice((None, 0.3))
        found = result(ours, *inputs, scale, bucket)
        assert worst(found, exact(*inputs, scale)) < BOUNDS[dtype]
        assert [t.dtype for t in found] == [dtype] * 4
        assert [t.stride() for t in found] == [torch.empty_like(t).stride() for t in (inputs[0], *inputs[:3])]


@pytest.mark.parametrize("length", [16, 13])
def test_layouts_that_a_model_seldom_has(length):
    """Parts of one fused projection, elements that are not side by side, and the gradient of a sum."""
    fused = torch.randn(2, length, 8, 8, dtype=torch.float64)
    parts = [t.transpose(1, 2).requires_grad_() for t in fused.split((4, 2, 2), 2)]
    spread = [t.detach().mT.contiguous().mT.requires_grad_() for t in parts]
    upstream = torch.ones((), dtype=torch.float64).expand(2, 4, length, 8)
    for inputs in (parts, spread):
        found = result(ours, *inputs, upstream)
        assert worst(found, exact(*inputs, upstream)) < BOUNDS[torch.float64]
        assert found[0].stride(3) == 1
        storages = {t.untyped_storage().data_ptr() for t in (*inputs, *found)}
        assert len(storages) == len(found) + len({t.untyped_storage().data_ptr() for t in inputs})


@pytest.mark.parametrize("length", [16, 13, 1])
def test_the_operator(length):
    """Schema, fake kernel, registration of the gradient, and tracing with symbolic shapes; nothing returned is a view of another."""
    inputs = (*random_heads(length, torch.float32, rows_first=random.random() < 0.5)[:3], random.choice((None, 0.5)), 8)
    torch.library.opcheck(causal_attention, inputs)
    detached = [t.detach() for t in inputs[:3]]
    out, logsumexp = causal_attention(*detached, *inputs[3:])
    assert logsumexp.shape == (2, 4, -(-length // 8) * 8, 1)
    torch.library.opcheck(causal_attention_backward, (torch.randn_like(out), *detached, out, logsumexp, *inputs[3:]))


def test_one_graph_for_all_lengths():
    """Full rows, others and single tokens of more, through Inductor, which checks every layout that the fake kernels promised."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(query, key, value, weight):
        out = ours(query * 2, key, value).transpose(1, 2)
        return out.reshape(*out.shape[:2], -1) @ weight

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    weight = torch.randn(32, 8)
    for length in (11, 16, 8, *random.sample(range(2, 60), 4), 40):
        *inputs, _ = random_heads(length, torch.float32)
        upstream = torch.randn(2, length, 8)
        found = compiled(*inputs, weight), *torch.autograd.grad(compiled(*inputs, weight), inputs, upstream)
        wanted = layer(*inputs, weight), *torch.autograd.grad(layer(*inputs, weight), inputs, upstream)
        assert worst(found, wanted) < 1e-4
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_what_needs_no_gradient_and_what_is_checkpointed():
    inputs = random_heads(random.randint(9, 30))
    wanted = exact(*inputs)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert worst([ours(*inputs[:3])], wanted[:1]) < BOUNDS[torch.float64]
    query, key, value, upstream = inputs
    (grad,) = torch.autograd.grad(ours(query.detach(), key, value.detach()), key, upstream)
    assert worst([grad], wanted[2:3]) < BOUNDS[torch.float64]
    for reentrant in (True, False):
        again = [t.detach().requires_grad_() for t in (query, key, value)]
        out = checkpoint(ours, *again, use_reentrant=reentrant)
        out.backward(upstream)
        assert worst([out, *(t.grad for t in again)], wanted) < BOUNDS[torch.float64]


def test_its_work_is_counted():
    """As torch counts its own; a memory budget of torch.compile asks for it before it computes an operator again."""
    inputs = random_heads(24, torch.float32, heads=4, kv_heads=4)
    counts = []
    for function in (ours, lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)):
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            result(function, *inputs)
        counts.append(counter.get_flop_counts()["Global"])
    own, others = counts
    assert sum(own.values()) == sum(others.values()) * 7 // 6  # the backward multiplies query and key once more


@pytest.mark.parametrize("length", [48, 50])
def test_the_levels_of_a_memory_budget(length, monkeypatch):
    """Its output is saved once, in one layout, and every level still brings back the same bits."""
    pytest.importorskip("peft")
    from memory_models import assert_equal, hold, model_of, tokens_of, trained
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from unsloth_ext.compiling import recompute
    from unsloth_ext.compiling.memory_controller import memory_budget

    def bucketed(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return ours(query, key, value, scaling, 16).transpose(1, 2).contiguous(), None

    monkeypatch.setattr(recompute, "SMALL", 1024)
    monkeypatch.setitem(AttentionInterface._global_mapping, "bucketed", bucketed)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "bucketed", lambda *args, **kwargs: None)
    model, tokens = model_of(attn_implementation="bucketed"), tokens_of(length=length)
    expected = trained(model, tokens)
    budget = memory_budget(model, "64GiB")
    for level in recompute.LEVELS:
        hold(budget, level)
        assert_equal(trained(model, tokens), expected)
    assert any(script.products for script in budget.scripts.values())
    assert not any(script.copies for script in budget.scripts.values())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v: (q[0], k, v, None, 8), r"query must be \[B, H, L, D\]"),
        (lambda q, k, v: (q, k, v[:, :1], None, 8), r"key and value \[B, H_kv, L, D\]"),
        (lambda q, k, v: (q[:, :3], k, v, None, 8), "H a multiple of H_kv"),
        (lambda q, k, v: (q[:, :, 1:], k, v, None, 8), "the same B, L and D"),
        (lambda q, k, v: (q, k.float(), v, None, 8), "one dtype.*cast them before"),
        (lambda q, k, v: (q, k, v, None, 0), "bucket must be at least 1.*got 0"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(*change(*(t.detach() for t in random_heads(11)[:3])))


SCRIPT = """
import compile_fake_card as card
import json, random, torch, unsloth_ext
from unsloth.utils import attention_dispatch as dispatch
from unsloth_ext.compiling import attention_dense as dense

found = {"state": {s.id: s.state for s in unsloth_ext.status()}["compiling.unpadded_attention"]}
dispatch._sdpa_choice = lambda *args: dispatch._CUDNN_CHOICE  # as a Hopper card answers
dispatch._sdpa_gqa_choices = lambda *args, **kwargs: (dispatch._CUDNN_CHOICE, dispatch._CUDNN_CHOICE)
graphs = []


def backend(graph, inputs):
    graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
    return graph.forward


def layer(Q, K, V):
    config = dispatch.AttentionConfig(backend=dispatch.SDPA, n_kv_heads=2, n_groups=2)
    total = Q.shape[2]
    context = dispatch.AttentionContext(
        bsz=Q.shape[0], q_len=total, kv_seq_len=total, requires_grad=True, seq_info=None, attention_mask=None,
        causal_mask=None, n_heads=4, head_dim=16, training=True,
    )
    return dispatch.run_attention(config=config, context=context, Q=Q, K=K, V=V)


def heads(length, dtype=torch.bfloat16, batch=2):
    return [torch.randn(batch, length, n, 16, dtype=dtype).transpose(1, 2) for n in (4, 2, 2)]


def traced(autocast=False):
    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for length in (130, 256, 512, 128, *random.sample(range(2, 700), 4)):
        with card.tensors():
            inputs = heads(length)
        with card.MODE, torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = compiled(*inputs)
        assert out.shape == (2, length, 4, 16)
        copies = not out.is_contiguous()  # the output projection would have to copy it
    text = " ".join(graphs[0])
    return [len(graphs), text.count("causal_attention"), text.count("pad"), copies]


found["on"], found["under autocast"] = traced(), traced(autocast=True)

# A graph of one length calls SDPA itself, as does eager.
torch._dynamo.reset()
graphs.clear()
static = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
for length in (256, 200):
    with card.tensors():
        inputs = heads(length)
    with card.MODE:
        static(*inputs)
found["static"] = [["causal_attention" in " ".join(g), "pad" in " ".join(g)] for g in graphs]

# The operator as it runs on a card: aten's kernels return what the fake kernels promise.
different = []
for length in (256, 200):
    for contiguous in (False, True):
        with card.tensors():
            q, k, v = (t.contiguous() if contiguous else t for t in heads(length))
            promised = dense.causal_attention(q, k, v, None, 128)
            made = dense.causal_attention._init_fn(q, k, v, None, 128)
            promised += dense.causal_attention_backward(promised[0], q, k, v, *promised, None, 128)
            made += dense.causal_attention_backward._init_fn(made[0], q, k, v, *made, None, 128)
        for a, b in zip(promised, made, strict=True):
            if (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
                different.append(str((a, b)))
found["other than promised"] = different

# Values, on the CPU: what is called for masks and multiples, and Unsloth's own where the operator cannot.
original, patched = dispatch._cudnn_length_bucketed_sdpa.__wrapped__, dispatch._cudnn_length_bucketed_sdpa
worst, called = {}, []
real = dispatch.scaled_dot_product_attention


def counted(*args, **kwargs):
    called.append(args[0].shape[-2])
    return real(*args, **kwargs)


dispatch.scaled_dot_product_attention = counted
for name, length, options in (
    ("multiple", 256, dict(is_causal=True, enable_gqa=True)),
    ("other", 200, dict(is_causal=True, enable_gqa=True, scale=0.4)),
    ("masked multiple", 128, dict(enable_gqa=True, attn_mask=0)),
    ("masked", 100, dict(enable_gqa=True, attn_mask=0)),
    ("no groups", 77, dict(is_causal=True)),
):
    q, k, v = (t.requires_grad_() for t in heads(length, torch.float64))
    if "enable_gqa" not in options:
        k, v = k.repeat_interleave(2, 1).detach().requires_grad_(), v.repeat_interleave(2, 1).detach().requires_grad_()
    if "attn_mask" in options:
        options["attn_mask"] = torch.rand(2, 1, length, length) < 0.5
        options["attn_mask"] |= torch.eye(length, dtype=torch.bool)
    upstream, results = torch.randn_like(q), []
    called.clear()
    for function in (patched, original):
        out = function(q, k, v, **options)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    worst[name] = [max((a - b).abs().max().item() for a, b in zip(*results)), list(called)]
q, k, v = heads(50, torch.float32)
called.clear()
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert patched(q, k, v, is_causal=True, enable_gqa=True).dtype == torch.bfloat16  # as SDPA has it
worst["autocast"] = [0.0, list(called)]
called.clear()
torch.use_deterministic_algorithms(True)
patched(q, k, v, is_causal=True, enable_gqa=True)
torch.use_deterministic_algorithms(False)
worst["deterministic"] = [0.0, list(called)]
found["worst"] = worst
dispatch.scaled_dot_product_attention = real

if WHOLE:
    from unsloth_ext.compiling import compile_model

    model, report = card.model("llama", 1, False), None
    graphs.clear()
    compiled = compile_model(model, scope="step", backend=backend)
    for length in (130, 256, 512, 300, 128, 77):
        with card.tensors():
            ids = card.ids(2, length)
        with card.MODE:
            model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    text = " ".join(graphs[0])
    found["model"] = [compiled.report().graphs, compiled.report().breaks, text.count("causal_attention")]
    compiled.restore()
unsloth_ext.disable("compiling.unpadded_attention")
assert dispatch._cudnn_length_bucketed_sdpa is original
found["off"] = traced()
print("FOUND" + json.dumps(found))
"""


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes", "triton")), reason="make setup"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there: test_attention_dense_gpu.py runs on it")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_unsloth_s_functions(python, whole):
    """With the patch and without it, on CPU tensors and traced on a card that is not there."""
    process = python(
        SCRIPT.replace("WHOLE", str(whole)),
        path=search_path(),
        UNSLOTH_ALLOW_CPU="1",
        UNSLOTH_EXT_UNPADDED_ATTENTION="1",
    )
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    assert found["state"] == "applied"
    assert found["on"] == found["under autocast"] == [1, 1, 0, False]
    assert found["off"] == [1, 0, 3, True]
    assert found["static"] == [[False, False], [True, False]]
    assert found["other than promised"] == []
    difference = {name: values[0] for name, values in found["worst"].items()}
    assert max(difference.values()) < 1e-12, difference
    # The lengths that SDPA was called with: by the patched function, then by Unsloth's.
    assert {name: values[1] for name, values in found["worst"].items()} == {
        "multiple": [256, 384],
        "other": [256],
        "masked multiple": [128, 256],
        "masked": [128, 128],
        "no groups": [128],
        "autocast": [128],
        "deterministic": [128],
    }
    if whole:
        assert found["model"] == [1, 0, 1]
