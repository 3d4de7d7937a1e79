"""Block compile takes the layers of a packed row: a few graphs for all packings, documents kept apart, no length read in a graph."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import functools  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from unsloth.models import _block_compile, llama  # noqa: E402
from unsloth.utils import attention_dispatch as dispatch, packing  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 8
ROOM = dict(dtype = torch.float64)


class Attention(torch.nn.Module):
    """What the families' attention does of a packed row, from the projections to the heads."""

    rotary_emb = None

    def __init__(self, config):
        super().__init__()
        self.config, self.head_dim = config, DIM
        self.qkv = torch.nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM, bias = False, **ROOM)
        self.out = torch.nn.Linear(HEADS * DIM, 16, bias = False, **ROOM)

    def forward(self, x, **kwargs):
        rows = self.qkv(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        Q, K, V = rows.split((HEADS, KV_HEADS, KV_HEADS), 1)
        config = dispatch.AttentionConfig(
            backend = dispatch.select_attention_backend(use_varlen = True),
            n_kv_heads = KV_HEADS,
            n_groups = HEADS // KV_HEADS,
        )
        context = dispatch.AttentionContext(
            bsz = x.shape[0],
            q_len = x.shape[1],
            kv_seq_len = x.shape[1],
            n_heads = HEADS,
            head_dim = DIM,
            requires_grad = True,
            seq_info = llama.get_packed_info_from_kwargs(kwargs, x.device),
            attention_mask = None,
            causal_mask = None,
            sliding_window = None,
            training = True,
        )
        out = llama.run_attention(config = config, context = context, Q = Q, K = K, V = V)
        return self.out(out.flatten(2))

    def by_document(self, x, lengths):
        outs = []
        for part in x.split(lengths, 1):
            rows = self.qkv(part).unflatten(-1, (-1, DIM)).transpose(1, 2)
            Q, K, V = rows.split((HEADS, KV_HEADS, KV_HEADS), 1)
            out = sdpa(Q, K, V, is_causal = True, enable_gqa = True)
            outs.append(self.out(out.transpose(1, 2).flatten(2)))
        return torch.cat(outs, 1)


def make_layer_class():
    class DecoderLayer(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.self_attn = Attention(config)

        def forward(self, hidden_states, *args, **kwargs):
            return (hidden_states + self.self_attn(hidden_states, **kwargs),)

    DecoderLayer.forward.__module__ = "unsloth.models.llama"
    _block_compile._wrap(DecoderLayer, dict(_block_compile._COMPILE_OPTIONS))
    return DecoderLayer


class Model(torch.nn.Module):
    """LlamaModel_fast_forward over two layers that block compile has wrapped."""

    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(
            hidden_size = HEADS * DIM,
            num_attention_heads = HEADS,
            num_key_value_heads = KV_HEADS,
            vocab_size = 32,
            use_cache = False,
        )
        self.config.dtype = torch.float64
        layer = make_layer_class()
        self.embed_tokens = torch.nn.Embedding(32, 16, **ROOM)
        self.layers = torch.nn.ModuleList(layer(self.config) for _ in range(2))
        self.norm = torch.nn.Identity()

    def forward(self, input_ids, **kwargs):
        return llama.LlamaModel_fast_forward(self, input_ids, return_dict = False, **kwargs)[0]

    def by_document(self, input_ids, lengths):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + layer.self_attn.by_document(x, lengths)
        return x


def varlen(
    Q,
    K,
    V,
    cu_seqlens,
    max_seqlen,
    *,
    scale = None,
    **options,
):
    """[T, heads, D] with boundaries, as the varlen kernels take them, on any device and in any dtype.
    What a kernel would leave unwritten, or spoil, is NaN: rows past the last boundary or past the bound of a segment."""
    ends = cu_seqlens[1:].contiguous()
    place = torch.arange(Q.shape[0], device = Q.device)
    document = torch.searchsorted(ends, place.to(ends.dtype), right = True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    start = cu_seqlens[document.clamp(max = cu_seqlens.shape[0] - 1)]
    written = (place - start < max_seqlen) & (document < ends.shape[0])
    written &= (ends <= Q.shape[0]).all()  # a kernel would go on past the row
    Q, K, V = (t.transpose(0, 1)[None] for t in (Q, K, V))
    out = sdpa(Q, K, V, attn_mask = mask, scale = scale, enable_gqa = True)[0].transpose(0, 1)
    return torch.where(written[:, None, None], out, float("nan"))


def flash_varlen(Q, K, V, cu_q, cu_k, max_q, max_k, **options):
    return varlen(Q, K, V, cu_q, max_q)


def flash_dense(Q, K, V, **options):
    Q, K, V = (t.transpose(1, 2) for t in (Q, K, V))
    return sdpa(Q, K, V, is_causal = True, enable_gqa = True).transpose(1, 2)


def dynamo(
    backend,
    function,
    real = torch.compile,
    options = None,
    **given,
):
    """torch.compile by dynamo and no further: nothing is generated for a machine."""
    return real(function, backend = backend, **given)


@pytest.fixture
def graphs(monkeypatch):
    """What block compile compiles."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(_block_compile.torch, "compile", functools.partial(dynamo, backend))
    return made


@pytest.fixture(params = ["torch", "flash_attn"])
def model(monkeypatch, graphs, request):
    monkeypatch.setattr(
        llama, "fast_rms_layernorm", lambda norm, x, **_: norm(x)
    )  # a Triton kernel, and no part of this
    monkeypatch.setattr(dispatch, "HAS_FLASH_ATTENTION", request.param == "flash_attn")
    monkeypatch.setattr(dispatch, "HAS_XFORMERS", False)
    monkeypatch.setattr(dispatch, "_torch_varlen_takes", lambda *args: True)
    monkeypatch.setattr(dispatch, "_varlen_attn_call", varlen)
    monkeypatch.setattr(dispatch, "_sdpa_backend_state", lambda *args: (True, 1))
    monkeypatch.setattr(dispatch, "flash_attn_varlen_func", flash_varlen, raising = False)
    monkeypatch.setattr(dispatch, "flash_attn_func", flash_dense, raising = False)
    monkeypatch.setattr(dispatch, "_TORCH_VARLEN_ATTN", varlen)
    monkeypatch.setattr(dispatch, "_DEVICE_BACKENDS", None)
    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising = False)
    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)
    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE_PACKED", raising = False)
    torch._dynamo.reset()
    packing.clear_packed_caches()
    yield Model().train()
    torch._dynamo.reset()
    packing.clear_packed_caches()


def packed(left_over, longest = 12):
    lengths = [random.randint(2, longest) for _ in range(random.randint(2, 7))]
    lengths[0] += lengths[0] == lengths[1]  # one length for all is one launch through SDPA
    total = sum(lengths) + left_over
    ids = torch.randint(0, 32, (1, total))
    positions = torch.cat([torch.arange(n) for n in (*lengths, left_over)])[None]
    documents = [*lengths, left_over] if left_over else lengths
    return ids, positions, torch.tensor(lengths, dtype = torch.int32), documents


def gradients(model, loss):
    """By backward(): reentrant checkpointing allows nothing else."""
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def check(model, ids, positions, lengths, documents):
    found = model(ids, position_ids = positions, packed_seq_lengths = lengths)
    wanted = model.by_document(ids, documents)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    pairs = zip(
        gradients(model, (found * upstream).sum()), gradients(model, (wanted * upstream).sum())
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


PACKED = "_unsloth_packed_block_mode"


def modes(model, kind = "_unsloth_block_mode"):
    return {layer.__dict__.get(kind) for layer in model.layers}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_few_graphs_for_all_packings(model, graphs, checkpointed):
    model.gradient_checkpointing = checkpointed
    for number in range(12):
        check(model, *packed(3 * (number % 2), longest = 12 if number < 8 else 300))
    # One, and one more when the bound of the longest document is another number; with checkpointing
    # without gradients too.
    assert 1 <= len(graphs) <= (4 if checkpointed else 2)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert _block_compile._OFF not in modes(model) | modes(model, PACKED)


def test_padded_batches_before_and_after(model, graphs):
    ids = torch.randint(0, 32, (2, 9))
    first = model(ids)
    alone = len(graphs)
    for left_over in (0, 3, 0):
        check(model, *packed(left_over))
    assert alone < len(graphs) and not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(model(ids), first)


def left_out(monkeypatch, reason):
    if reason == "documents launched one by one":
        monkeypatch.setattr(dispatch, "HAS_FLASH_ATTENTION", False)
        monkeypatch.setattr(dispatch, "_torch_varlen_takes", lambda *args: False)
    elif reason == "documents of one length":  # as one launch through SDPA
        monkeypatch.setattr(dispatch, "HAS_FLASH_ATTENTION", False)
    elif reason == "more than the backward can index":
        monkeypatch.setattr(dispatch, "_INT32_ELEMENTS", 1)
    else:
        monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE_PACKED", "0")


REASONS = [
    "documents launched one by one",
    "documents of one length",
    "more than the backward can index",
    "switched off",
]


@pytest.mark.parametrize("reason", REASONS)
def test_left_out(model, graphs, monkeypatch, reason):
    left_out(monkeypatch, reason)
    for left_over in (0, 3):
        ids, positions, lengths, documents = packed(left_over)
        if reason == "documents of one length":
            documents, lengths = [4] * 3, torch.tensor([4] * 3)
            ids, positions = torch.randint(0, 32, (1, 12)), torch.arange(4).repeat(3)[None]
        check(model, ids, positions, lengths.to(torch.int32), documents)
    assert not graphs


def without_a_compiler_for_packed_rows(model, monkeypatch):
    """The same model in layers whose compiler refuses a single row."""

    def backend(graph, inputs):
        if any(isinstance(t, torch.Tensor) and t.dim() == 3 and t.shape[0] == 1 for t in inputs):
            raise RuntimeError("no compiler for one row")
        return graph.forward

    monkeypatch.setattr(_block_compile.torch, "compile", functools.partial(dynamo, backend))
    layers, model.layers = model.layers, torch.nn.ModuleList()
    for old in layers:
        model.layers.append(make_layer_class()(model.config))
        model.layers[-1].load_state_dict(old.state_dict())


@pytest.mark.parametrize("padded_first", [False, True])
def test_a_compiler_that_fails_leaves_the_layer_as_it_was(model, monkeypatch, padded_first):
    ids = torch.randint(0, 32, (2, 9))
    wanted = model(ids)
    without_a_compiler_for_packed_rows(model, monkeypatch)
    if padded_first:
        torch.testing.assert_close(model(ids), wanted)
    for left_over in (3, 0):
        check(model, *packed(left_over))
    torch.testing.assert_close(model(ids), wanted)


@pytest.mark.parametrize("padded_first", [False, True])
def test_a_failure_with_packed_rows_is_theirs_alone(model, monkeypatch, padded_first):
    without_a_compiler_for_packed_rows(model, monkeypatch)
    ids = torch.randint(0, 32, (2, 9))
    if padded_first:
        model(ids)
    check(model, *packed(left_over = 3))
    model(ids)
    assert modes(model, PACKED) == {_block_compile._OFF}
    assert _block_compile._OFF not in modes(model)


def test_evaluation_is_the_plain_forward(model, graphs):
    model.eval()
    check(model, *packed(left_over = 0))
    assert not graphs


def test_boundaries_begin_their_storage(monkeypatch):
    """At an offset they are unaligned to Inductor, and so are the operators that read them."""
    monkeypatch.setattr(packing, "_pinned_to_device", lambda tensor, device: tensor)
    lengths = torch.tensor([5, 3, 9], dtype = torch.int64)
    found, cu_seqlens, longest = packing.get_packed_info_from_kwargs(
        {"packed_seq_lengths": lengths}, torch.device("cuda")
    )
    assert cu_seqlens.tolist() == [0, 5, 8, 17] and found.tolist() == [5, 3, 9] and longest == 9
    assert cu_seqlens.dtype == found.dtype == torch.int32
    assert cu_seqlens.storage_offset() == 0
    packing.clear_packed_caches()
