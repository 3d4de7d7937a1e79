"""On a Hopper card: the kernels in CUDA C++, every kind of launch, and what they share between programs, streams and graphs."""

import threading
import warnings

import pytest
import torch
from nf4_states import Spec

from unsloth_ext.nf4 import dequantize, matmul_cuda, matmul_hopper, matmul_nvrtc, matmul_plan, matmul_table
from unsloth_ext.nf4.matmul import linear
from unsloth_ext.nf4.matmul_hopper import FewRows, Tiles
from unsloth_ext.nf4.quant_state import read

pytestmark = pytest.mark.gpu

LAUNCHES = [
    (FewRows("few_async", 1, 16, 1), 4096, (1, 8)),
    (FewRows("few_async", 2, 16, 1, stages=2, ahead=1), 4096, (9, 16)),
    (FewRows("few_async", 1, 8, 2, stages=4), 2048, (5,)),
    (FewRows("few_async", 1, 7, 2, slices=5), 8960, (3, 8)),
    (FewRows("few_async", 2, 14, 1, slices=4), 14336, (16,)),
    (FewRows("few_async", 1, 14, 1, slices=4, inner=1), 14336, (1, 7)),
    (FewRows("few_async", 1, 16, 1, slices=2, ahead=1, inner=1), 8192, (1, 8)),
    (FewRows("few_async", 1, 4, 4), 1024, (2,)),
    (FewRows("few_stream", 1, 16, 1), 4096, (1, 8)),
    (FewRows("few_stream", 2, 16, 1, ahead=1), 4096, (16,)),
    (FewRows("few_stream", 1, 12, 1, slices=3), 9216, (4,)),
    (Tiles(16, split=4), 4096, (9, 16)),
    (Tiles(32), 4096, (17, 32)),
    (Tiles(32, nwg=1, split=2, words=1), 2048, (30,)),
    (Tiles(64, split=2), 2048, (64, 100)),
    (Tiles(64, parts=2, split=2, buffers=1, lean=1, decoded=1), 4096, (40,)),
    (Tiles(64, parts=2, stages=4), 1152, (40,)),
    (Tiles(128, parts=2, split=4, buffers=1), 4096, (128, 200)),
]


def draw(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), dtype=dtype, device="cuda")


@pytest.fixture(autouse=True)
def clean():
    """Each test with verdicts of its own, and no warning: none may pass by falling back."""
    if not matmul_table.enabled(torch.cuda.current_device()) or not matmul_table.processors(
        torch.cuda.current_device()
    ):
        pytest.skip("these kernels are not used on this card")
    matmul_plan.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert matmul_plan._given_up == {}
    matmul_plan.forget()


def only(monkeypatch, shape):
    monkeypatch.setattr(matmul_hopper, "shape_for", lambda rows, n, k, processors: shape)


def variants():
    return [variant.shape for variant in matmul_plan._ready]


def as_good_as_dense(y, x, packed, state, bias=None):
    right = x.double() @ dequantize(packed, state, dtype=torch.float32).double().t()
    right = right if bias is None else right + bias.double()
    dense = torch.nn.functional.linear(x, dequantize(packed, state, dtype=x.dtype), bias)
    ours, theirs = ((t.double() - right).norm() / right.norm() for t in (y, dense))
    return bool(ours <= theirs * 1.1 + 1e-5)


@pytest.mark.parametrize("shape, k, rows", LAUNCHES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_launch(shape, k, rows, dtype, monkeypatch):
    only(monkeypatch, shape)
    for n in (1000, 2600) if k < 9000 else (1000,):  # last tiles that are not whole, one of one column less than a pair
        packed, state = Spec(rows=n + 1, columns=k, dtype=dtype, seed=n).make("cuda")
        bias = draw(n + 1, dtype=dtype)
        for m in rows:
            x = draw(m, k, dtype=dtype, seed=m)
            for given in (None, bias):
                first = None
                for _ in range(3):  # by `run`, then by the plan
                    y = torch.full((m, n + 1), float("nan"), dtype=dtype, device="cuda")
                    linear(x, packed, state, given, out=y)
                    first = y.clone() if first is None else first
                    assert torch.equal(y, first)
                assert as_good_as_dense(y, x, packed, state, given), (n, m)
    assert variants() == [shape]


def test_the_table_is_used():
    """The shapes of an 8B model, by the real choice: a kernel in CUDA C++ wherever the choice says so."""
    for n, k in ((14336, 4096), (4096, 4096), (1024, 4096), (4096, 14336)):
        packed, state = Spec(rows=n, columns=k).make("cuda")
        for rows in (1, 7, 16, 24, 64, 128, 256):
            expected = matmul_hopper.shape_for(rows, n, k, matmul_table.processors(0))
            x = draw(rows, k)
            for _ in range(2):
                assert as_good_as_dense(linear(x, packed, state), x, packed, state), (n, k, rows)
            assert expected is None or expected in variants()


SHARING = [
    (FewRows("few_async", 1, 8, 1, slices=2), 4096, 5),
    (Tiles(16, split=4), 4096, 16),
    (Tiles(64, split=2), 4096, 64),
]


@pytest.mark.parametrize("shape, k, rows", SHARING, ids=lambda value: str(value).replace(" ", ""))
def test_streams_at_the_same_time(shape, k, rows, monkeypatch):
    only(monkeypatch, shape)
    packed, state = Spec(rows=2000, columns=k).make("cuda")
    xs = [draw(rows, k, seed=i) for i in range(3)]
    rights = [linear(x, packed, state) for x in xs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in xs], [[] for _ in xs]
    for _ in range(40):
        for stream, x, ys in zip(streams, xs, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(linear(x, packed, state))
    torch.cuda.synchronize()
    for ys, right in zip(found, rights, strict=True):
        assert all(torch.equal(y, right) for y in ys)


@pytest.mark.parametrize("shape, k, rows", SHARING, ids=lambda value: str(value).replace(" ", ""))
def test_graphs_at_the_same_time(shape, k, rows, monkeypatch):
    """Captured on the same stream, replayed on two: they must not share counters, and neither with eager calls."""
    only(monkeypatch, shape)
    packed, state = Spec(rows=2000, columns=k).make("cuda")
    xs = [draw(rows, k, seed=i) for i in range(3)]
    rights = [linear(x, packed, state) for x in xs]
    graphs = []
    for x in xs[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [linear(x, packed, state) for _ in range(8)]
        graphs.append((graph, ys, torch.cuda.Stream()))
    for _ in range(10):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [linear(xs[2], packed, state) for _ in range(4)]
        torch.cuda.synchronize()
        for (_, ys, _), right in zip(graphs, rights, strict=False):
            assert all(torch.equal(y, right) for y in ys)
            for y in ys:
                y.zero_()
        assert all(torch.equal(y, rights[2]) for y in eager)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_it_waits_for_the_kernel_before_it(rows):
    packed, state = Spec(rows=4096, columns=4096).make("cuda")
    xs = [draw(rows, 4096, seed=i) for i in range(3)]
    rights = [linear(x, packed, state) for x in xs]
    x = torch.empty_like(xs[0])
    for i in range(60):
        torch.mul(xs[i % 3], 1.0, out=x)
        assert torch.equal(linear(x, packed, state) * 2, rights[i % 3] * 2)
    square, results = Spec(rows=4096, columns=4096, seed=1).make("cuda"), []
    for _ in range(3):  # each call reads what the one before it wrote
        chained = xs[0]
        for _ in range(6):
            chained = linear(chained, *square)
        results.append(chained)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_in_other_threads():
    packed, state = Spec(rows=4096, columns=4096).make("cuda")
    x = draw(3, 4096)
    right = linear(x, packed, state)
    torch.cuda.synchronize()
    found = []

    def work():
        with torch.no_grad():
            found.extend(linear(x, packed, state) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 200 and all(torch.equal(y, right) for y in found)


def test_without_nvrtc_it_is_triton(monkeypatch):
    def missing(kernel, macros):
        raise OSError("libnvrtc.so.0 was not found")

    packed, state = Spec(rows=4096, columns=4096).make("cuda")
    x = draw(3, 4096)
    matmul_cuda.kernel.cache_clear()
    monkeypatch.setattr(matmul_nvrtc, "cubin", missing)
    with pytest.warns(RuntimeWarning, match="is not used on .*, Triton's is instead: OSError: libnvrtc") as said:
        y = linear(x, packed, state)
    assert len(said) == 1 and [variant.cuda for variant in matmul_plan._ready] == [False]
    for _ in range(3):
        assert torch.equal(linear(x, packed, state), y) and as_good_as_dense(y, x, packed, state)
    assert id(state) in matmul_plan.plans
    matmul_plan.forget()
    matmul_cuda.kernel.cache_clear()


def test_scales_that_are_not_aligned():
    """A view of all absmax of a model, say: Triton's kernels take it, without a word."""
    packed, state = Spec(rows=1024, columns=4096).make("cuda")
    whole = torch.empty(state.absmax.numel() + 1, dtype=torch.uint8, device="cuda")
    state.absmax = whole[1:].copy_(state.absmax)
    x = draw(3, 4096)
    for _ in range(2):
        assert as_good_as_dense(linear(x, packed, state), x, packed, state)
    assert [variant.cuda for variant in matmul_plan._ready] == [False]


def test_variants_say_what_they_are():
    state = read(Spec(rows=4096, columns=4096).make("cuda")[1])
    found = matmul_table.variant_for(torch.cuda.current_device(), torch.bfloat16, 3, state, True)
    assert found.cuda and found == matmul_table.variant_for(
        torch.cuda.current_device(), torch.bfloat16, 8, state, False
    )
