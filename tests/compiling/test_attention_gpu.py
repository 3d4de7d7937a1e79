"""On a card: every backend against the dense mask in fp64, eager and compiled, and that packings make no graphs."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packings import boundaries, exact, random_lengths, random_row, result_and_gradients, worst
from torch._dynamo.testing import CompileCounterWithBackend

from unsloth_ext.compiling import attention
from unsloth_ext.compiling.attention import packed_attention, refusal
from unsloth_ext.compiling.attention_cudnn import cudnn_attention
from unsloth_ext.compiling.attention_efficient import efficient_attention
from unsloth_ext.compiling.attention_flash4 import flash4_attention
from unsloth_ext.compiling.attention_flex import block_masks
from unsloth_ext.compiling.attention_rows import row_attention

pytestmark = pytest.mark.gpu

# Kernels round the probabilities to the inputs' dtype: against fp64, of the same inputs, relative to the largest value.
BOUNDS = {torch.bfloat16: 4e-2, torch.float16: 8e-3, torch.float32: 8e-3}  # fp32: flex multiplies in TF32 where allowed
CALLS = [
    (backend, dtype, width, window, softcap)
    for backend, dtypes, widths in (
        ("flash4", (torch.bfloat16, torch.float16), (64, 128)),
        ("cudnn", (torch.bfloat16, torch.float16), (64, 128)),
        ("flash", (torch.bfloat16, torch.float16), (64, 128)),
        ("efficient", (torch.bfloat16, torch.float32), (64, 128)),
        ("flex", (torch.bfloat16, torch.float32), (64, 128)),
        ("exact", (torch.bfloat16,), (64,)),
    )
    for dtype in dtypes
    for width in widths
    for window in (None, 100)
    for softcap in ((None, 2.0) if backend in ("flex", "exact") else (None,))
]


def row_on_card(lengths, dtype, width, heads=8, kv_heads=2):
    return random_row(lengths, heads=heads, kv_heads=kv_heads, width=width, dtype=dtype, device="cuda")


@pytest.mark.parametrize("backend, dtype, width, window, softcap", CALLS)
def test_values_and_gradients(backend, dtype, width, window, softcap):
    torch._dynamo.reset()  # flex is compiled for each kind of mask anew, and torch allows eight in a process
    lengths = [*random_lengths(random.randint(1, 5), 400), 1, 129]
    row = row_on_card(lengths, dtype, width)
    if reason := refusal(backend, row[0], softcap):
        pytest.skip(reason)
    cu_seqlens = boundaries(lengths, "cuda")
    options = {"window": window, "softcap": softcap}
    bound = -(-max(lengths) // 128) * 128
    found = result_and_gradients(packed_attention, *row, cu_seqlens, bound, backend=backend, **options)
    assert worst(found, exact(*row, cu_seqlens, **options)) < BOUNDS[dtype]


@pytest.mark.parametrize("backend", ["flash4", "cudnn", "flash", "efficient", "flex"])
def test_one_graph_for_64_packings(backend):
    counter = CompileCounterWithBackend("inductor")
    softcap = 2.0 if backend == "flex" else None

    class Layer(torch.nn.Module):
        scaling, window, cap = 0.125, 100, softcap

        def forward(self, query, key, value, cu_seqlens, longest, masks):
            return packed_attention(
                query, key, value, cu_seqlens, longest,
                scale=self.scaling, window=self.window, softcap=self.cap, backend=backend, masks=masks,
            )  # fmt: skip

    compiled, first = torch.compile(Layer(), backend=counter, fullgraph=True, dynamic=True), 0
    # As compile_model has it: else seven documents, whose eight boundaries are as many as heads, are a graph of their own.
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        for _ in range(64):
            lengths = [130, *random_lengths(random.randint(1, 8), 300)]
            row = row_on_card(lengths, torch.bfloat16, 64)
            if reason := refusal(backend, row[0], softcap):
                pytest.skip(reason)
            cu_seqlens = boundaries(lengths, "cuda")
            masks = block_masks(cu_seqlens, sum(lengths), (100,)) if backend == "flex" else None
            found = result_and_gradients(compiled, *row, cu_seqlens, 384, masks)
            first = first or counter.frame_count
    assert counter.frame_count == first <= 2
    wanted = exact(*row, cu_seqlens, scale=0.125, window=100, softcap=softcap)
    assert worst(found, wanted) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("backend", ["flash4", "cudnn", "flash", "efficient"])
def test_empty_documents(backend):
    """What a graph appends where no token is left over."""
    lengths = [0, 70, 0, 300, 0]
    row = row_on_card(lengths, torch.float16, 64)
    if reason := refusal(backend, row[0]):
        pytest.skip(reason)
    found = result_and_gradients(packed_attention, *row, boundaries(lengths, "cuda"), 384, backend=backend)
    assert worst(found, exact(*row, boundaries(lengths, "cuda"))) < BOUNDS[torch.float16]


@pytest.mark.parametrize(
    "backend, operator",
    [("flash4", flash4_attention), ("cudnn", cudnn_attention), ("efficient", efficient_attention)],
)
@pytest.mark.parametrize("window", [None, 100])
def test_an_operator(backend, operator, window):
    """Its fake kernel, its schema and its gradient's registration; also for a bound above the row's length."""
    lengths = [90, *random_lengths(3, 100)]
    row = row_on_card(lengths, torch.bfloat16, 64)
    if reason := refusal(backend, row[0]):
        pytest.skip(reason)
    for bound in (128, 2048):
        inputs = (*row[:3], boundaries(lengths, "cuda"), bound, 0.125, window)
        torch.library.opcheck(
            operator, inputs, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )
    found = result_and_gradients(packed_attention, *row, boundaries(lengths, "cuda"), 2048, backend=backend)
    assert worst(found, exact(*row, boundaries(lengths, "cuda"))) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("backend", ["flash4", "cudnn"])
@pytest.mark.parametrize("heads, kv_heads", [(8, 8), (8, 1), (6, 2), (14, 2)])
@pytest.mark.parametrize(
    "lengths, window", [([70] * 16, None), ([300], None), ([9] * 300, None), ([1] * 40, 5), ([1500, 20, 0, 900], 2000)]
)
def test_other_shapes(backend, heads, kv_heads, lengths, window):
    """As many documents as a graph of cuDNN's has and more, one, short ones, a window wider than all; boundaries and a gradient with strides."""
    row = row_on_card(lengths, torch.bfloat16, 96, heads, kv_heads)
    if reason := refusal(backend, row[0]):
        pytest.skip(reason)
    cu_seqlens = torch.stack([boundaries(lengths, "cuda")] * 2, 1)[:, 0]
    row = (*row[:3], torch.cat([row[3]] * 2, 2)[..., 96:])
    found = result_and_gradients(packed_attention, *row, cu_seqlens, max(lengths), window=window, backend=backend)
    assert worst(found, exact(*row, cu_seqlens, window=window)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("backend", ["flash4", "cudnn"])
def test_in_threads_on_streams(backend):
    """Two threads, each on a stream of its own, with other shapes and so other graphs; backwards run in autograd's thread."""
    cases = [([*random_lengths(40, 90), 1500], 128), (random_lengths(9, 2000), 64)]
    rows = [row_on_card(lengths, torch.bfloat16, width) for lengths, width in cases]
    if reason := refusal(backend, rows[0][0]):
        pytest.skip(reason)
    cu_seqlens = [boundaries(lengths, "cuda") for lengths, _ in cases]
    torch.cuda.synchronize()

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            for _ in range(20):
                found = result_and_gradients(
                    packed_attention, *rows[i], cu_seqlens[i], max(cases[i][0]), backend=backend
                )
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    for found, row, ends in zip(results, rows, cu_seqlens, strict=True):
        assert worst(found, exact(*row, ends)) < BOUNDS[torch.bfloat16]


def test_a_row_too_long_for_one_flash_call(monkeypatch):
    """Past an int32 index the heads go in groups, and nothing else changes."""
    lengths = random_lengths(4, 300)
    row = row_on_card(lengths, torch.bfloat16, 64)
    if reason := refusal("flash", row[0]):
        pytest.skip(reason)
    cu_seqlens = boundaries(lengths, "cuda")
    whole = result_and_gradients(packed_attention, *row, cu_seqlens, 384, backend="flash")
    monkeypatch.setattr(attention, "_INT32", 1)
    parts = result_and_gradients(packed_attention, *row, cu_seqlens, 384, backend="flash")
    assert worst(parts, [t.double() for t in whole]) < BOUNDS[torch.bfloat16]
    single = row_on_card(lengths, torch.bfloat16, 64, heads=4, kv_heads=1)
    with pytest.raises(ValueError, match="too long for the flash backward.*pack shorter rows"):
        packed_attention(*single[:3], cu_seqlens, 384, backend="flash")


def test_rows_with_strides():
    """As a model hands them over: views of [1, H, T, D]."""
    lengths = random_lengths(4, 300)
    row = row_on_card(lengths, torch.bfloat16, 64)
    cu_seqlens = boundaries(lengths, "cuda")
    wanted = packed_attention(*row[:3], cu_seqlens, 384)  # the forwards are the same twice
    strided = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in row[:3]]
    assert not strided[0].is_contiguous()
    assert torch.equal(packed_attention(*strided, cu_seqlens, 384), wanted)


def rows_on_card(batch, length, dtype, width, heads=8, kv_heads=2):
    """Rows as a model hands them over, [B, T, H, D], and their exact attention."""
    given = row_on_card([length] * batch, dtype, width, heads, kv_heads)
    rows = [t.detach().view(batch, length, -1, width).requires_grad_(i < 3) for i, t in enumerate(given)]
    if reason := refusal("flash4", rows[0]):
        pytest.skip(reason)

    def wanted(**options):
        return [
            t.view(batch, length, -1, width) for t in exact(*given, boundaries([length] * batch, "cuda"), **options)
        ]

    return rows, wanted


@pytest.mark.parametrize(
    "dtype, width, window, heads, kv_heads",
    [
        (torch.bfloat16, 128, None, 8, 2),
        (torch.bfloat16, 64, 100, 8, 1),
        (torch.float16, 128, 5000, 6, 6),
        (torch.float16, 96, 100, 8, 2),
        (torch.bfloat16, 128, None, 14, 2),
    ],
)
def test_rows(dtype, width, window, heads, kv_heads):
    for batch, length in ((1, 1024), (3, 129), (2, 1), (4, random.randint(2, 1500))):
        rows, wanted = rows_on_card(batch, length, dtype, width, heads, kv_heads)
        found = result_and_gradients(row_attention, *rows, 0.1, window)
        assert worst(found, wanted(scale=0.1, window=window)) < BOUNDS[dtype], (batch, length)


def test_one_graph_for_rows_of_any_length():
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(row_attention, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in ((3, 700), (4, 1111), (5, 2048), (3, 130)):
        rows, wanted = rows_on_card(batch, length, torch.bfloat16, 128)
        strided = [
            t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(i < 3) for i, t in enumerate(rows)
        ]
        assert worst(result_and_gradients(compiled, *strided), wanted()) < BOUNDS[torch.bfloat16]
    assert counter.frame_count == 1
    torch.library.opcheck(
        flash4_attention,
        (*rows[:3], None, 130, 0.125, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
