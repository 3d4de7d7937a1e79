"""A product and a narrow one of the same inputs, without a card: values, what is refused, one node of a graph, when low finds room beside y."""

import struct

import pytest
import torch
import torch._dynamo.testing

from unsloth_ext.nf4 import matmul_nvrtc, products_hopper
from unsloth_ext.nf4.products import low_of, product_with_low


def given(rows, columns, widths, rank, used, transposed=True, dtype=torch.bfloat16):
    def weight(n, k):
        matrix = torch.randn(n, k)
        return (matrix if transposed else matrix.t().contiguous()).to(dtype)

    xs = [torch.randn(rows, k).to(dtype) for k in widths]
    return xs, [weight(rank, k) for k in widths], [weight(columns, k) for k in widths], weight(columns, used)


def exact(xs, weights, transposed):
    return sum(x.double() @ (w.double().t() if transposed else w.double()) for x, w in zip(xs, weights, strict=True))


def off(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("widths", "rank", "used"), [((64,), 8, 8), ((64, 3), 48, 16), ((32, 8, 8), 5, 3)])
def test_values(dtype, transposed, widths, rank, used):
    xs, downs, weights, up = given(7, 40, widths, rank, used, transposed, dtype)
    y, low = product_with_low(xs, downs, weights, up, transposed)
    near = 2 * (len(widths) + 1) * torch.finfo(dtype).eps
    assert y.shape == (7, 40) and low.shape == (7, rank) and y.dtype == low.dtype == dtype
    assert off(low, exact(xs, downs, transposed)) < near
    assert off(y, exact([*xs, low[:, :used]], [*weights, up], transposed)) < near
    assert torch.equal(low_of(xs, downs, 40, transposed), low)
    onto = torch.randn(7, 40).to(dtype)
    more, same = product_with_low(xs, downs, weights, up, transposed, onto)
    assert torch.equal(same, low) and torch.equal(more, y + onto)
    torch.library.opcheck(torch.ops.unsloth_ext.product_with_low.default, (xs, downs, weights, up, transposed))
    torch.library.opcheck(torch.ops.unsloth_ext.product_with_low.default, (xs, downs, weights, up, transposed, onto))
    torch.library.opcheck(torch.ops.unsloth_ext.low_of.default, (xs, downs, transposed, 40))


def test_one_node_for_all_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(lambda *all: product_with_low(*all), backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        inputs = given(rows, 16, (32, 8), 4, 4)
        for found, wanted in zip(run(*inputs), product_with_low(*inputs), strict=True):
            assert torch.equal(found, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda xs, ds, ws, u: (xs, ds, ws[:1], u), "as many weights as inputs are needed, got 2, 2 and 1"),
        (lambda xs, ds, ws, u: ([], [], [], u), "got 0, 0 and 0"),
        (lambda xs, ds, ws, u: (xs, [ds[0], ds[0]], ws, u), r"an input \[5, 8\] and its weight \[4, 32\] do not fit"),
        (lambda xs, ds, ws, u: (xs, ds, ws, u[:9]), r"up must be 16 up to 4, got \[9, 3\]"),
        (lambda xs, ds, ws, u: (xs, ds, ws, torch.cat([u, u], 1)), r"up must be 16 up to 4, got \[16, 6\]"),
        (lambda xs, ds, ws, u: (xs, ds, ws, u.float()), "must be of one dtype and on one device"),
    ],
)
def test_bad_input(change, why):
    with pytest.raises(ValueError, match=why):
        product_with_low(*change(*given(5, 16, (32, 8), 4, 3)))


def test_where_low_finds_room(monkeypatch):
    """The shapes of 8B and 1B on an H200, whose programs make 66 pairs."""
    monkeypatch.setattr(products_hopper, "_clusters", lambda index: 66)
    beside = products_hopper._is_beside.__wrapped__
    shapes = {(8192, 4096): True, (8192, 14336): True, (8192, 1024): False, (4096, 8192): True, (4096, 2048): False}
    assert {shape: beside(*shape, 0) for shape in shapes} == shapes
    assert not beside(2**21, 4096, 0)  # more rows than there are counters for
    monkeypatch.setattr(products_hopper, "_clusters", lambda index: 1)
    assert not beside(512, 256, 0)  # a card without others to give it to


def test_who_is_asked_for_a_kernel(monkeypatch):
    monkeypatch.setattr(products_hopper, "_is_hopper", lambda index: True)
    monkeypatch.setattr(products_hopper, "_clusters", lambda index: 66)
    monkeypatch.setattr(products_hopper, "_kernel", lambda *key: key)
    for cached in (products_hopper._fills, products_hopper._is_beside):
        cached.cache_clear()

    def asked(rows=8192, columns=4096, widths=(64,), rank=16, used=16, dtype=torch.bfloat16):
        xs, downs, weights, up = given(rows, columns, widths, rank, used, dtype=dtype)
        alone = products_hopper.kernel_with_low(xs, downs, None, None, True, columns)
        found = products_hopper.kernel_with_low(xs, downs, weights, up, True, columns)
        assert found == alone  # or its bits would differ
        return found

    assert asked() == (None, torch.bfloat16, True, True) and asked(dtype=torch.float16)
    assert asked(widths=(64, 8, 16), rank=64) and asked(used=5)
    no = asked(dtype=torch.float32), asked(widths=(8,) * 4), asked(rank=72), asked(rank=12), asked(columns=4092)
    assert (*no, asked(rows=100), asked(rows=0), asked(widths=(64, 0)), asked(columns=1024)) == (None,) * 9
    for cached in (products_hopper._fills, products_hopper._is_beside):
        cached.cache_clear()


def test_the_argument_is_laid_out_as_the_kernel_has_it():
    assert (
        struct.calcsize(products_hopper._WITH_LOW) == 27 * 64
    )  # 13 maps, 10 ints, two addresses, up to the maps' alignment
    text = matmul_nvrtc.source("sum_of_products")
    for line in ("Map d[SEGMENTS];", "int of_low, pitch, rank;", "uint16_t* low;", "int* counters;"):
        assert line in text
    assert "return 3 * idle >= pairs ? idle : every;" in text  # as `_is_beside` has it
