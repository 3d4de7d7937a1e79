"""On a card: every bit against bitsandbytes, and everything that eager CUDA code can do to a kernel."""

import copy
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nf4_compile import BLOCKSIZE_SHAPES, LAUNCH_SHAPES, SOME_BLOCKSIZES, runs_here, shape_specs, with_table
from nf4_states import Spec, as_list, bits, specs

from unsloth_ext.nf4 import dequantization, dequantize, launch
from unsloth_ext.nf4.quant_state import DTYPES, NF4State, read

pytestmark = pytest.mark.gpu

LARGE = Spec(rows=1024, columns=2048)


@pytest.fixture(autouse=True)
def no_warning():
    """Giving up on the kernel is a warning: no test may pass by falling back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    assert dequantization._given_up == {}


@pytest.fixture(scope="module", autouse=True)
def compiled_side_by_side():
    """Fill Triton's cache with all processors; one after the other takes minutes."""
    parts = min(12, os.cpu_count() or 1)
    code, path = str(Path(__file__).with_name("nf4_compile.py")), str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, code, str(i), str(parts)], env=env, stderr=subprocess.PIPE, text=True)
        for i in range(parts)
    ]
    for worker in workers:
        _, problem = worker.communicate(timeout=300)
        assert worker.returncode == 0, problem[-2000:]


def same(out, packed, state):
    return torch.equal(bits(out), bits(bnb.dequantize_4bit(packed, state)))


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs(rows=st.integers(1, 70), columns=st.integers(1, 700)))
def test_random_states_are_bit_exact(spec):
    packed, state = spec.make("cuda")
    for _ in range(2):  # the second time by a plan, where there is one
        out = dequantize(packed, state)
        assert out.is_cuda and same(out, packed, state)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(specs(shift=st.integers(0, 17), storage=torch.uint8), st.integers(0, 17))
def test_any_alignment(spec, off):
    packed, state = spec.make("cuda")
    n = state.shape.numel()
    whole = torch.full((n + 64,), 77.0, dtype=spec.dtype, device="cuda")
    out = whole[off : off + n].view(state.shape)
    result = dequantize(packed, state, out=out)
    assert same(result, packed, state)  # the transpose where there is only one byte, as with bitsandbytes
    assert result.data_ptr() == out.data_ptr()
    assert (whole[:off] == 77).all() and (whole[off + n :] == 77).all()  # and nothing beside it is written


def every_case_of(shape, monkeypatch, dtypes, blocksizes):
    if not runs_here(shape):
        pytest.skip("programmatic dependent launch and the copy engine need sm_90")
    monkeypatch.setitem(launch.TABLES, *with_table(shape))
    for dtype, blocksize in itertools.product(dtypes, blocksizes):
        for spec in shape_specs(dtype, blocksize):
            packed, state = spec.make("cuda")
            assert same(dequantize(packed, state), packed, state), (shape, spec)


@pytest.mark.parametrize("shape", LAUNCH_SHAPES, ids=str)
def test_every_launch_shape(shape, monkeypatch):
    every_case_of(shape, monkeypatch, [torch.bfloat16], [64])


@pytest.mark.parametrize("shape", BLOCKSIZE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_size(dtype, shape, monkeypatch):
    every_case_of(shape, monkeypatch, [dtype], SOME_BLOCKSIZES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_weights(dtype):
    weight = torch.randn(4096, 1024, dtype=dtype, device="cuda")
    for blocksize in (64, 128, 4096):
        for nested in (False, True):
            packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
            assert same(dequantize(packed, state), packed, state)
            assert torch.equal(dequantize(packed.t(), state), bnb.dequantize_4bit(packed, state).t())
            assert torch.equal(dequantize(packed, as_list(state)), bnb.dequantize_4bit(packed, state))


def test_planned_calls_follow_their_weight():
    packed, state = LARGE.make("cuda")
    others = [Spec(rows=1024, columns=2048, seed=i).make("cuda") for i in range(1, 4)]
    dequantize(packed, state)
    assert id(state) in dequantization.plans
    for other, its_state in others:
        packed.data = other.data.clone()  # moved, or gathered again
        for name in ("absmax", "offset"):
            setattr(state, name, getattr(its_state, name).clone())
        state.state2 = copy.copy(its_state.state2)
        for _ in range(3):
            assert same(dequantize(packed, state), packed, state)
    storage = packed.untyped_storage()
    size = storage.size()
    storage.resize_(0)  # as FSDP2 frees a gathered weight
    with pytest.raises(ValueError, match="packed has no storage"):
        dequantize(packed, state)
    storage.resize_(size)
    packed.copy_(others[0][0])
    assert same(dequantize(packed, state), packed, state)
    state.dtype = torch.float16
    assert dequantize(packed, state).dtype == torch.float16 and same(dequantize(packed, state), packed, state)
    state.absmax = state.absmax.cpu()
    with pytest.raises(ValueError, match="absmax must be on cuda"):
        dequantize(packed, state)


def test_on_another_stream_it_waits_for_that_stream_only():
    packed, state = LARGE.make("cuda")
    source, _ = Spec(rows=1024, columns=2048, seed=5).make("cuda")
    right = bnb.dequantize_4bit(source, state)
    dequantize(packed, state)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(5):
        packed.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            packed.copy_(source)
            out = dequantize(packed, state)
        side.synchronize()
        assert torch.equal(out, right)


def test_it_waits_for_the_kernel_before_it():
    # With programmatic dependent launch it starts early: it must not read what the kernel before it is still writing.
    packed, state = Spec(rows=4096, columns=4096).make("cuda")
    sources = [Spec(rows=4096, columns=4096, seed=i).make("cuda")[0] for i in range(3)]
    rights = [bnb.dequantize_4bit(source, state) for source in sources]
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda")
    for i in range(60):
        packed.copy_(sources[i % 3])
        dequantize(packed, state, out=out)
        doubled = out * 2  # and the kernel after it must see all of its output
        assert torch.equal(doubled, rights[i % 3] * 2)


def test_in_a_cuda_graph():
    packed, state = LARGE.make("cuda")
    dequantize(packed, state)  # compiled and verified outside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequantize(packed, state)
        total = out.float().sum()
    for seed in (1, 2):
        packed.copy_(Spec(rows=1024, columns=2048, seed=seed).make("cuda")[0])
        graph.replay()
        assert same(out, packed, state) and torch.equal(total, out.float().sum())


def test_first_used_while_a_graph_is_captured():
    dequantization.forget()
    packed, state = LARGE.make("cuda")
    bnb.dequantize_4bit(packed, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dequantize(packed, state)  # by bitsandbytes: nothing can be verified in there
    graph.replay()
    assert same(out, packed, state)


def test_inference_mode_and_back():
    packed, state = LARGE.make("cuda")
    with torch.inference_mode():
        first = dequantize(packed, state)
    x = torch.randn(4, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = dequantize(packed, state)
    assert torch.equal(first, weight) and not weight.is_inference()
    (x @ weight.t()).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 1024, dtype=torch.bfloat16, device="cuda") @ weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    packed, state = LARGE.make("cuda")

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def layer(x, packed):
        return x @ dequantize(packed, state).t()

    for rows in (8, 16):
        x = torch.randn(rows, 2048, dtype=torch.bfloat16, device="cuda")
        torch.testing.assert_close(layer(x, packed), x @ bnb.dequantize_4bit(packed, state).t())


def test_opcheck():
    packed, state = Spec().make("cuda")
    s: NF4State = read(state)
    fields = (packed, s.absmax, s.code2, s.absmax2, s.offset, s.blocksize, s.blocksize2)
    torch.library.opcheck(torch.ops.unsloth_ext.dequantize_nf4, (*fields, list(s.shape), s.dtype))
    torch.library.opcheck(
        torch.ops.unsloth_ext.dequantize_nf4_out, (*fields, torch.empty(s.shape, dtype=s.dtype, device="cuda"))
    )


def test_more_than_2_to_the_31_elements():
    rows, columns = (1 << 16) + 64, 1 << 15  # 2.15e9 elements
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    packed, state = Spec(rows=64, columns=columns).make("cuda")
    big = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
    blocks = rows * columns // 64
    state.shape = torch.Size([rows, columns])
    state.absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
    state.state2.absmax = torch.rand(-(-blocks // 256), device="cuda")
    out = dequantize(big, state)
    piece = copy.copy(state)
    piece.state2 = copy.copy(state.state2)
    piece.shape = torch.Size([64, columns])
    for first in (0, rows // 2, rows - 64):  # bitsandbytes counts elements in 32 bits: compare pieces
        at = slice(first * columns // 64, (first + 64) * columns // 64)
        piece.absmax, piece.state2.absmax = state.absmax[at], state.state2.absmax[at.start // 256 : at.stop // 256]
        raw = big[first * columns // 2 : (first + 64) * columns // 2]
        assert same(out[first : first + 64], raw, piece)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    dequantization.forget()
    launched = launch.launch

    def wrong(variant, packed, absmax, code2, absmax2, offset, out, n):
        compiled = launched(variant, packed, absmax, code2, absmax2, offset, out, n)
        out.view(-1)[0] += 1
        return compiled

    packed, state = LARGE.make("cuda")
    with monkeypatch.context() as patched:
        patched.setattr(launch, "launch", wrong)
        with pytest.warns(RuntimeWarning, match="the NF4 kernel is not used on .*: its result differs"):
            out = dequantize(packed, state)
    assert same(out, packed, state) and dequantization._given_up
    assert same(dequantize(packed, state), packed, state)
    dequantization.forget()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_on_the_card_of_its_inputs():
    packed, state = LARGE.make("cuda:1")
    for _ in range(3):
        out = dequantize(packed, state)
        assert out.get_device() == 1 and torch.cuda.current_device() == 0
        with torch.cuda.device(1):
            assert same(out, packed, state)


def test_through_unsloth():
    pytest.importorskip("unsloth")
    from unsloth.kernels import utils

    from unsloth_ext.nf4.patch import PATCHES
    from unsloth_ext.patching import Registry

    registry = Registry()
    registry.register(PATCHES)
    packed, state = LARGE.make("cuda")
    right = bnb.dequantize_4bit(packed, state)
    pristine = utils._fast_dequantize_bnb
    already = getattr(pristine, "__wrapped__", None)
    if already is None:
        registry.enable()
        assert [row.state for row in registry.status()] == ["applied"]
    try:
        for _ in range(3):
            for use_global_buffer in (False, True):
                assert torch.equal(utils.fast_dequantize(packed, state, use_global_buffer=use_global_buffer), right)
                assert torch.equal(
                    utils.fast_dequantize(packed.t(), state, use_global_buffer=use_global_buffer), right.t()
                )
        assert id(state) in dequantization.plans
        shared = utils.fast_dequantize(packed, state, use_global_buffer=True)
        assert shared.data_ptr() == utils.fast_dequantize(packed, state, use_global_buffer=True).data_ptr()
        out = torch.empty_like(right)
        assert utils.fast_dequantize(packed, state, out=out) is out and torch.equal(out, right)
        assert utils.fast_dequantize(right, None) is right
        weight = torch.randn(64, 128, dtype=torch.bfloat16, device="cuda")
        raw, fp4 = bnb.quantize_4bit(weight, quant_type="fp4")
        assert torch.equal(utils.fast_dequantize(raw, fp4), bnb.dequantize_4bit(raw, fp4))
    finally:
        if already is None:
            registry.disable()
            assert utils._fast_dequantize_bnb is pristine


# -- an operator's later calls (repeated.py) ---------------------------------------------------------------------------------


def _fields(packed, state):
    read_ = read(state)
    return packed, read_.absmax, read_.code2, read_.absmax2, read_.offset, read_.blocksize, read_.blocksize2


@pytest.mark.parametrize("nested", [True, False])
def test_an_operators_later_calls_go_without_checks(nested, monkeypatch):
    operator = torch.ops.unsloth_ext.dequantize_nf4
    packed, state = Spec(rows=256, columns=512, nested=nested).make("cuda")
    arguments = list(state.shape), state.dtype
    assert same(operator(*_fields(packed, state), *arguments), packed, state)
    monkeypatch.setattr(dequantization, "check", None)  # a call of it would raise TypeError
    for seed in range(3):  # other weights of the same layout, at other addresses
        other, other_state = Spec(rows=256, columns=512, nested=nested, seed=seed).make("cuda")
        assert same(operator(*_fields(other, other_state), *arguments), other, other_state)
    with pytest.raises(TypeError):  # another layout
        larger, larger_state = Spec(rows=257, columns=512, nested=nested).make("cuda")
        operator(*_fields(larger, larger_state), list(larger_state.shape), larger_state.dtype)
    dequantization.forget()
    with pytest.raises(TypeError):
        operator(*_fields(packed, state), *arguments)


def test_an_operators_later_calls_refuse_what_the_first_would():
    operator = torch.ops.unsloth_ext.dequantize_nf4
    packed, state = Spec(rows=256, columns=512).make("cuda")
    fields, arguments = list(_fields(packed, state)), (list(state.shape), state.dtype)
    operator(*fields, *arguments)

    def expect(place, tensor, said):
        changed = [*fields]
        changed[place] = tensor
        with pytest.raises(ValueError, match=said):
            operator(*changed, *arguments)

    expect(0, packed[:-1], "packed must hold")
    expect(1, state.absmax[:-1].clone(), "absmax must have")
    expect(1, state.absmax.float(), "absmax must be")
    expect(2, state.state2.code.repeat_interleave(2)[::2], "state2.code must be contiguous")
    expect(3, state.state2.absmax.cpu(), "state2.absmax must be on")
    freed = packed.clone()
    freed.untyped_storage().resize_(0)
    expect(0, freed, "packed has no storage")
    double, apart = state.offset.double(), packed.repeat(1, 2)[:, :1]
    assert same(operator(*fields[:4], double, *fields[5:], *arguments), packed, state)  # converted
    expect(0, apart, "packed must be contiguous")
    expect(4, None, "quant_state.offset must be given")
    off = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")[1:].unsqueeze(1)
    assert same(operator(off.copy_(packed), *fields[1:], *arguments), packed, state)  # at an odd address
