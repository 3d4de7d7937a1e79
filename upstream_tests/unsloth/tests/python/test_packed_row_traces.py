"""torch.compile of a model takes a packed row: one graph for all packings, documents kept apart, no length read, no cache written."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
import functools  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as sdpa  # noqa: E402
from transformers import LlamaConfig  # noqa: E402
from unsloth.models import llama  # noqa: E402
from unsloth.utils import attention_dispatch as dispatch, packing  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 8
ROOM = dict(dtype = torch.float64)


class Attention(torch.nn.Module):
    """What the families' attention does of a packed row, from the projections to the heads."""

    rotary_emb = None

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.qkv = torch.nn.Linear(16, (HEADS + 2 * KV_HEADS) * DIM, bias = False, **ROOM)
        self.out = torch.nn.Linear(HEADS * DIM, 16, bias = False, **ROOM)

    def forward(self, x, **kwargs):
        rows = self.qkv(x).unflatten(-1, (-1, DIM)).transpose(1, 2)
        Q, K, V = rows.split((HEADS, KV_HEADS, KV_HEADS), 1)
        config = dispatch.AttentionConfig(
            backend = self.backend, n_kv_heads = KV_HEADS, n_groups = HEADS // KV_HEADS
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


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.self_attn = Attention(backend)

    def forward(self, hidden_states, **kwargs):
        return (hidden_states + self.self_attn(hidden_states, **kwargs),)


class Model(torch.nn.Module):
    """LlamaModel_fast_forward over two such layers."""

    gradient_checkpointing = False

    def __init__(self, backend):
        super().__init__()
        self.config = LlamaConfig(
            hidden_size = 16, num_attention_heads = 2, vocab_size = 32, use_cache = False
        )
        self.config.dtype = torch.float64
        self.embed_tokens = torch.nn.Embedding(32, 16, **ROOM)
        self.layers = torch.nn.ModuleList(Layer(backend) for _ in range(2))
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


@pytest.fixture
def model(monkeypatch, request):
    monkeypatch.setattr(
        llama, "fast_rms_layernorm", lambda norm, x, **_: norm(x)
    )  # a Triton kernel, and no part of this
    monkeypatch.setattr(dispatch, "_torch_varlen_takes", lambda *args: True)
    monkeypatch.setattr(dispatch, "_varlen_attn_call", varlen)
    monkeypatch.setattr(dispatch, "_sdpa_backend_state", lambda *args: (True, 1))
    monkeypatch.setattr(dispatch, "flash_attn_varlen_func", flash_varlen, raising = False)
    monkeypatch.setattr(dispatch, "_TORCH_VARLEN_ATTN", varlen)
    monkeypatch.setattr(dispatch, "HAS_FLASH_ATTENTION", request.param == dispatch.FLASH_VARLEN)
    torch._dynamo.reset()
    packing.clear_packed_caches()
    yield Model(request.param).train()
    torch._dynamo.reset()
    packing.clear_packed_caches()


backends = pytest.mark.parametrize("model", [dispatch.SDPA, dispatch.FLASH_VARLEN], indirect = True)


def packed(left_over):
    lengths = [random.randint(2, 12) for _ in range(random.randint(2, 7))]
    total = sum(lengths) + left_over
    ids = torch.randint(0, 32, (1, total))
    positions = torch.cat([torch.arange(n) for n in (*lengths, left_over)])[None]
    documents = [*lengths, left_over] if left_over else lengths
    return ids, positions, torch.tensor(lengths, dtype = torch.int32), documents


def check(model, run, ids, positions, lengths, documents):
    found = run(ids, position_ids = positions, packed_seq_lengths = lengths)
    wanted = model.by_document(ids, documents)
    torch.testing.assert_close(found, wanted)
    upstream, parameters = torch.randn_like(wanted), list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found, parameters, upstream),
        torch.autograd.grad(wanted, parameters, upstream),
    ):
        torch.testing.assert_close(one, other)


def compiled(model):
    """The model compiled by dynamo and no further, and the graphs that are made of it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph = True, dynamic = True, backend = backend), graphs


@backends
def test_one_graph_for_all_packings(model):
    run, graphs = compiled(model)
    for number in range(12):
        given = packed(left_over = 3 * (number % 2))
        torch._dynamo.maybe_mark_dynamic(given[2], 0)
        check(model, run, *given)
    assert len(graphs) == 1
    assert not packing._PACKED_INFO_CACHE and not packing._PADDED_CU_SEQLENS_CACHE


@backends
def test_after_eager_batches_too(model):
    """A graph must not be tied to what an evaluation left in the caches."""
    run, graphs = compiled(model)
    for number in range(6):
        check(model, model, *packed(left_over = number % 3))
        given = packed(left_over = number % 3)
        torch._dynamo.maybe_mark_dynamic(given[2], 0)
        check(model, run, *given)
    assert len(graphs) == 1


@backends
def test_a_row_that_was_cut_after_packing(model):
    """Its lengths add up to more than it has; a kernel would write past its end."""
    run, graphs = compiled(model)
    ids, positions, lengths, documents = packed(left_over = 0)
    found = run(ids[:, :-1], position_ids = positions[:, :-1], packed_seq_lengths = lengths)
    documents[-1] -= 1
    torch.testing.assert_close(found, model.by_document(ids[:, :-1], documents))


@backends
@pytest.mark.parametrize("left_over", [0, 5])
def test_eager_is_as_before(model, left_over):
    ids, positions, lengths, documents = packed(left_over)
    check(model, model, ids, positions, lengths, documents)
    held, cu_seqlens, longest = packing.get_packed_info_from_kwargs(
        {"packed_seq_lengths": lengths}, ids.device
    )
    assert held.tolist() == lengths.tolist() and longest == max(lengths.tolist())
    assert cu_seqlens.tolist() == [0, *torch.cumsum(lengths, 0).tolist()]
    covered, longest = packing.cover_padded_cu_seqlens((held, cu_seqlens, longest), ids.shape[1])
    assert covered[-1] == ids.shape[1] and longest == max(documents)


@pytest.mark.skipif(not torch.cuda.is_available(), reason = "needs a CUDA card")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_s_kernel_compiled(dtype):
    if dispatch._TORCH_VARLEN_ATTN is None:
        pytest.skip("needs CUDA and torch 2.12 or newer, which has varlen_attn with grouped heads")
    heads, kv_heads, dim, documents = 8, 2, 64, [300, 7, 129, 64]
    total = sum(documents)
    rows = [
        torch.randn(1, n, total, dim, device = "cuda", dtype = dtype, requires_grad = True)
        for n in (heads, kv_heads, kv_heads)
    ]
    config = dispatch.AttentionConfig(
        backend = dispatch.SDPA, n_kv_heads = kv_heads, n_groups = heads // kv_heads
    )

    @functools.partial(torch.compile, fullgraph = True, dynamic = True)
    def attention(Q, K, V, lengths):
        info = packing.get_packed_info_from_kwargs({"packed_seq_lengths": lengths}, Q.device)
        context = dispatch.AttentionContext(
            bsz = 1,
            q_len = Q.shape[2],
            kv_seq_len = Q.shape[2],
            n_heads = heads,
            head_dim = dim,
            requires_grad = True,
            seq_info = info,
            attention_mask = None,
            causal_mask = None,
            sliding_window = None,
            training = True,
        )
        return dispatch._run_attention(config = config, context = context, Q = Q, K = K, V = V)

    found = attention(*rows, torch.tensor(documents, dtype = torch.int32))
    exact = [t.detach().double().requires_grad_() for t in rows]
    parts = zip(*(t.split(documents, 2) for t in exact))
    wanted = torch.cat([sdpa(*p, is_causal = True, enable_gqa = True) for p in parts], 2)
    wanted = wanted.transpose(1, 2)
    tolerance = dict(atol = 2e-2, rtol = 2e-2)
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, rows, upstream),
        torch.autograd.grad(wanted, exact, upstream.double()),
    ):
        torch.testing.assert_close(one.double(), other, **tolerance)
