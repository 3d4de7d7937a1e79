"""Sums of products without a card: values, what is refused, one node of a graph, and the kernel's machine code where NVRTC is."""

import struct

import pytest
import torch
import torch._dynamo.testing

from unsloth_ext.nf4 import matmul_nvrtc, products_hopper
from unsloth_ext.nf4.products import sum_of_products


def pairs(rows, columns, widths, transposed=True, dtype=torch.bfloat16):
    xs = [torch.randn(rows, n).to(dtype) for n in widths]
    return xs, [torch.randn(*((columns, n) if transposed else (n, columns))).to(dtype) for n in widths]


def exact(xs, weights, transposed, onto=None):
    return (0 if onto is None else onto.double()) + sum(
        x.double() @ (w.double().t() if transposed else w.double()) for x, w in zip(xs, weights, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("widths", [(64,), (64, 3), (32, 8, 8, 5)])
def test_values(dtype, transposed, widths):
    xs, weights = pairs(7, 40, widths, transposed, dtype)
    wanted = exact(xs, weights, transposed)
    found = sum_of_products(xs, weights, transposed)
    assert found.shape == (7, 40) and found.dtype == dtype and found.is_contiguous()
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 2 * len(widths) * torch.finfo(dtype).eps
    torch.library.opcheck(torch.ops.unsloth_ext.sum_of_products.default, (xs, weights, transposed))
    onto = torch.randn(7, 40).to(dtype)
    before, found = onto.clone(), sum_of_products(xs, weights, transposed, onto)
    wanted = exact(xs, weights, transposed, onto)
    assert ((found.double() - wanted).norm() / wanted.norm()).item() < 2 * len(widths) * torch.finfo(dtype).eps
    assert torch.equal(onto, before) and found.is_contiguous()
    torch.library.opcheck(torch.ops.unsloth_ext.sum_of_products.default, (xs, weights, transposed, onto))


def test_one_node_for_all_lengths():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(lambda xs, ws: sum_of_products(xs, ws, False), backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9):
        given = pairs(rows, 16, (32, 8), False)
        assert torch.equal(run(*given), sum_of_products(*given, False))
    (graph,) = counter.graphs
    assert [node.op for node in graph.graph.nodes].count("call_function") == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda xs, ws: (xs, ws[:1]), "as many weights as inputs are needed, at least one, got 2 and 1"),
        (lambda xs, ws: ([], []), "at least one, got 0 and 0"),
        (lambda xs, ws: ([xs[0], xs[1][:3]], ws), r"an input \[3, 8\] and its weight \[16, 8\] do not fit"),
        (lambda xs, ws: (xs, [ws[0].t(), ws[1]]), r"an input \[5, 32\] and its weight \[32, 16\] do not fit"),
        (lambda xs, ws: (xs, [ws[0], ws[1][:9]]), "the weights give 16 and 9 columns"),
        (lambda xs, ws: (xs, [ws[0], ws[1].float()]), "must be of one dtype and on one device"),
        (lambda xs, ws: (xs, ws, True, xs[0]), r"the sum goes onto must be \[5, 16\] as the inputs are, got \[5, 32\]"),
    ],
)
def test_bad_input(change, why):
    with pytest.raises(ValueError, match=why):
        sum_of_products(*change(*pairs(5, 16, (32, 8))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_nothing(dtype):
    for rows, columns, widths in ((0, 16, (32, 8)), (5, 0, (32, 8)), (5, 16, (32, 0)), (5, 16, (0, 0))):
        xs, weights = pairs(rows, columns, widths, dtype=dtype)
        found = sum_of_products(xs, weights)
        torch.testing.assert_close(found, (xs[0] @ weights[0].t()).to(dtype), rtol=0.01, atol=0.01)


def test_who_is_asked_for_a_kernel(monkeypatch):
    """On a Hopper card: two to four products of 16 bits, of some size, whose layouts the copy engine takes."""
    monkeypatch.setattr(products_hopper, "_is_hopper", lambda index: True)
    monkeypatch.setattr(products_hopper, "_clusters", lambda index: 66)
    monkeypatch.setattr(products_hopper, "_kernel", lambda *key: key)
    products_hopper._fills.cache_clear()

    def asked(rows=4096, columns=4096, widths=(64, 8), dtype=torch.bfloat16, onto=None):
        xs, weights = pairs(rows, columns, widths, dtype=dtype)
        return products_hopper.kernel_for(xs, weights, True, columns, onto)

    assert asked() == (None, torch.bfloat16, True) and asked(dtype=torch.float16) and asked(widths=(64, 3, 5, 16))
    onto = torch.zeros(4096, 4104, dtype=torch.bfloat16)
    assert asked(onto=onto[:, 8:]) and asked(widths=(64,), onto=onto[:, :4096])
    assert asked(widths=(8,) * 4, onto=onto[:, 8:]) is asked(onto=onto[:, 4:4100]) is None
    no = (
        asked(dtype=torch.float32),
        asked(widths=(64,)),
        asked(widths=(8,) * 5),
        asked(columns=4092),
        asked(widths=(202, 8)),
    )
    assert (*no, asked(rows=100), asked(rows=0), asked(columns=0), asked(widths=(64, 0))) == (None,) * 9
    products_hopper._fills.cache_clear()


def test_gradients_through_it_are_not_silently_wrong():
    xs, weights = pairs(5, 16, (32, 8))
    y = sum_of_products([x.requires_grad_() for x in xs], weights)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()


def test_which_layouts_have_a_map():
    whole = torch.zeros(16, 64, dtype=torch.bfloat16)
    assert products_hopper._has_map(whole) and products_hopper._has_map(whole[:, 8:24])
    for other in (
        whole[:, 1:],
        whole.t(),
        torch.zeros(4, 12, dtype=torch.bfloat16),
        whole[:0],
        whole[:1].expand(4, 64),
    ):
        assert not products_hopper._has_map(other)
    for narrow in (torch.randn(4, 12).bfloat16(), torch.randn(4, 3).bfloat16(), whole[:, 3:8]):
        placed = products_hopper._placed(narrow)
        assert products_hopper._has_map(placed) and torch.equal(placed, narrow)
    assert products_hopper._placed(whole) is whole


def test_which_results_fill_the_card(monkeypatch):
    monkeypatch.setattr(products_hopper, "_clusters", lambda index: 66)
    products_hopper._fills.cache_clear()
    found = {
        (rows, n): products_hopper._fills(rows, n, 0)
        for rows in (1, 1000, 4096, 8192)
        for n in (512, 1024, 4096, 14336)
    }
    products_hopper._fills.cache_clear()
    assert {case for case, fills in found.items() if not fills} == {
        *((1, n) for n in (512, 1024, 4096, 14336)),
        (1000, 512),
        (1000, 1024),
        (4096, 512),
    }


def test_the_argument_is_laid_out_as_the_kernel_has_it():
    assert (
        struct.calcsize(products_hopper._PROBLEM) == 19 * 64
    )  # 9 maps, 7 ints, up to a multiple of the maps' alignment
    text = matmul_nvrtc.source("sum_of_products")
    numbers = f"STAGES = {products_hopper._STAGES}, SEGMENTS = {products_hopper.SEGMENTS}, BM = {products_hopper._BM}, "
    assert f"{numbers}BN = {products_hopper._BN}, BK = {products_hopper._BK}," in text
    assert (
        "Map x[SEGMENTS], w[SEGMENTS], y;" in text
        and "int M, N;" in text
        and "int added;" in text
        and products_hopper._SHARED <= 232448
    )


@pytest.mark.parametrize("low", [{}, {"LOW": 1}])
@pytest.mark.parametrize("macros", [{"WT": 1}, {"WT": 0}, {"WT": 1, "FP16": 1}])
def test_machine_code(macros, low, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_EXT_CACHE", str(tmp_path))
    try:
        matmul_nvrtc.library()
    except OSError as why:
        pytest.skip(str(why))
    assert matmul_nvrtc.cubin("sum_of_products", macros | low)[:4] == b"\x7fELF"
