"""Block compile takes the layers of a packed row: a few graphs for all packings, documents kept apart, no length read in a graph."""

import os

os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")

import unsloth  # noqa: F401, E402 (before transformers)
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
    """[T, heads, D] with boundaries, as the varlen kernels take them, on any device and in any dtype."""
    ends = cu_seqlens[1:].contiguous()
    place = torch.arange(Q.shape[0], device = Q.device)
    document = torch.searchsorted(ends, place.to(ends.dtype), right = True)
    mask = (document[:, None] == document) & (place[:, None] >= place)
    Q, K, V = (t.transpose(0, 1)[None] for t in (Q, K, V))
    out = sdpa(Q, K, V, attn_mask = mask, scale = scale, enable_gqa = True)
    return out[0].transpose(0, 1)


def flash_varlen(Q, K, V, cu_q, cu_k, max_q, max_k, **options):
    return varlen(Q, K, V, cu_q, max_q)


@pytest.fixture
def graphs(monkeypatch):
    """What block compile compiles, by dynamo and no further: nothing is generated for a machine."""
    made, real = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    def compile(
        function,
        options = None,
        **given,
    ):
        return real(function, backend = backend, **given)

    monkeypatch.setattr(_block_compile.torch, "compile", compile)
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
    monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising = False)
    monkeypatch.delenv("UNSLOTH_COMPILE_DISABLE", raising = False)
    torch._dynamo.reset()
    packing.clear_packed_caches()
    yield Model().train()
    torch._dynamo.reset()
    packing.clear_packed_caches()


def packed(left_over):
    lengths = [random.randint(1, 12) for _ in range(random.randint(2, 7))]
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


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_few_graphs_for_all_packings(model, graphs, checkpointed):
    model.gradient_checkpointing = checkpointed
    for number in range(12):
        check(model, *packed(left_over = 3 * (number % 2)))
    assert 1 <= len(graphs) <= (8 if checkpointed else 4)  # without gradients as well
    modes = [layer._unsloth_block_mode for layer in model.layers]
    assert _block_compile._OFF not in modes
    for graph in graphs:
        nodes = [str(node.target) for node in graph.graph.nodes]
        assert not any(name in nodes for name in ("item", "tolist", "aten.item.default"))


def test_documents_that_are_launched_one_by_one(model, monkeypatch):
    monkeypatch.setattr(dispatch, "_torch_varlen_takes", lambda *args: False)
    for left_over in (0, 3):
        check(model, *packed(left_over))


def test_a_compiler_that_fails_leaves_the_layer_as_it_was(model, monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(_block_compile.torch, "compile", lambda *args, **kwargs: failing)
    model.layers = torch.nn.ModuleList(make_layer_class()(model.config) for _ in range(2))
    check(model, *packed(left_over = 3))
    check(model, *packed(left_over = 0))


def test_evaluation_is_the_plain_forward(model, graphs):
    model.eval()
    check(model, *packed(left_over = 0))
    assert not graphs
