"""The kernel for a product and a narrow one of the same inputs on a card: values, edges, programs that wait for each other, streams, graphs."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from products_on_card import hopper, matrix, off  # noqa: F401  a fixture for all tests here

from unsloth_ext.nf4 import products_hopper
from unsloth_ext.nf4.products import _one_after_the_other, low_of, product_with_low

pytestmark = pytest.mark.gpu


def given(rows, columns, widths, rank, used, transposed, dtype=torch.bfloat16, around=0):
    def weight(n, k):
        return matrix(*((n, k) if transposed else (k, n)), dtype, around)

    inputs = (
        [matrix(rows, k, dtype, around) for k in widths],
        [weight(rank, k) for k in widths],
        [weight(columns, k) for k in widths],
        weight(columns, used),
        transposed,
    )
    assert products_hopper.kernel_with_low(*inputs, columns) is not None
    return inputs


def near(found, xs, downs, weights, up, transposed, bound):
    y, low = found
    assert off(low, xs, downs, transposed) < bound
    assert off(y, [*xs, low[:, : up.shape[1 if transposed else 0]]], [*weights, up], transposed) < bound


SHAPES = [  # rows, N, widths, R, r, NaN around
    (8192, 4096, (1024,), 16, 16, 0),
    (8191, 4088, (264,), 48, 16, 8),
    (8000, 14336, (200, 136), 32, 32, 8),
    (8192, 4096, (512, 128, 128), 64, 64, 0),
    (4096, 8192, (8,), 8, 3, 0),
    (16384, 4096, (72,), 40, 16, 0),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values(dtype, transposed, shape):
    *sizes, around = shape
    inputs = given(*sizes, transposed, dtype, around)
    found = product_with_low(*inputs)
    near(found, *inputs, 2**-8 if dtype == torch.bfloat16 else 2**-11)
    for _ in range(20):  # counters are left as they were found
        assert all(map(torch.equal, product_with_low(*inputs), found))
    xs, downs = inputs[:2]
    assert torch.equal(low_of(xs, downs, sizes[1], transposed), found[1])


@pytest.mark.parametrize("widths", [(264,), (200, 136), (64, 32, 32)])
def test_onto_something(widths):
    """Inside the kernel where there is room for one more; low's bits are the same."""
    xs, downs, weights, up, _ = inputs = given(8191, 4096, widths, 16, 16, True)
    onto = 32 * matrix(8191, 4096, torch.bfloat16)
    found, low = product_with_low(*inputs, onto)
    assert torch.equal(low, product_with_low(*inputs)[1])
    exact = onto.double() + sum(x.double() @ w.double().t() for x, w in zip([*xs, low], [*weights, up], strict=True))
    assert ((found.double() - exact).norm() / exact.norm()).item() < 2**-7


def test_nothing_is_written_beside_low():
    xs, downs, weights, up, _ = inputs = given(8190, 4096, (128,), 24, 16, True)
    whole = torch.full((8200, 40), float("nan"), device="cuda", dtype=torch.bfloat16)
    y, low = xs[0].new_empty(8190, 4096), whole[3:8193, 8:32]
    products_hopper.kernel_with_low(*inputs, 4096)(xs, downs, low, weights, up, y)
    assert off(low, xs, downs, True) < 2**-8
    low.fill_(float("nan"))
    assert whole.isnan().all()


def test_what_finds_no_room_is_computed_one_after_the_other():
    xs = [matrix(4096, 2048, torch.bfloat16)]
    downs, weights, up = ([matrix(n, 2048, torch.bfloat16)] for n in (16, 2048, 16))
    up = matrix(2048, 16, torch.bfloat16)
    inputs = xs, downs, weights, up, True
    assert products_hopper.kernel_with_low(*inputs, 2048) is None
    assert all(map(torch.equal, product_with_low(*inputs), _one_after_the_other(*inputs)))


def test_on_streams_and_in_threads():
    """Calls on four streams at once: each stream's programs wait on counters of their own."""
    inputs = [given(8192, 4096, (256 + 64 * i,), 16, 16, bool(i % 2)) for i in range(4)]
    wanted = [product_with_low(*one) for one in inputs]
    torch.cuda.synchronize()

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = [product_with_low(*inputs[i]) for _ in range(5)]
                torch.cuda.current_stream().synchronize()
                assert all(all(map(torch.equal, one, wanted[i])) for one in found)
        return i

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [0, 1, 2, 3]


def test_graphs_beside_their_stream():
    """Two graphs recorded on one stream, replayed on two, and calls on the first."""
    inputs = given(8192, 4096, (512,), 16, 16, True)
    wanted, graphs, found = product_with_low(*inputs), [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found.append(product_with_low(*inputs))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        now = product_with_low(*inputs)
    torch.cuda.synchronize()
    for one in (*found, now):
        assert all(map(torch.equal, one, wanted))


HOLD = """
extern "C" __global__ void hold(volatile int* released, volatile int* running, volatile int* gave_up) {
  running[blockIdx.x] = 1;
  for (long long start = clock64(); !*released;)
    if (clock64() - start > 20000000000LL) { *gave_up = 1; break; }  // ten seconds: a test must end
}
"""


@pytest.mark.parametrize("held", [60, 100, 112])
def test_beside_a_kernel_that_holds_processors_until_later(held):
    """As NCCL's does until another card has sent something, which may wait for this very product."""
    inputs = given(8192, 4096, (512,), 16, 16, True)
    wanted = product_with_low(*inputs)
    hold = torch.cuda._compile_kernel(HOLD, "hold")
    hold.set_shared_memory_config(200 << 10)  # no room for another program beside it
    released, running, gave_up = (torch.zeros(n, dtype=torch.int32).pin_memory() for n in (1, held, 1))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        hold((held, 1, 1), (32, 1, 1), [released, running, gave_up], 200 << 10)
    try:
        until(lambda: int(running.sum()) == held)
        found, done = product_with_low(*inputs), torch.cuda.Event()
        done.record()
        until(done.query)
        assert int(running.sum()) == held and not int(gave_up)
    finally:
        released.fill_(1)
        torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))


def until(what, seconds=4):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.001)


def test_beside_something_that_holds_programs_back():
    """Another kernel has most of the card when the call begins."""
    inputs = given(8192, 4096, (512,), 16, 16, True)
    wanted, busy = product_with_low(*inputs), torch.randn(16384, 16384, device="cuda")
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                busy.sin()
        found = product_with_low(*inputs)
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))
