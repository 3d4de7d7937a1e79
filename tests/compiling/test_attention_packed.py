"""Packed attention on a CPU against the dense mask in fp64, as an operator, in a graph, and with input it cannot take."""

import os
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packings import boundaries, exact, random_lengths, random_row, result_and_gradients, worst
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_ext.compiling import attention, attention_cudnn, attention_exact, attention_flash4
from unsloth_ext.compiling.attention import BACKENDS, choose, packed_attention, refusal

# eps of the dtype times what a sum of some hundred products loses; the largest seen in 2000 draws is under a tenth of it
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 17], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("softcap", [None, 1.5], ids=lambda c: f"softcap{c}")
def test_values_and_gradients(dtype, window, softcap):
    lengths = random_lengths()
    heads, kv_heads = random.choice([(4, 4), (4, 2), (6, 1)])
    row = random_row(lengths, heads=heads, kv_heads=kv_heads, dtype=dtype)
    options = {"window": window, "softcap": softcap, "scale": random.choice([None, 0.3])}
    found = result_and_gradients(packed_attention, *row, boundaries(lengths), max(lengths), **options)
    assert found[0].dtype == dtype
    assert worst(found, exact(*row, boundaries(lengths), **options)) < BOUNDS[dtype]


@pytest.mark.parametrize("window", [None, 700])
def test_a_document_longer_than_one_piece(window):
    """The operator takes 512 queries at a time: sums over pieces, and keys of an earlier piece."""
    lengths = [3, 1150, 40]
    row = random_row(lengths, heads=2, kv_heads=1, width=8)
    found = result_and_gradients(packed_attention, *row, boundaries(lengths), 1150, window=window)
    assert worst(found, exact(*row, boundaries(lengths), window=window)) < 1e-11


def test_empty_documents_and_tokens_after_the_last_boundary():
    lengths = [5, 0, 7, 0]
    query, key, value, upstream = random_row([5, 7, 4])
    found = result_and_gradients(packed_attention, query, key, value, upstream, boundaries(lengths), 7)
    inside = [t[:12].detach().requires_grad_() for t in (query, key, value)]
    wanted = exact(*inside, upstream[:12], boundaries([5, 7]))
    assert worst([t[:12] for t in found], wanted) < 1e-11
    assert all(not t[12:].any() for t in found)


def test_no_token_reads_another_document():
    """Changing a document changes nothing outside it, bit for bit."""
    lengths = random_lengths(4)
    query, key, value, _ = random_row(lengths, dtype=torch.float32, grad=False)
    cu_seqlens = boundaries(lengths)
    before = packed_attention(query, key, value, cu_seqlens, max(lengths))
    start, end = cu_seqlens[1], cu_seqlens[2]
    for tensor in (query, key, value):
        tensor[start:end] = torch.randn_like(tensor[start:end])
    after = packed_attention(query, key, value, cu_seqlens, max(lengths))
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.equal(before[start:end], after[start:end])


@pytest.mark.parametrize("window, softcap", [(None, None), (5, 2.0)])
def test_opcheck(window, softcap):
    query, key, value, upstream = random_row([6, 9, 2], dtype=torch.float32)
    arguments = (query, key, value, boundaries([6, 9, 2]), 0.25, window, softcap)
    torch.library.opcheck(attention_exact.packed_attention, arguments)
    out, logsumexp = attention_exact.packed_attention(*arguments)
    saved = [t.detach() for t in (upstream, query, key, value, out, logsumexp)]
    torch.library.opcheck(attention_exact.packed_attention_backward, (*saved, *arguments[3:]))


@torch.fx.experimental._config.patch(
    use_duck_shape=False
)  # as compile_model: sizes that happen to be equal are not one
def test_one_graph_for_64_packings():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, cu, longest: packed_attention(q, k, v, cu, longest, window=9, softcap=3.0),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    for i in range(64):
        lengths = [2, *random_lengths(random.randint(1, 9), 20)]
        row = random_row(lengths)
        found = result_and_gradients(compiled, *row, boundaries(lengths), max(lengths))
        if i == 0:
            after_first = counter.frame_count  # dynamo starts a graph again where a float turns out to be a symbol
    assert worst(found, exact(*row, boundaries(lengths), window=9, softcap=3.0)) < 1e-11
    assert counter.frame_count == after_first <= 2


@pytest.mark.parametrize(
    "backend, dtype, operator",
    [
        ("flash4", torch.bfloat16, "unsloth_ext.flash4_attention"),
        ("cudnn", torch.bfloat16, "unsloth_ext.cudnn_attention"),
        ("flash", torch.bfloat16, "aten._flash_attention_forward"),
        ("efficient", torch.float32, "unsloth_ext.efficient_attention"),
    ],
)
def test_one_graph_of_the_card_s_kernels(backend, dtype, operator, monkeypatch):
    """Traced with tensors that pretend to be on a card: grouped heads, a window, any packing, one operator."""
    for room in (attention_cudnn, attention_flash4):
        monkeypatch.setattr(room, "lacking", lambda *which: "")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attention(query, key, value, cu_seqlens, longest):
        return packed_attention(query, key, value, cu_seqlens, longest, window=64, backend=backend)

    compiled = torch.compile(attention, backend=keep, fullgraph=True, dynamic=True)
    with FakeTensorMode():
        for total, documents, longest in ((300, 4, 128), (700, 9, 256), (90, 1, 128)):
            row = [torch.empty(total, heads, 64, dtype=dtype, device="cuda") for heads in (8, 2, 2)]
            out = compiled(*row, torch.empty(documents + 1, dtype=torch.int32, device="cuda"), longest)
            assert out.shape == (total, 8, 64)
            assert out.device.type == "cuda"
    assert len(graphs) == 1
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(operator in name for name in names) == 1, names


def test_the_choice(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "lacking", lambda *which: "not here")
    assert choose(torch.empty(4, 2, 16)) == "exact"
    with FakeTensorMode():
        for dtype, width, softcap, wanted in (
            (torch.bfloat16, 128, None, "flash"),
            (torch.bfloat16, 128, 50.0, "flex"),
            (torch.float32, 64, None, "efficient"),
            (torch.bfloat16, 512, None, "efficient"),
            (torch.bfloat16, 100, None, "flex"),
        ):
            query = torch.empty(4, 2, width, dtype=dtype, device="cuda")
            assert choose(query, softcap) == wanted, (dtype, width, softcap)
        with pytest.raises(ValueError, match=r"float64.*backend='exact'"):
            choose(torch.empty(4, 2, 64, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("name", ["flash4", "cudnn"])
def test_the_choice_where_it_can_be_had(monkeypatch, name):
    rooms = {"flash4": attention_flash4, "cudnn": attention_cudnn}
    with FakeTensorMode():
        queries = [torch.empty(4, 2, width, dtype=dtype, device="cuda") for dtype, width in (
            (torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 256), (torch.float32, 64))]  # fmt: skip
        huge = torch.empty(2**17, 128, 128, dtype=torch.bfloat16, device="cuda")
        for backend, room in rooms.items():
            monkeypatch.setattr(room, "lacking", lambda *which, backend=backend: "" if backend == name else "not here")
        assert [choose(query) for query in queries] == [name, name, "flash", "efficient"]
        assert choose(huge) == "flash"
        assert choose(queries[0], softcap=2.0) == "flex"
        odd = torch.empty(4, 2, 72, dtype=torch.bfloat16, device="cuda")
        assert "multiples of 16" in refusal(name, odd) and choose(odd) == "flash"
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3")
        assert choose(queries[0]) == "flash"
        monkeypatch.setattr(attention, "PREFERRED", (name,))
        assert choose(queries[0]) == name
        torch.use_deterministic_algorithms(True)
        try:
            assert "deterministic" in refusal(name, queries[0])
        finally:
            torch.use_deterministic_algorithms(False)
        monkeypatch.setattr(rooms["cudnn"], "lacking", lambda *which: "")
        monkeypatch.setattr(attention, "PREFERRED", attention._preferred(""))
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
        assert choose(queries[0]) == name  # the first of both


def test_what_auto_tries_can_be_named():
    assert attention._preferred("") == ("flash4", "cudnn", "flash", "efficient", "flex")
    assert attention._preferred("flash, efficient") == ("flash", "efficient")
    with pytest.raises(
        ValueError, match="UNSLOTH_EXT_PACKED_ATTENTION=flash,fa3: there are flash4, cudnn, .*, not fa3"
    ):
        attention._preferred("flash,fa3")


@pytest.mark.parametrize(
    "capability, installed", [((8, 0), True), ((12, 0), True), ((9, 0), False), ((9, 0), "folder")]
)
def test_where_cudnn_cannot_be_had(monkeypatch, capability, installed):
    for name, value in (("device_count", lambda: 1), ("get_device_capability", lambda index: capability)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "cudnn", ModuleType("cudnn") if installed == "folder" else None)
    why = attention_cudnn.lacking.__wrapped__(None)
    assert ("Hopper" if capability != (9, 0) else "nvidia-cudnn-frontend") in why
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert attention_cudnn.lacking.__wrapped__(None) == "there is no NVIDIA card"


@pytest.mark.parametrize(
    "capability, interface, why",
    [
        ((8, 0), None, "Hopper"),
        ((10, 0), None, "Hopper"),
        ((9, 0), None, "it needs flash-attn-4"),
        ((9, 0), {}, "it needs flash-attn-4 .*_flash_attn_fwd"),
        (
            (9, 0),
            {"_flash_attn_fwd": lambda q, k, v: 1, "_flash_attn_bwd": 2},
            "this version's .* has no causal, cu_seqlens_k",
        ),
    ],
)
def test_where_flash_attention_4_cannot_be_had(monkeypatch, capability, interface, why):
    for name, value in (("device_count", lambda: 1), ("get_device_capability", lambda index: capability)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    attention_flash4._kernels.cache_clear()
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, None if interface is None else ModuleType(name))
    if interface is not None:
        for name, value in interface.items():
            setattr(sys.modules["flash_attn.cute.interface"], name, value)
        sys.modules["flash_attn.cute"].interface = sys.modules["flash_attn.cute.interface"]
    assert re.search(why, attention_flash4.lacking(None))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert attention_flash4.lacking(None) == "there is no NVIDIA card"


def test_flash_attention_4_is_tried_before_it_is_taken(monkeypatch, caplog):
    tried = []

    def wrong(device, *kind):
        tried.append(kind)
        if kind[-1] or len(tried) == 1:
            raise RuntimeError("its first dq was off by 1.0e+00")

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(attention_flash4, "_kernels", lambda: None)
    monkeypatch.setattr(attention_flash4, "_try", wrong)
    for name, answer in (("device_count", 1), ("get_device_capability", (9, 0)), ("is_current_stream_capturing", True)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    attention_flash4._tried.cache_clear()
    assert "captured" in attention_flash4.lacking(0) and not caplog.records  # asked again later
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert "off by 1.0e+00" in attention_flash4.lacking(0)
    assert len(caplog.records) == 1
    rows = False, torch.float16, 96, 7
    assert attention_flash4.lacking(0, *rows) == ""
    assert "off by 1.0e+00" in attention_flash4.lacking(
        0, *rows, True
    )  # a window is another kernel, and not instead of the plain one
    assert tried == [(True, torch.bfloat16, 128, 4, False), (*rows, False), (*rows, True)]
    attention_flash4._tried.cache_clear()


def test_kinds_of_cudnn_graphs_are_few():
    up, room = attention_cudnn._up, attention_cudnn._room
    assert {up(n, 16) for n in range(1, 65)} == {16, 32, 64}
    assert {room(n) for n in range(1, 8193)} == {1024 * n for n in range(1, 9)}
    assert len({room(n) for n in range(8193, 65537)}) == 24
    for n in (1, 1024, 1025, 9000, 70000):
        assert n <= room(n) <= max(n * 9 // 8, n + 1023)


PLACES = """
import random, torch
from unsloth_ext.compiling.attention_cudnn_places import write_places
for n, room in ((1, 16), (9, 16), (16, 16), (30, 32)):
    lengths = [random.choice([0, 1, random.randint(1, 900)]) for _ in range(n)]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    places = torch.full((4, room + 32), -1, dtype=torch.int32)
    write_places(ends, places, room, (4096, 1024, 32))
    padded = torch.cat([ends, ends[-1:].expand(room - n)])
    assert places[0, :room].tolist() == lengths + [0] * (room - n)
    for row, token in enumerate((4096, 1024, 32), start=1):
        assert torch.equal(places[row, : room + 1], padded * token)
    assert (places[:, room + 1 :] == -1).all()
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_where_documents_begin_interpreted():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), env.get("PYTHONPATH", ""))))
    done = subprocess.run([sys.executable, "-c", PLACES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_refusals():
    query, key, value, _ = random_row([5, 3], dtype=torch.float32)
    cu_seqlens = boundaries([5, 3])
    for backend in ("cudnn", "flash", "efficient"):
        assert "cpu" in refusal(backend, query)
        with pytest.raises(ValueError, match=f"backend='{backend}'.*on cpu"):
            packed_attention(query, key, value, cu_seqlens, 5, backend=backend)
    with pytest.raises(ValueError, match=f"'xformers'.*{', '.join(BACKENDS)}"):
        packed_attention(query, key, value, cu_seqlens, 5, backend="xformers")
    for bad, message in (
        ((query[None], key, value, cu_seqlens), r"\[T, H, D\]"),
        ((query, key[:5], value[:5], cu_seqlens), "the same T"),
        ((query[:, :3], key, value, cu_seqlens), "multiple of H_kv"),
        ((query, key.double(), value, cu_seqlens), "one dtype"),
        ((query, key, value, cu_seqlens.long()), "int32"),
        ((query, key, value, cu_seqlens[None]), "int32"),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(*bad, 5)
    with pytest.raises(ValueError, match="window must be at least 1.*got 0"):
        packed_attention(query, key, value, cu_seqlens, 5, window=0)
    with pytest.raises(ValueError, match="softcap must be positive.*got -1"):
        packed_attention(query, key, value, cu_seqlens, 5, softcap=-1.0)
    for wrong in ([1, 4, 8], [0, 6, 4], [0, 9]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to at most the 8 tokens"):
            packed_attention(query, key, value, torch.tensor(wrong, dtype=torch.int32), 5)
