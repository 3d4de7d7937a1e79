"""The kernel for sums of products on a card: values, edges, the same bits whatever the number of rows, streams, threads, graphs."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from products_on_card import hopper, matrix, off  # noqa: F401  a fixture for all tests here

from unsloth_ext.nf4 import products_hopper
from unsloth_ext.nf4.products import _one_by_one, sum_of_products

pytestmark = pytest.mark.gpu


def pairs(rows, columns, widths, transposed, dtype=torch.bfloat16, around=0):
    xs = [matrix(rows, n, dtype, around) for n in widths]
    return xs, [matrix(*((columns, n) if transposed else (n, columns)), dtype, around) for n in widths]


def kernel_of(xs, weights, transposed):
    found = products_hopper.kernel_for(xs, weights, transposed, weights[0].shape[0 if transposed else 1])
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "widths", "around"),
    [
        (8191, 2040, (264, 16), 0),
        (4096, 4096, (1024, 3), 8),
        (8192, 1024, (64, 32, 8, 5), 16),
        (2300, 14088, (200, 136), 8),
        (2048, 4096, (8, 8), 0),
        (8200, 2048, (640, 16), 0),  # the last pair of tiles has rows for one of them only
    ],
)
def test_values(dtype, transposed, rows, columns, widths, around):
    xs, weights = pairs(rows, columns, widths, transposed, dtype, around)
    kernel_of(xs, weights, transposed)
    found = sum_of_products(xs, weights, transposed)
    exact = sum(x.double() @ (w.double().t() if transposed else w.double()) for x, w in zip(xs, weights, strict=True))
    assert off(found, xs, weights, transposed) <= 1.02 * off(exact.to(dtype), xs, weights, transposed)  # rounded once
    assert torch.equal(found, sum_of_products(xs, weights, transposed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(8191, 2040), (4096, 4096), (2300, 14088)])
def test_onto_something(dtype, transposed, rows, columns):
    xs, weights = pairs(rows, columns, (264, 16), transposed, dtype, 8)
    onto = matrix(rows, columns, dtype, 8).mul_(64)
    wanted = onto.double() + sum(
        x.double() @ (w.double().t() if transposed else w.double()) for x, w in zip(xs, weights, strict=True)
    )
    assert products_hopper.kernel_for(xs, weights, transposed, columns, onto) is not None
    found, near = (
        sum_of_products(xs, weights, transposed, onto),
        ((wanted.to(dtype) - wanted).norm() / wanted.norm()).item(),
    )
    assert ((found.double() - wanted).norm() / wanted.norm()).item() <= 1.02 * near  # rounded once
    alone = sum_of_products([torch.zeros_like(x) for x in xs], weights, transposed, onto)
    assert torch.equal(alone, onto)  # the identity changes no bit


@pytest.mark.parametrize("transposed", [True, False])
def test_nothing_is_written_beside_the_result(transposed):
    xs, weights = pairs(2047, 4088, (72, 16), transposed)
    whole = torch.full((2050, 4104), float("nan"), device="cuda", dtype=torch.bfloat16)
    y = whole[1:2048, 8:4096]
    kernel_of(xs, weights, transposed)(xs, weights, y)
    assert off(y, xs, weights, transposed) < 2**-8
    y.fill_(float("nan"))
    assert whole.isnan().all()


def test_the_bits_do_not_depend_on_the_number_of_rows():
    xs, weights = pairs(8192, 2048, (512, 16), True)
    whole = sum_of_products(xs, weights)
    for rows in (4096, 7000, 8100):
        part = [x[:rows] for x in xs]
        kernel_of(part, weights, True)
        assert torch.equal(sum_of_products(part, weights), whole[:rows])


def test_what_is_small_or_laid_out_otherwise_is_added_one_by_one():
    xs, weights = pairs(4096, 4096, (256, 16), True)
    few = [x[:100] for x in xs]
    turned = [weights[0].t().contiguous().t(), weights[1]]
    empty = [x[:0] for x in xs], weights
    odd = (
        [torch.randn(4096, 203, device="cuda").bfloat16()[:, 3:], xs[1]],
        [matrix(4096, 200, torch.bfloat16), weights[1]],
    )
    for given in ((few, weights), (xs, turned), odd, empty, ([x.float() for x in xs], [w.float() for w in weights])):
        assert products_hopper.kernel_for(*given, True, 4096) is None
        assert given is empty or off(sum_of_products(*given), *given, True) < 2**-7


def test_on_streams_and_in_threads():
    given = [pairs(4096, 2048, (256 + 64 * i, 16), bool(i % 2)) for i in range(4)]
    wanted = [sum_of_products(*one, bool(i % 2)) for i, one in enumerate(given)]
    torch.cuda.synchronize()

    def run(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found = sum_of_products(*given[i], bool(i % 2))
                torch.cuda.current_stream().synchronize()
                assert torch.equal(found, wanted[i])
        return i

    with ThreadPoolExecutor(4) as threads:  # new threads: none has been on the card
        assert list(threads.map(run, range(4))) == [0, 1, 2, 3]


def test_first_uses_at_once(monkeypatch):
    monkeypatch.setattr(products_hopper, "_kernels", {})
    xs, weights = pairs(4096, 2048, (128, 16), True)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: kernel_of(xs, weights, True), range(4)))
    assert len(products_hopper._kernels) == 1 and all(one is found[0] for one in found)


def test_in_a_graph():
    xs, weights = pairs(4096, 2048, (128, 12), False)
    sum_of_products(xs, weights, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sum_of_products(xs, weights, False)
    xs[0].normal_()
    xs[1].normal_()
    graph.replay()
    assert torch.equal(found, sum_of_products(xs, weights, False))


def test_a_graph_recorded_before_the_first_use(monkeypatch):
    monkeypatch.setattr(products_hopper, "_kernels", {})
    xs, weights = pairs(4096, 2048, (128, 16), True)
    _one_by_one(xs, weights, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sum_of_products(xs, weights)
    graph.replay()
    assert torch.equal(found, _one_by_one(xs, weights, True)) and not products_hopper._kernels


def test_a_kernel_that_fails_is_said_and_not_used(monkeypatch, caplog):
    def broken(self, *_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(products_hopper, "_kernels", {})
    monkeypatch.setattr(products_hopper._Kernel, "check", broken)
    xs, weights = pairs(4096, 2048, (128, 16), True)
    for _ in range(2):
        assert off(sum_of_products(xs, weights), xs, weights, True) < 2**-7
    assert [record.getMessage() for record in caplog.records] == [
        "sums of products on cuda:0 are computed one product after the other: no such thing"
    ]
