"""Unsloth's own functions with the packed patches in: what a layer is told, what it computes, and that packings make no graphs.

In a process of its own, because importing Unsloth changes torch and transformers for good.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("unsloth") is None, reason="unsloth is not installed")

SCRIPT = """
import json, random, sys, types
import unsloth_ext
import unsloth
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from unsloth.models import llama
from unsloth.utils import attention_dispatch as dispatch, packing
from unsloth_ext.compiling import packed_patch
from unsloth_ext.compiling.attention_reference import reference_attention

found = {s.id: [s.state, s.reason] for s in unsloth_ext.status() if s.id.startswith(("compiling.packed", "compiling.flex"))}
SIZES = dict(n_heads=4, head_dim=16)
torch._dynamo.config.specialize_float = True  # else a graph is begun again where a float is a symbol, and counted twice


def attend(Q, K, V, info, window=None):
    config = dispatch.AttentionConfig(backend=dispatch.SDPA, n_kv_heads=2, n_groups=2)
    total = Q.shape[2]
    context = dispatch.AttentionContext(
        bsz=1, q_len=total, kv_seq_len=total, requires_grad=True, seq_info=info, attention_mask=None, causal_mask=None,
        sliding_window=window, **SIZES,
    )
    return llama.run_attention(config=config, context=context, Q=Q, K=K, V=V)


class Layer(torch.nn.Module):  # an attention layer, from the projections on
    def forward(self, Q, K, V, **kwargs):
        return attend(Q, K, V, llama.get_packed_info_from_kwargs(kwargs, Q.device), window=7)


class Model(torch.nn.Module):  # what LlamaModel_fast_forward is wrapped around
    config = types.SimpleNamespace(model_type="llama")

    def __init__(self):
        super().__init__()
        self.layer = Layer()

    def inner(self, input_ids=None, causal_mask=None, attention_mask=None, position_ids=None, past_key_values=None,
              inputs_embeds=None, *args, **kwargs):
        self.seen = kwargs
        rows = kwargs.pop("rows")
        return self.layer(*rows, **kwargs)


def batch(rest=0):
    lengths = [random.randint(2, 12) for _ in range(random.randint(1, 6))]
    total = sum(lengths) + rest
    rows = [torch.randn(1, heads, total, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()] + ([total] if rest else []), dtype=torch.int32)
    wanted = reference_attention(*(t[0].transpose(0, 1) for t in rows), cu, window=7)
    return rows, dict(input_ids=torch.zeros(1, total, dtype=torch.int64), rows=rows,
                      packed_seq_lengths=torch.tensor(lengths, dtype=torch.int32)), wanted


def difference(out, wanted, rows):
    upstream = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(out, rows, upstream[None]), torch.autograd.grad(wanted, rows, upstream))
    return max((out[0] - wanted).abs().max().item(), *((a - b).abs().max().item() for a, b in pairs))


forward = packed_patch._with_boundaries(Model.inner, (*packed_patch._FAMILIES, *packed_patch._ASKED_FOR))
worst = {"eager": 0.0, "layers compiled": 0.0, "model compiled": 0.0}
model = Model().train()
for rest in (0, 3):
    rows, given, wanted = batch(rest)
    if rest:  # as transformers' collator says it, in int64
        lengths = given.pop("packed_seq_lengths")
        given |= {"cu_seq_lens_q": torch.tensor([[0, *lengths.cumsum(0).tolist()]]), "max_length_q": int(lengths.max())}
    worst["eager"] = max(worst["eager"], difference(forward(model, **given), wanted, rows))
found["lengths under their old name"] = model.seen["packed_seq_lengths"]
found["still a key"] = "packed_seq_lengths" in model.seen

plain_layer = model.layer
for name in ("layers compiled", "model compiled"):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model().train()
    run = lambda **given: forward(model, **given)
    if name == "layers compiled":  # as Unsloth's block compile does: dynamic=None
        model.layer = torch.compile(plain_layer, backend=counter, fullgraph=True)
    else:
        run = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for i in range(64):
        rows, given, wanted = batch(3 * (i % 2))
        if i % 8 == 0:
            worst[name] = max(worst[name], difference(run(**given), wanted, rows))
        else:
            run(**given)
    found[name] = counter.frame_count
found["worst"] = worst

lengths = torch.tensor([4, 3], dtype=torch.int32)
one = packing.get_packed_info_from_kwargs({"packed_seq_lengths": lengths}, torch.device("cpu"))
found["without boundaries as before"] = [one[0].tolist(), one[1].tolist(), one[2]]
try:
    forward(model, input_ids=torch.zeros(1, 5, dtype=torch.int64), packed_seq_lengths=lengths)
except ValueError as error:
    found["a cut batch"] = str(error)
found["only its own"] = packing.get_packed_info_from_kwargs(
    {"packed_seq_lengths": lengths, "cu_seq_lens_q": torch.tensor([0, 5]), "max_length_q": 5}, torch.device("cpu")
)[1].tolist()
info = packing.get_packed_info_from_kwargs
staged = torch.tensor([4, 3, 0, 4, 7], dtype=torch.int32)  # as on a card: one copy for the lengths and the boundaries
packing.get_packed_info_from_kwargs = lambda kwargs, device: (staged[:2], staged[2:], 4)
made = packed_patch._found(lengths, 7, torch.device("cpu"))
packing.get_packed_info_from_kwargs = info
found["boundaries in a copy of both"] = [made.cu_seqlens.tolist(), made.cu_seqlens.storage_offset()]
found["left as they are"] = {}


def is_left(name, forward=forward):
    rows, given, wanted = batch()
    model = Model().train()
    forward(model, **given)
    found["left as they are"][name] = model.seen["packed_seq_lengths"] is given["packed_seq_lengths"]


is_left("now")
Model.config.model_type = "falcon_h1"
is_left("another family")
Model.config = types.SimpleNamespace(model_type="granite", attention_dropout=0.1)
is_left("dropout")
Model.config.attention_dropout = 0.0
is_left("no dropout")
for name in ("metadata", "attention", "layers"):  # without one of them layers read lengths, or they would see one document
    unsloth_ext.disable("compiling.packed_" + name)
    is_left(name)
    unsloth_ext.enable("compiling.packed_" + name)
is_left("all again")
print("FOUND" + json.dumps(found))
"""


def test_unsloth_s_functions(python):
    process = python(SCRIPT, UNSLOTH_ALLOW_CPU="1", UNSLOTH_EXT_PACKED="1")
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    for name in ("packed_metadata", "packed_attention", "packed_layers", "flex_softcap"):
        assert found[f"compiling.{name}"] == ["applied", ""], name
    assert all(value < 1e-10 for value in found["worst"].values()), found["worst"]
    assert found["layers compiled"] <= 4
    assert found["model compiled"] <= 4
    assert found["lengths under their old name"] is None
    assert found["still a key"]
    assert found["without boundaries as before"] == [[4, 3], [0, 4, 7], 4]
    assert found["only its own"] == [0, 4, 7]
    assert found["boundaries in a copy of both"] == [[0, 4, 7], 0]
    left = found["left as they are"]
    assert {name for name in left if not left[name]} == {"now", "no dropout", "all again"}, left
    assert "sum to 7, more than the row's 5 tokens" in found["a cut batch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a card that is not there")
@pytest.mark.parametrize("said, state", [("", "applied"), ("0", "disabled")])
def test_on_by_itself_where_it_was_measured(python, said, state):
    script = "import compile_fake_card, json, unsloth_ext\nprint('FOUND' + json.dumps({s.id: s.state for s in unsloth_ext.status()}))"
    process = python(script, path=(Path(__file__).parent, Path(__file__).parents[2]), UNSLOTH_EXT_PACKED=said)
    found = json.loads(process.stdout.rpartition("FOUND")[2])
    assert {found[f"compiling.packed_{name}"] for name in ("metadata", "attention", "layers")} == {state}
    assert found["compiling.flex_softcap"] == "disabled" and found["compiling.row_attention"] == "applied"
