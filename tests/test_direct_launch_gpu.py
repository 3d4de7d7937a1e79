"""Kernels by Triton's C launcher: the same results whatever changes from one call to the next, and Triton's own way where that must be."""

import pytest
import torch

pytestmark = pytest.mark.gpu
triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _scaled(x_ptr, out_ptr, n, stride, factor, BLOCK: tl.constexpr, ADD: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < n, other=0).to(tl.float32) * factor
    tl.store(out_ptr + at, (x + 1 if ADD else x).to(out_ptr.dtype.element_ty), mask=at < n)


@pytest.fixture
def quick():
    from unsloth_ext.direct_launch import Quick

    return Quick(_scaled)


def _call(quick, x, stride=1, factor=2.0, add=False, block=128):
    n = x.numel() // stride
    out = torch.full((n,), -7.0, device=x.device).to(x.dtype)
    quick((-(-n // block), 1, 1), (x, out), (n, stride, factor), BLOCK=block, ADD=add, num_warps=4)
    expected = (x.float()[: n * stride : stride] * factor + add).to(x.dtype)
    assert torch.equal(out, expected)


def test_what_changes_is_seen(quick):
    for _ in range(3):
        for n in (1, 127, 128, 4096, 4099):
            for stride in (1, 2, 16):  # Triton compiles a stride of 1, or of a multiple of 16, for itself
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(n * stride, device="cuda").to(dtype)
                    _call(quick, x, stride)
                    _call(quick, x, stride, factor=0.5, add=True, block=64)
    assert len(quick.known) == 5 * 3 * 2 * 2


def test_addresses_are_read_afresh_and_may_be_at_any_byte(quick):
    memory = torch.randn(5000, device="cuda")
    for _ in range(2):
        for first in (0, 1, 2, 3, 4, 77):  # in floats: 16 bytes are four
            _call(quick, memory[first : first + 1024])
    assert len(quick.known) == 1


def test_the_current_stream(quick):
    stream, x = torch.cuda.Stream(), torch.randn(1 << 20, device="cuda")
    _call(quick, x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 1  # of this stream, behind the sleep: another stream would read what is not there yet
        _call(quick, late)
    stream.synchronize()


def test_a_profilers_hooks_see_each_launch(quick):
    from unsloth_ext.direct_launch import hooks

    x, seen = torch.randn(512, device="cuda"), []
    _call(quick, x)
    assert quick.known
    enter, _ = hooks()

    def saw(metadata):
        seen.append(metadata.get()["name"])

    enter.add(saw)
    try:
        _call(quick, x)
    finally:
        enter.remove(saw)
    _call(quick, x)
    assert seen == ["_scaled"]


def test_a_graph_can_capture_it(quick):
    x, out = torch.randn(512, device="cuda"), torch.empty(512, device="cuda")
    _call(quick, x)
    quick((4, 1, 1), (x, out), (512, 1, 3.0), BLOCK=128, ADD=False, num_warps=4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quick((4, 1, 1), (x, out), (512, 1, 3.0), BLOCK=128, ADD=False, num_warps=4)
    x.copy_(torch.arange(512.0))
    graph.replay()
    assert torch.equal(out, torch.arange(512.0, device="cuda") * 3)


def test_no_more_launchers_than_it_says(quick, monkeypatch):
    from unsloth_ext import direct_launch

    monkeypatch.setattr(direct_launch, "_MOST", 8)
    for n in range(100, 130):
        _call(quick, torch.randn(n, device="cuda"))
    assert 0 < len(quick.known) <= 8
