"""On a card: the functions at real widths, in Inductor's graphs; gradients, and gate and up found again."""

import re
import sys

import pytest
import torch
from projection_weights import lora, mean_off, results, swiglu_backward, swiglu_forward

from unsloth_ext.compiling import projections, projections_kernel
from unsloth_ext.compiling.projections_operators import swiglu_lora, swiglu_lora_backward
from unsloth_ext.nf4 import dequantize, products_hopper

pytestmark = pytest.mark.gpu
CARD = "cuda"
H, I, KV = 2048, 5632, 512  # noqa: E741
SHAPES = {"Linear": ((H, H),), "QKV": ((H, H), (KV, H), (KV, H)), "MLP": ((I, H), (I, H), (H, I))}


def on_card(projection):
    packed, state, a, b, scaling = projection
    state.to(CARD)
    return [packed.to(CARD), state, *(t.detach().to(CARD).requires_grad_() for t in (a, b)), scaling]


def case(name, dtype, ranks=(16, 16, 16), rows=(2, 515)):
    shapes = zip(SHAPES[name], ranks, strict=False)
    given = [on_card(lora(n, k, rank, dtype, dtype_of_lora=torch.float32)) for (n, k), rank in shapes]
    x = torch.randn(*rows, H, device=CARD).to(dtype).requires_grad_()
    widths = {"Linear": (H,), "QKV": (H, KV, KV), "MLP": (H,)}[name]
    outer = (torch.randn(*rows, width, device=CARD) / 32 for width in widths)  # sums over 8192 rows stay within fp16
    return given, x, [one.to(dtype) for one in outer]


def run_of(name, given):
    return lambda x: getattr(projections, name).apply(x, *(one for projection in given for one in projection))


def plain_of(name, given, dtype):
    """In plain torch; dtype float64 for what is exact, 16 bits for one projection after the other."""

    def project(x, packed, state, a, b, scaling):
        y = x @ dequantize(packed, state).to(dtype).t()
        return torch.addmm(y, x @ a.to(dtype).t(), b.to(dtype).t(), alpha=scaling)

    def run(x):
        flat = x.reshape(-1, H).to(dtype)
        if name == "MLP":
            e, g = project(flat, *given[0]), project(flat, *given[1])
            h = torch.nn.functional.silu(e) * g if dtype == torch.float64 else swiglu_forward(e, g)
            out = (project(h, *given[2]),)
        else:
            out = tuple(project(flat, *one) for one in given)
        return tuple(one.view(*x.shape[:-1], -1) for one in out)

    return run


def on_hopper():
    return torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def sums(monkeypatch):
    """(sums of products, those with a narrow product inside) that the kernels have made since this was last asked."""
    calls, kinds = [], (products_hopper._Kernel, products_hopper._KernelWithLow)

    def counting(kind, own):
        def counted(self, *args, **kwargs):
            calls.append(kind)
            own(self, *args, **kwargs)

        return counted

    def asked():
        found = tuple(calls.count(kind) for kind in kinds)
        calls.clear()
        return found

    for transposed in (True, False):  # what a first use tries is not counted
        for dtype in (torch.bfloat16, torch.float16):
            if on_hopper():
                assert products_hopper._kernel(0, dtype, transposed) is not None
                assert products_hopper._kernel(0, dtype, transposed, True) is not None
    for kind in kinds:
        monkeypatch.setattr(kind, "__call__", counting(kind, kind.__call__))
    return asked


def in_double(run, x, given, outer):
    return [one.double() for one in results(run, x, given, outer)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (3, 32, 8)])
@pytest.mark.parametrize("rows", [(2, 515), (4, 2048)])  # products one by one, and in one sum
def test_compiled_gradients(name, dtype, ranks, rows, sums):
    large = rows == (4, 2048) and on_hopper()
    if not large:
        expected = 0, 0
    elif name == "MLP":  # beside 2048 columns a narrow product finds no room; a rank of 35 is made apart in the forward
        expected = (3, 2) if sum(ranks[:2]) % 8 == 0 else (4, 1)
    else:
        expected = {"Linear": (2, 0), "QKV": (4, 0)}[name]
    check_gradients(name, dtype, ranks, rows, sums, expected)


@pytest.mark.parametrize(("name", "expected"), [("Linear", (0, 2)), ("QKV", (2, 2))])
def test_gradients_of_wider_projections(name, expected, sums, monkeypatch):
    """Wide enough for their narrow products to be made inside, in the forward and in the backward."""
    here = sys.modules[__name__]
    monkeypatch.setattr(here, "H", 4096)
    monkeypatch.setattr(here, "KV", 1024)
    monkeypatch.setitem(SHAPES, "Linear", ((4096, 4096),))
    monkeypatch.setitem(SHAPES, "QKV", ((4096, 4096), (1024, 4096), (1024, 4096)))
    check_gradients(name, torch.bfloat16, (16, 16, 16), (4, 2048), sums, expected if on_hopper() else (0, 0))


def check_gradients(name, dtype, ranks, rows, sums, expected):
    given, x, outer = case(name, dtype, ranks, rows)
    torch._dynamo.reset()
    run = torch.compile(run_of(name, given), fullgraph=True, dynamic=True)
    exact = in_double(plain_of(name, given, torch.float64), x, given, outer)
    ours = mean_off(in_double(run, x, given, outer), exact)
    assert sums() == expected
    assert ours < 2 * mean_off(in_double(plain_of(name, given, dtype), x, given, outer), exact)
    given[0][2].data.mul_(1.1)  # what a graph kept of a weight would show
    exact = in_double(plain_of(name, given, torch.float64), x, given, outer)
    assert mean_off(in_double(run, x, given, outer), exact) < 2 * ours


@pytest.mark.parametrize("length", [256, 2048])
def test_gate_and_up_are_found_again_bit_for_bit(length, sums):
    given, x, outer = case("MLP", torch.bfloat16, rows=(2, length))  # nothing that shape_padding would pad
    kept = []
    torch._dynamo.reset()
    options = {"epilogue_fusion": True, "shape_padding": True}  # those of Unsloth's blocks
    run = torch.compile(run_of("MLP", given), fullgraph=True, dynamic=True, options=options)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(x)
    wide = [one for one in kept if one.ndim and one.shape[-1] == I and one.numel() == 2 * length * I]
    found = [projections.gate_or_up(name, x.detach(), *given[:2]).view(-1, I) for name in ("gate", "up")]
    assert len(wide) == 2 and all(any(torch.equal(one, w.view(-1, I)) for w in wide) for one in found)
    # up and down, and up again; gate, gate again, and what up reads of its narrow product
    assert sums() == ((3, 3) if length == 2048 and on_hopper() else (0, 0))


def test_nothing_is_copied_together():
    from torch._inductor.utils import run_and_get_code

    given, x, outer = case("MLP", torch.bfloat16)
    torch._dynamo.reset()
    run = torch.compile(lambda x: run_of("MLP", given)(x * 1.5) + x, fullgraph=True, dynamic=True)
    _, codes = run_and_get_code(lambda: run(x).backward(outer[0]))
    backward = codes[-1]
    (operator,) = re.findall(r"(buf\d+) = torch\.ops\.unsloth_ext\.swiglu_lora_backward", backward)
    (wide,) = re.findall(rf"(buf\d+) = {operator}\[0\]", backward)
    (gradient,) = (line for line in backward.splitlines() if "product_with_low" in line and wide in line)
    assert gradient.count(f"reinterpret_tensor({wide},") == 2, backward  # its halves, where they are
    assert f", {2 * I})" not in "".join(line for line in backward.splitlines() if "empty_strided" in line), backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [16, 3, 40, 100])
@pytest.mark.parametrize(("rows", "width"), [(16384, 2816), (8192, 1408), (515, I), (3, 1000), (0, 64)])
def test_swiglu_lora(dtype, rank, rows, width):
    e, g, a = (torch.randn(n, width, device=CARD).to(dtype) for n in (rows, rows, rank))
    h, low = swiglu_lora(e, g, a)
    near = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(h, swiglu_forward(e, g), rtol=near, atol=near)
    exact = h.double() @ a.double().t()
    assert not rows or ((low - exact).norm() / exact.norm()).item() < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(16, 16, 16), (3, 40, 8), (8, 100, 8)])
@pytest.mark.parametrize(("rows", "width"), [(4096, 14336), (515, I), (3, 1000), (0, 64)])
def test_swiglu_lora_backward(dtype, ranks, rows, width):
    dh, e, g = (torch.randn(rows, width, device=CARD).to(dtype) for _ in range(3))
    low, p = (torch.randn(rows, n, device=CARD).to(dtype) for n in (ranks[0] + ranks[1], ranks[2]))
    wide, sums = swiglu_lora_backward(dh, e, g, low, p, ranks[0])
    near = 4 * torch.finfo(dtype).eps
    h = projections_kernel.swiglu_backward(dh, e, g, torch.empty_like(wide))  # the very bits that are summed
    for found, wanted in zip((h, wide[:, width:], wide[:, :width]), swiglu_backward(dh, e, g), strict=True):
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)
    pairs = (low[:, : ranks[0]], wide[:, :width]), (low[:, ranks[0] :], wide[:, width:]), (p, h)
    exact = torch.cat([left.double().t() @ right.double() for left, right in pairs])
    assert sums.shape == exact.shape and sums.dtype == torch.float32
    if rows:
        least = 1e-5 if max(ranks) <= 64 else torch.finfo(dtype).eps  # cuBLAS rounds to 16 bits
        assert ((sums - exact).norm() / exact.norm()).item() < least


def test_peak_memory():
    """The backward of the MLP: no more than the gradients of gate and up and their weights, beyond what the plain order needs."""
    given, x, outer = case("MLP", torch.bfloat16, rows=(4, 2048))
    peaks = {}
    for which, run in (("ours", run_of("MLP", given)), ("plain", plain_of("MLP", given, torch.bfloat16))):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True)
        for _ in range(2):
            in_double(compiled, x, given, outer)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = compiled(x)
        torch.autograd.backward(out, outer if isinstance(out, tuple) else outer[0])
        peaks[which] = torch.cuda.max_memory_allocated() - before
        del out
    wide, weights = x.numel() // H * 2 * I * 2, 2 * I * H * 2
    assert peaks["ours"] < peaks["plain"] + wide + weights, peaks


@pytest.mark.parametrize("length", [512, 8192])
def test_in_a_cuda_graph(length):
    given, x, outer = case("QKV", torch.bfloat16, rows=(1, length))
    torch._dynamo.reset()
    run = torch.compile(run_of("QKV", given), fullgraph=True)
    expected = in_double(run, x, given, outer)
    leaves = [x, *(leaf for projection in given for leaf in projection[2:4])]

    def step():
        return torch.autograd.grad(run(x), leaves, outer)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for found, wanted in zip(captured, expected[3:], strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * wanted.abs().max().item())
