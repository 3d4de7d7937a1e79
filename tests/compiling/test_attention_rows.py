"""Attention of rows by FlashAttention 4: when it is taken, in graphs of our own, of Unsloth's dispatch and of transformers. Values: test_attention_gpu.py."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_ext.compiling import attention, attention_flash4, attention_patch, attention_rows
from unsloth_ext.compiling.as_traced import like_compiled
from unsloth_ext.compiling.attention_rows import LEAST, refusal, row_attention
from unsloth_ext.compiling.measured_cards import are_measured
from unsloth_ext.compiling.packed_transformers import _attention
from unsloth_ext.patching import NotHere

FLASH4 = "unsloth_ext.flash4_attention"


@pytest.fixture
def installed(monkeypatch):
    """flash-attn-4 as if it were there, for tensors that pretend to be on a card."""
    monkeypatch.setattr(attention_rows, "ON", True)
    monkeypatch.setattr(attention_rows, "find_spec", lambda name: name == "flash_attn.cute" or None)
    monkeypatch.setattr(attention_flash4, "another_card", lambda index: "")
    monkeypatch.setattr(
        attention_flash4, "lacking", lambda index, packed=True, *kind: "" if not packed else "asked of documents"
    )
    torch._dynamo.reset()


def rows(batch, tokens, dtype=torch.bfloat16, width=64):
    return [torch.empty(batch, tokens, heads, width, dtype=dtype, device="cuda") for heads in (8, 2, 2)]


def traced(function, *batches):
    """The names of the operators in each graph."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(function, backend=keep, fullgraph=True, dynamic=True)
    for batch in batches:
        out = compiled(*batch)
        assert out.shape == batch[0].shape and out.dtype == batch[2].dtype
    return [sum(FLASH4 in name for name in names) for names in graphs]


def chosen(query, key, value):
    return query * 2 if refusal(query, key, value) else row_attention(query, key, value, window=64)


def test_one_graph_of_any_length_on_each_side(installed):
    with FakeTensorMode():  # no batch of 2: as many as key heads would be a symbol of its own, and a graph
        assert traced(chosen, rows(4, LEAST // 4), rows(3, 3000), rows(5, LEAST), rows(6, 5001)) == [1]
        torch._dynamo.reset()
        assert traced(chosen, rows(3, LEAST), rows(4, 300), rows(7, 200), rows(5, 2000)) == [1, 0]


def test_what_is_never_taken_makes_no_graph(installed, monkeypatch):
    with FakeTensorMode():
        assert traced(chosen, rows(3, LEAST, width=80), rows(4, 300, width=80)) == [0]
        torch._dynamo.reset()
        monkeypatch.setattr(attention_flash4, "another_card", lambda index: "Blackwell")
        assert traced(chosen, rows(3, LEAST), rows(4, 300)) == [0]


def test_what_is_left_to_other_kernels(installed, monkeypatch):
    with FakeTensorMode():
        large, fp32 = rows(2, LEAST), rows(2, LEAST, torch.float32)
        assert refusal(*large) == "outside a graph each call waits for the host"
        with like_compiled():  # where a compiled layer's forward is run again uncompiled, and its bits are wanted
            assert refusal(*large) == ""
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert refusal(*large) == ""
        query, key, value = large
        for why, case in {
            "lengths or head sizes differ": (query, *rows(2, 1)[1:]),  # a cache
            "lengths or head sizes": (query, key, rows(2, LEAST, width=128)[2]),  # latent attention
            "heads do not share keys evenly": (
                query,
                *[torch.empty(2, LEAST, 3, 64, dtype=query.dtype, device="cuda")] * 2,
            ),
            "or dtypes differ": (rows(2, LEAST, torch.float16)[0], key, value),
            "fp16 or bf16, not torch.float32": fp32,
            "it was tried with head sizes of 64, 96 and 128, this is 80": rows(2, LEAST, width=80),
            f"fewer than {LEAST} tokens": rows(1, LEAST - 1),
        }.items():
            assert why in refusal(*case), why
        for where, what, value, why in (
            (attention, "PREFERRED", ("cudnn", "flash"), "other kernels are asked for"),
            (attention, "_another_flash", lambda: True, "other kernels are asked for"),
            (torch, "are_deterministic_algorithms_enabled", lambda: True, "its backward is not deterministic"),
            (attention_flash4, "lacking", lambda *which: "no Hopper", "no Hopper"),
            (attention_rows, "find_spec", lambda name: None, "flash-attn-4 is not installed"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(where, what, value)
                assert refusal(*large) == why


def test_the_kind_that_is_tried(installed, monkeypatch):
    """Heads that share a key, and a window, are other kernels."""
    kinds = []
    monkeypatch.setattr(attention_flash4, "lacking", lambda index, *kind: kinds.append(kind) or "")
    with FakeTensorMode(), like_compiled():
        query, key, _ = rows(2, LEAST)
        single = torch.empty(2, LEAST, 1, 64, dtype=key.dtype, device="cuda")
        assert refusal(query, key, key, 100) == refusal(query, single, single) == ""
    assert kinds == [(False, torch.bfloat16, 64, 4, True), (False, torch.bfloat16, 64, 8, False)]


def test_transformers_attention(installed, monkeypatch):
    """Rows without a mask go there; padded ones, dropout and short batches go where transformers' own do."""
    pytest.importorskip("transformers")
    import transformers.integrations.sdpa_attention as theirs

    # Theirs indexes, for which a torch without CUDA has no guard.
    monkeypatch.setattr(
        theirs, "sdpa_attention_forward", lambda _, query, *rest, **more: (query.transpose(1, 2) * 2, None)
    )
    module = SimpleNamespace(is_causal=True, training=True)

    def attend(query, key, value, **more):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return _attention("auto")(module, query, key, value, more.pop("mask", None), scaling=0.3, **more)[0]

    with FakeTensorMode():
        large, mask = rows(2, LEAST // 2), torch.ones(2, 1, LEAST // 2, LEAST // 2, dtype=torch.bool, device="cuda")
        assert traced(attend, large) == [1]
        for more in ({"mask": mask}, {"is_causal": False}, {"dropout": 0.1}):
            torch._dynamo.reset()
            assert traced(lambda *t, more=more: attend(*t, **more), large) == [0], more
        torch._dynamo.reset()
        assert traced(attend, rows(2, 500)) == [0]
        monkeypatch.setattr(attention_rows, "ON", False)
        torch._dynamo.reset()
        assert traced(attend, large) == [0]


@pytest.mark.skipif(are_measured(), reason="for machines without a Hopper card")
@pytest.mark.parametrize("said", [None, "1"])
def test_other_cards_are_left_as_they_are(said, monkeypatch):
    """Asked for or not: it is not taken there, and its guards would be for nothing."""
    monkeypatch.delenv("UNSLOTH_EXT_ROW_ATTENTION", raising=False)
    if said:
        monkeypatch.setenv("UNSLOTH_EXT_ROW_ATTENTION", said)
    with pytest.raises(NotHere, match="Hopper alone"):
        attention_patch._rows(SimpleNamespace(), None)


SCRIPT = """
import compile_fake_card as card
import json, torch, types, unsloth_ext
from unsloth.utils import attention_dispatch as dispatch
from unsloth_ext.compiling import attention_flash4, attention_rows

attention_flash4.lacking, attention_rows.find_spec = lambda *which: "", lambda name: True
attention_flash4.another_card = lambda index: ""
found = {"state": {s.id: [s.state, s.reason] for s in unsloth_ext.status()}["compiling.row_attention"]}
graphs = []


def backend(graph, inputs):
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and "flash4" in str(n.target)]
    given = lambda value: float(value.meta["example_value"]) if isinstance(value, torch.fx.Node) else value
    graphs.append([[str(n.target), *map(given, n.args[-2:])] for n in calls])  # scale and window
    return graph.forward


def layer(Q, K, V, mask=None, window=None, sdpa=None, backend=None, causal=True, xformers=None, causal_mask=None):
    config = dispatch.AttentionConfig(
        backend=backend or dispatch.SDPA, n_kv_heads=2, n_groups=2, sdpa_kwargs=sdpa, xformers_kwargs=xformers
    )
    total = Q.shape[2]
    context = dispatch.AttentionContext(
        bsz=Q.shape[0], q_len=total, kv_seq_len=total, requires_grad=True, seq_info=None, attention_mask=mask,
        causal_mask=causal_mask, n_heads=4, head_dim=64, training=True, sliding_window=window, is_causal=causal,
    )
    return dispatch.run_attention(config=config, context=context, Q=Q, K=K, V=V)


def traced(*lengths, **more):
    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for length in lengths:
        with card.tensors():
            rows = [torch.randn(2, length, n, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (4, 2, 2)]
        with card.MODE:
            assert compiled(*rows, **more).shape == (2, length, 4, 64)
    return list(graphs)


found["any length"] = traced(2048, 3000, 5001)
found["both sides"] = traced(2200, 100, 300, 2300)
found["window"] = traced(2100, window=100)
found["scale"] = traced(2100, sdpa={"scale": 0.5})
found["no dropout"] = traced(2100, sdpa={"dropout_p": 0.0})
found["xformers"] = traced(2100, backend=dispatch.XFORMERS)
dispatch.xformers_attention, asked = None, []  # not there: a call of it ends the trace
for name, more in (("its options", {"xformers": {"p": 0.1}}), ("a mask for it", {"causal_mask": torch.zeros(1)})):
    try:
        traced(2100, backend=dispatch.XFORMERS, **more)
    except Exception:
        asked.append(name)
found["left to xformers"] = asked
found["other arguments"] = traced(2100, sdpa={"is_causal": True})
found["both directions"] = traced(2100, causal=False)
with card.tensors():
    mask = torch.ones(2, 1, 2100, 2100, dtype=torch.bool)
found["mask"] = traced(2100, mask=mask)
ring = types.SimpleNamespace(backend="ring")
manager, dispatch.get_cp_manager = dispatch.get_cp_manager, lambda: ring
found["parts of rows"] = traced(2100)
dispatch.get_cp_manager = manager
unsloth_ext.disable("compiling.row_attention")
found["off"] = traced(2100)
print("FOUND" + json.dumps(found))
"""


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("unsloth", "peft", "bitsandbytes", "triton")), reason="make setup"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="traces for a card that is not there")
def test_unsloth_s_dispatch(python):
    path = Path(__file__).parent, Path(__file__).parents[2]
    process = python(SCRIPT, path=path, UNSLOTH_ALLOW_CPU="1")
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    assert found.pop("state") == ["applied", ""]

    def taken(scale=0.125, window=None):
        return [["unsloth_ext.flash4_attention.default", scale, window]]

    left = [[]]
    assert found.pop("both sides") == [taken(), []]
    assert found.pop("left to xformers") == ["its options", "a mask for it"]
    for name, wanted in (
        ("any length", taken()),
        ("window", taken(window=100)),
        ("scale", taken(0.5)),
        ("no dropout", taken()),
        ("xformers", taken()),
    ):
        assert found.pop(name) == [wanted], name
    assert len(found) == 5 and all(graphs == left for graphs in found.values()), found
